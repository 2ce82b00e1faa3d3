"""A tokenizer with one token a byte, a text, and a tiny random model: nothing is downloaded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, so that the length of a prompt in tokens can be read off its text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([PAD, BOS, EOS, *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=BOS, eos_token=EOS, pad_token=PAD)


@pytest.fixture(scope="session")
def haystack_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Sixty plain sentences, with a number and an abbreviation that must not be torn apart."""
    people = ("the miller", "a sailor", "her uncle", "the old clerk")
    deeds = ("opened the gate", "counted 3.14 loaves", "walked to the harbour", "asked for Dr Finch", "slept")
    times = ("at dawn", "before the rain", "on the last day")
    sentences = [f"{p.capitalize()} {d} {t}." for p in people for d in deeds for t in times]
    path = tmp_path_factory.mktemp("haystack") / "village.txt"
    path.write_text("\n".join(sentences), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def model(tokenizer: PreTrainedTokenizerFast) -> Any:
    """A Llama of two layers with random weights and the byte tokenizer's vocabulary."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def model_folder(model: Any, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model and its tokenizer, saved as a checkpoint."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


CHAT_TEMPLATE = (
    "<bos>{% for part in messages[0]['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}{% if add_generation_prompt %} A:{% endif %}"
)


@pytest.fixture(scope="session")
def vision_folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA of two layers with random weights, 16 patches an image, saved as a checkpoint with its processor."""
    torch.manual_seed(0)
    own_tokenizer = copy.deepcopy(tokenizer)
    own_tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"bos_token_id": own_tokenizer.bos_token_id, "eos_token_id": own_tokenizer.eos_token_id}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=16, patch_size=4),
        text_config=LlamaConfig(**sizes, **special, num_key_value_heads=2, vocab_size=len(own_tokenizer)),
        image_token_id=own_tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    folder = tmp_path_factory.mktemp("tiny-llava")
    model = LlavaForConditionalGeneration(config)
    for parameter in model.parameters():
        # Larger than at the start of training, so that an image changes what is written.
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        own_tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return folder
