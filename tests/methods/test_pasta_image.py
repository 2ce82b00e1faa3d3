"""PASTA on the image of a vision-language model: random weights, so only the positions are at stake."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import attn_hooks
from attn_hooks import PASTA, EditError
from tests.models import SIZES, prompts

IMAGE_TOKEN, IMAGE_LENGTH = 60, 4


@pytest.fixture
def llava() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = LlamaConfig(**SIZES)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, vision_feature_layer=-1)
    return LlavaForConditionalGeneration(config).eval()


def prompt() -> dict[str, torch.Tensor]:
    """Two prompts, the second left-padded by 2; the image stands at 3 to 6 and at 1 to 4 of the real tokens."""
    ids = prompts(2, 12) % 47 + 3
    ids[:, 0] = 1
    ids[0, 3:7] = IMAGE_TOKEN
    ids[1, :2] = 0
    ids[1, 2] = 1
    ids[1, 3:7] = IMAGE_TOKEN
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    pixels = torch.linspace(-1, 1, 2 * 3 * 8 * 8).sin().reshape(2, 3, 8, 8)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


@torch.no_grad()
def test_the_image_is_found_in_a_padded_batch_and_in_decode(llava: LlavaForConditionalGeneration) -> None:
    settings = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    spans = (((3, 7),), ((1, 5),))
    with attn_hooks.editing(llava, PASTA(spans=spans, alpha=0.05)):
        expected = llava.generate(**prompt(), **settings).logits
    with attn_hooks.editing(llava, PASTA(spans="image", alpha=0.05)):
        found = llava.generate(**prompt(), **settings).logits
    assert len(found) == 5
    for step, logits in enumerate(found):
        assert torch.equal(logits, expected[step])


@torch.no_grad()
def test_a_prompt_without_an_image_is_left_as_it_is(llava: LlavaForConditionalGeneration) -> None:
    """Beside one with an image, in the prompt and in decode."""
    settings = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    inputs = prompt() | {"pixel_values": prompt()["pixel_values"][:1]}
    inputs["input_ids"][1, 3:7] = 5
    plain = llava.generate(**inputs, **settings).logits
    with attn_hooks.editing(llava, PASTA(spans="image", alpha=0.05)):
        found = llava.generate(**inputs, **settings).logits
    for step, logits in enumerate(found):
        torch.testing.assert_close(logits[1], plain[step][1])
        assert not torch.allclose(logits[0], plain[step][0])


def test_the_vision_tower_is_left_alone(llava: LlavaForConditionalGeneration) -> None:
    info = attn_hooks.inspect_model(llava)
    assert [layer.index for layer in info.layers] == list(range(5))
    assert info.image_token_id == IMAGE_TOKEN
    assert all("vision" in name for name in info.left_alone)
    assert info.left_alone


@torch.no_grad()
def test_a_prompt_without_an_image_is_refused(llava: LlavaForConditionalGeneration) -> None:
    attn_hooks.wrap(llava, PASTA(spans="image"))
    with pytest.raises(EditError, match="no-image-in-prompt"):
        llava(input_ids=torch.randint(3, 50, (1, 6)))
