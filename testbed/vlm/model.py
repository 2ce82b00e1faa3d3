"""The untrained model, and a forward pass that asks several questions about one image at the price of one image."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from testbed.vlm.layout import IMAGE_SIZE
from testbed.vlm.text import EOS_TEXT, IMAGE_TEXT

PATCH = 16
IMAGE_TOKENS = (IMAGE_SIZE // PATCH) ** 2
VOCABULARY = 840
POSITIONS = 512


def model_config(tokenizer: Tokenizer) -> LlavaConfig:
    """A LLaVA of 7 million parameters: CLIP ViT with 6 layers, projector, Llama with 6 layers and grouped heads."""
    vision = CLIPVisionConfig(
        hidden_size=256, intermediate_size=640, num_hidden_layers=6, num_attention_heads=4, image_size=IMAGE_SIZE,
        patch_size=PATCH, projection_dim=256,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=448, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=POSITIONS, rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0}, tie_word_embeddings=True,
        pad_token_id=tokenizer.token_to_id("<pad>"), bos_token_id=tokenizer.token_to_id("<s>"),
        eos_token_id=tokenizer.token_to_id(EOS_TEXT), initializer_range=0.02,
    )  # fmt: skip
    return LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=tokenizer.token_to_id(IMAGE_TEXT),
        vision_feature_select_strategy="default", vision_feature_layer=-1, image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=True,
    )  # fmt: skip


def new_model(tokenizer: Tokenizer, seed: int) -> LlavaForConditionalGeneration:
    """The model before training, float32."""
    torch.manual_seed(seed)
    return LlavaForConditionalGeneration(model_config(tokenizer))


def save_weights(model: LlavaForConditionalGeneration, file: Path) -> None:
    """The weights alone in one file: bfloat16, under the names of a published checkpoint."""
    weights = copy.deepcopy(model).to("cpu", torch.bfloat16)
    weights.config.dtype = torch.bfloat16
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        weights.save_pretrained(folder)
        (Path(folder) / "model.safetensors").replace(file)


def load_weights(file: Path, tokenizer: Tokenizer, dtype: torch.dtype = torch.float32) -> LlavaForConditionalGeneration:
    """The model with the weights of such a file.

    Raises:
        ValueError: the file lacks a weight of this model, or holds another one.
    """
    model, found = LlavaForConditionalGeneration.from_pretrained(
        None, config=model_config(tokenizer), state_dict=load_file(file), dtype=dtype, output_loading_info=True
    )
    wrong = {
        kind: sorted(found[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if found[kind]
    }
    if wrong:
        raise ValueError(f"{file} does not hold this model's weights: {wrong}; give a checkpoint of testbed.vlm.train")
    return model


class SlotForward(nn.Module):
    """The model on one image and several texts, each of which sees the image and itself.

    The sequence is ``<s>USER: `` + image + newline, and then slots of fixed lengths; every slot's positions begin behind
    the image, so that a text gives the same logits as it does alone. Padding stands at a slot's end, where no token of
    the text sees it.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        slots: the slots' lengths.
        device: where the model is.
    """

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        tokenizer: Tokenizer,
        slots: tuple[int, ...],
        device: torch.device | str,
    ) -> None:
        super().__init__()
        inner = model.model
        self.vision_tower, self.projector, self.language_model = (
            inner.vision_tower, inner.multi_modal_projector, inner.language_model,
        )  # fmt: skip
        self.slots = slots
        before = tokenizer.encode("USER: ").ids
        after = tokenizer.encode("\n", add_special_tokens=False).ids
        prefix = len(before) + IMAGE_TOKENS + len(after)
        self.prefix = prefix
        slot_of = torch.cat([torch.zeros(prefix), *(torch.full((n,), i + 1.0) for i, n in enumerate(slots))])
        position = torch.cat([torch.arange(prefix), *(prefix + torch.arange(n) for n in slots)])
        causal = torch.ones(len(position), len(position), dtype=torch.bool).tril()
        mask = causal & ((slot_of[None, :] == 0) | (slot_of[None, :] == slot_of[:, None]))
        self.register_buffer("mask", mask[None, None].to(device), persistent=False)
        self.register_buffer("position", position[None].to(device), persistent=False)
        self.register_buffer("before", torch.tensor(before, device=device), persistent=False)
        self.register_buffer("after", torch.tensor(after, device=device), persistent=False)

    def prompt_embeddings(self, pixels: Tensor) -> Tensor:
        """Embeddings of the prefix, ``(batch, prefix, hidden)``, from pixel values ``(batch, 3, H, W)``."""
        features = self.projector(self.vision_tower(pixel_values=pixels).last_hidden_state[:, 1:])
        embed = self.language_model.embed_tokens
        before, after = (embed(ids).expand(len(pixels), -1, -1) for ids in (self.before, self.after))
        # The residual stream keeps the weights' precision under autocast.
        return torch.cat([before, features.to(embed.weight.dtype), after], dim=1)

    def forward(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        """Logits behind every slot token.

        Args:
            pixels: ``(batch, 3, H, W)``.
            tokens: the slots side by side, ``(batch, sum of the slots)``.

        Returns:
            ``(batch, sum of the slots, vocabulary)``; those at i tell what follows token i in its slot.
        """
        prompt = self.prompt_embeddings(pixels)
        embed = self.language_model.embed_tokens
        embeddings = torch.cat([prompt, embed(tokens)], dim=1)
        hidden = self.language_model(
            inputs_embeds=embeddings, attention_mask=self.mask, position_ids=self.position, use_cache=False
        ).last_hidden_state
        return nn.functional.linear(hidden[:, self.prefix :], embed.weight)
