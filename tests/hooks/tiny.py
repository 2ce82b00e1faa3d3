"""A tiny random Llama, prompts for it, and edits that fit it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from attn_hooks import (
    ACT,
    ITI,
    PASTA,
    Ablate,
    AnchorAttention,
    DynamicMask,
    Edit,
    HeadAffine,
    LoFiT,
    MoBA,
    PowerAttention,
    S2Attention,
    SinkScale,
    Streaming,
    TriShape,
    VerticalSlash,
    XAttention,
)

VOCAB_SIZE = 64
PAD, BOS, EOS = 0, 1, 2
NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 8, 4, 8
# Large enough that every edit below moves the logits far beyond rounding.
WEIGHT_SPREAD = 0.3


def tiny_config(**overrides: Any) -> LlamaConfig:
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": NUM_HEADS * HEAD_DIM,
        "intermediate_size": 96,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "max_position_embeddings": 256,
        "initializer_range": WEIGHT_SPREAD,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    return LlamaConfig(**(sizes | overrides))


def tiny_llama(config: LlamaConfig | None = None, seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """In eval mode, float32. ``attn_implementation`` may be among the overrides."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(config or tiny_config(**overrides)).eval()


def prompt(batch: int = 2, length: int = 12, seed: int = 1) -> Tensor:
    """Token ids that start with BOS and hold no other special token."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCAB_SIZE, (batch, length), generator=generator)
    tokens[:, 0] = BOS
    return tokens


def padded_batch(side: str) -> dict[str, Tensor]:
    """Prompts of 12 and 7 tokens in one batch."""
    long, short = prompt(1, 12)[0], prompt(1, 7, seed=2)[0]
    tokens, mask = torch.full((2, 12), PAD), torch.zeros(2, 12, dtype=torch.long)
    tokens[0], mask[0] = long, 1
    real = slice(5, 12) if side == "left" else slice(0, 7)
    tokens[1, real], mask[1, real] = short, 1
    return {"input_ids": tokens, "attention_mask": mask}


@torch.no_grad()
def logits(model: nn.Module, tokens: Tensor | None = None, **inputs: Any) -> Tensor:
    inputs.setdefault("input_ids", prompt() if tokens is None else tokens)
    return model(**inputs).logits


def generated(model: Any, new_tokens: int = 6, **options: Any) -> Tensor:
    """Greedy continuation of the standard prompt, always of the same length."""
    settings = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": PAD}
    if "input_ids" not in options and "inputs_embeds" not in options:
        options["input_ids"] = prompt()
    return model.generate(**(settings | options))


def gain_at(layer: int, head: int, value: float) -> Tensor:
    gain = torch.ones(NUM_LAYERS, NUM_HEADS)
    gain[layer, head] = value
    return gain


# One of each shipped method, with parameters under which it acts on `prompt()`.
ACTING_EDITS: dict[str, Edit] = {
    "ablate": Ablate(heads={1: [3, 6]}),
    "act": ACT(beta=0.1, alpha=1.05, heads={2: [1, 4], 1: [0]}),
    "anchor": AnchorAttention(theta=-100.0, block=2, step=2),
    "dynamic_mask": DynamicMask(window=3),
    "head_affine": HeadAffine(gain=gain_at(2, 5, 3.0)),
    "iti": ITI(heads={0: [1], 2: [6]}, direction=torch.eye(2, HEAD_DIM), sigma=torch.tensor([0.2, 0.1])),
    "lofit": LoFiT(heads={1: [2], 3: [5]}, offset=torch.linspace(-1, 1, 2 * HEAD_DIM).view(2, HEAD_DIM)),
    "moba": MoBA(block=2, top_k=1),
    "pasta": PASTA(spans=(((3, 6),),), alpha=0.05, heads={0: [2], 3: [7]}),
    "power": PowerAttention(block=2, window_blocks=1, sink_blocks=0),
    "s2": S2Attention(block=1, local_blocks=1, stride=2),
    "sink_scale": SinkScale(scale=4.0),
    "streaming": Streaming(sinks=1, window=3),
    "trishape": TriShape(sinks=1, window=3, dense_rows=2),
    "vertical_slash": VerticalSlash(vertical=1, slash=1, first=0, nearest=1, last=2, query_block=2, block=2),
    "xattention": XAttention(threshold=0.0, stride=1, block=2),
}
