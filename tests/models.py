"""Tiny random models: enough layers, heads and kinds of attention to catch what goes wrong. They show plumbing only."""

from __future__ import annotations

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

VOCABULARY = 61
IMAGE = VOCABULARY - 1
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    # No family with images: a run of these tokens counts as one.
    "image_token_id": IMAGE,
}


def llama(dtype: torch.dtype = torch.float64, **overrides: object) -> PreTrainedModel:
    """Grouped heads, full attention."""
    return _built(LlamaForCausalLM, LlamaConfig(**{**SIZES, **overrides}), dtype)


def mistral() -> PreTrainedModel:
    """Every layer has a sliding window of 6."""
    return _built(MistralForCausalLM, MistralConfig(**SIZES, sliding_window=6), torch.float64)


def gemma2() -> PreTrainedModel:
    """Softcap, full and sliding layers in turn; runs on eager, whose padded rows are NaN in float64."""
    config = Gemma2Config(**SIZES, sliding_window=6, query_pre_attn_scalar=8, attn_logit_softcapping=2.0)
    return _built(Gemma2ForCausalLM, config, torch.float32)


def gpt_oss() -> PreTrainedModel:
    """A learned sink logit a head, full and sliding layers in turn, experts; runs on eager."""
    config = GptOssConfig(**SIZES, sliding_window=6, num_local_experts=2, num_experts_per_tok=1)
    model = _built(GptOssForCausalLM, config, torch.float32)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks)
    return model


def _built(model_class: type[PreTrainedModel], config: object, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    if model_class in (Gemma2ForCausalLM, GptOssForCausalLM):
        config._attn_implementation = "eager"
    model = model_class(config).eval().to(dtype)
    # The usual initial scale leaves attention almost uniform, and an edit of it almost without effect.
    for name, parameter in model.named_parameters():
        if (parameter.ndim > 1 and "q_proj" in name) or "k_proj" in name:
            parameter.data *= 8
    return model


FAMILIES = {"llama": llama, "mistral": mistral, "gemma2": gemma2, "gpt_oss": gpt_oss}


def prompts(batch: int = 3, length: int = 14, seed: int = 0, image: bool = False) -> torch.Tensor:
    """Token ids ``(batch, length)`` that start with BOS; perhaps with images of a token each."""
    generator = torch.Generator("cpu").manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=generator, device="cpu")
    ids[ids == IMAGE] = 3
    ids[:, 0] = 1
    if image:
        ids[:, 1:6:2] = IMAGE
        ids[:, 11:12] = IMAGE
    return ids.to(torch.get_default_device())


def left_padded(
    lengths: tuple[int, ...] = (14, 9, 4), seed: int = 0, image: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of prompts of several lengths, padding first."""
    longest = max(lengths)
    ids, mask = (
        torch.zeros(len(lengths), longest, dtype=torch.long),
        torch.zeros(len(lengths), longest, dtype=torch.long),
    )
    for row, length in enumerate(lengths):
        ids[row, longest - length :] = prompts(1, length, seed + row, image)
        mask[row, longest - length :] = 1
    return ids, mask
