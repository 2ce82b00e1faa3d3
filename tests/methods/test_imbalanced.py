"""The imbalanced attention fix against its sheet, on a tiny LLaVA: streams by the tower's eager weights, logits by loops."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import attn_hooks
from attn_hooks import VHR, EditError, Imbalanced
from tests.hooks import snapshot, vlms
from tests.literal import Literal, literal_attention

PIXELS, PATCH = 32, 4
PATCHES = (PIXELS // PATCH) ** 2
IMAGE_PIXELS = torch.rand(3, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def llava(**vision: Any) -> Any:
    """Three layers of the tower, so that the first is not the second to last; their attention far from uniform."""
    tower = vlms.CLIP | {"image_size": PIXELS, "num_hidden_layers": 3} | vision
    text = vlms.LLAMA | {"num_hidden_layers": 4}
    case = vlms.Case("llava", vlms.LLAVA | {"text_config": text, "vision_config": tower}, [], dict, {})
    model = case.model().double()
    for name, parameter in model.named_parameters():
        if "q_proj.weight" in name or "k_proj.weight" in name:
            parameter.data *= 12 if "vision" in name else 4
    return model


def batch(more: int = 0) -> dict[str, Any]:
    """Left-padded prompts with two images, none and one."""
    rows = [
        vlms.BEGIN + vlms.text(3) + vlms.image(PATCHES, 0) + vlms.text(2) + vlms.image(PATCHES, 1) + vlms.text(4),
        vlms.BEGIN + vlms.text(6),
        vlms.BEGIN + vlms.text(2) + vlms.image(PATCHES, 0) + vlms.text(3),
    ]
    inputs = vlms.batch_of(rows) | {"pixel_values": IMAGE_PIXELS.double()}
    if more:
        ids = torch.randint(3, 60, (3, more), generator=torch.Generator().manual_seed(1))
        inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], 1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(ids)], 1)
    return inputs


def literal_streams(model: Any, ids: Tensor, ratio: float) -> tuple[list[set[int]], list[set[int]]]:
    """By row, the key positions of T and B, from the weights that the tower gives when it runs in eager."""
    tower = model.model.vision_tower
    before = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    attentions = tower(IMAGE_PIXELS.double(), output_attentions=True).attentions
    tower.set_attn_implementation(before)
    local: list[set[int]] = [set(), set(), set()]
    summary: list[set[int]] = [set(), set(), set()]
    number = 0
    for row, held in enumerate(ids.tolist()):
        places = [j for j, token in enumerate(held) if token == vlms.IMAGE]
        for start in range(0, len(places), PATCHES):
            patches = places[start : start + PATCHES]
            early, late = (attentions[place][number, :, 0, 1:].sum(0).numpy() for place in (0, -2))
            lower, upper = np.percentile(late, [25, 75])
            outliers = {patches[p] for p in range(PATCHES) if late[p] > upper + 1.5 * (upper - lower)}
            best = sorted(range(PATCHES), key=lambda p: -early[p])[: int(ratio * PATCHES)]
            summary[row] |= outliers
            local[row] |= {patches[p] for p in best} - outliers
            number += 1
    return local, summary


def literal_imbalanced(
    edit: Imbalanced,
    local: list[set[int]],
    summary: list[set[int]],
    last: int,
    first_real: list[int],
    asked: Set[int] = frozenset(),
) -> Literal:
    """``last``: the place of the prompts' last token; ``asked``: rows after it that answer nothing."""
    images = [a | b for a, b in zip(local, summary, strict=True)]

    def logits(s: Tensor, layer: int) -> Tensor:
        edited = s.clone()
        for b in range(len(s)):
            factors = [1.0] * s.shape[1]
            if edit.head_modulation == "image_mass":
                weights = s[b, :, last, first_real[b] : last + 1].softmax(-1)
                places = [j - first_real[b] for j in sorted(all_images[b])]
                mass = weights[:, places].sum(-1)
                factors = (mass / mass.mean().clamp(min=1e-9)).tolist()
            for h in range(s.shape[1]):
                if layer < 2 or (edit.heads is not None and (layer, h) not in edit.heads):
                    continue
                for i in sorted(set(range(last, s.shape[2])) - asked):
                    for j in images[b]:
                        gain = factors[h] * (edit.alpha if j in local[b] else edit.beta)
                        score = float(s[b, h, i, j])
                        edited[b, h, i, j] = score + (gain * abs(score) if edit.form == "abs" else gain)
        return edited

    all_images: list[set[int]] = [set(), set(), set()]
    ids = batch()["input_ids"].tolist()
    for row, held in enumerate(ids):
        all_images[row] = {j for j, token in enumerate(held) if token == vlms.IMAGE}
    return Literal(logits=logits)


@pytest.mark.parametrize(
    "edit",
    [
        Imbalanced(gamma=1.0),
        Imbalanced(gamma=1.0, alpha=0.3, beta=1.0, ratio=0.1, form="add"),
        Imbalanced(gamma=1.0, alpha=0.9, heads=((2, 1), (3, 2))),
        Imbalanced(gamma=1.0, head_modulation="image_mass"),
    ],
    ids=str,
)
def test_prefill_and_decode_are_the_sheet(edit: Imbalanced) -> None:
    model, more = llava(), 3
    inputs = batch(more)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    prompt = ids.shape[1] - more
    local, summary = literal_streams(model, ids[:, :prompt], edit.ratio)
    assert len(local[0]) > len(summary[0]) > 0
    assert not local[0] & summary[0]
    first_real = [int(row.argmax()) for row in mask]
    literal = literal_imbalanced(edit, local, summary, prompt - 1, first_real)
    with literal_attention(model.model.language_model, literal):
        expected = model(**inputs, position_ids=positions).logits
    with attn_hooks.editing(model, edit):
        cache, parts, start = DynamicCache(config=model.config.text_config), [], 0
        for stop in range(prompt, prompt + more + 1):
            at = slice(start, stop)
            given = {"attention_mask": mask[:, :stop], "position_ids": positions[:, at], "past_key_values": cache}
            pixels = {} if start else {"pixel_values": inputs["pixel_values"]}
            parts.append(model(input_ids=ids[:, at], **given, **pixels).logits)
            start = stop
    real = mask.bool()
    torch.testing.assert_close(torch.cat(parts, 1)[real], expected[real], rtol=1e-8, atol=1e-8)


def test_zero_gains_are_the_identity_and_nothing_is_left_behind() -> None:
    model, inputs = llava(), batch()
    plain = model(**inputs).logits
    before = snapshot.take(model)
    with attn_hooks.editing(model, Imbalanced(gamma=1.0, alpha=0.0, beta=0.0)):
        torch.testing.assert_close(model(**inputs).logits, plain, rtol=1e-9, atol=1e-9)
    with attn_hooks.editing(model, Imbalanced(gamma=1.0)):
        assert (model(**inputs).logits - plain).abs().max() > 1e-6
    assert snapshot.changes(before, model) == []
    assert torch.equal(model(**inputs).logits, plain)


def test_beams_of_prompts_with_images_are_those_of_each_alone() -> None:
    """The tower runs once for a prompt, whatever its beams."""
    model, inputs = attn_hooks.wrap(llava(), Imbalanced(gamma=1.0, alpha=1.5)), batch()
    settings = {"num_beams": 3, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    together = model.generate(**inputs, **settings)
    for row, pixels in ((0, slice(0, 2)), (2, slice(2, 3))):
        real = inputs["attention_mask"][row].bool()
        given = {"input_ids": inputs["input_ids"][row][real][None], "pixel_values": inputs["pixel_values"][pixels]}
        alone = model.generate(**given, attention_mask=torch.ones_like(given["input_ids"]), **settings)
        assert together[row, -4:].tolist() == alone[0, -4:].tolist()


def test_another_image_gives_other_streams() -> None:
    """What the tower showed for an earlier prompt does not stay."""
    model, inputs = llava(), batch()
    other = inputs | {"pixel_values": inputs["pixel_values"].flip(-1) ** 2}
    fresh = attn_hooks.wrap(llava(), Imbalanced(gamma=1.0))(**other).logits
    attn_hooks.wrap(model, Imbalanced(gamma=1.0))
    model(**inputs)
    assert torch.equal(model(**other).logits, fresh)


def test_a_later_turn_brings_its_own_image() -> None:
    """Given in two parts, each with its image and pixels, a prompt gives what it gives in one."""
    inputs = batch()
    ids, pixels = inputs["input_ids"][:1], inputs["pixel_values"][:2]
    cut = 1 + 3 + PATCHES + 2
    model = attn_hooks.wrap(llava(), Imbalanced(gamma=1.0, prompt_length=ids.shape[1]))
    whole = model(input_ids=ids, pixel_values=pixels).logits
    cache = DynamicCache(config=model.config.text_config)
    first = model(input_ids=ids[:, :cut], pixel_values=pixels[:1], past_key_values=cache).logits
    second = model(input_ids=ids[:, cut:], pixel_values=pixels[1:], past_key_values=cache).logits
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-8, atol=1e-8)


def test_decode_compiles_in_one_graph() -> None:
    model, inputs = attn_hooks.wrap(llava(), Imbalanced(gamma=1.0)), batch(2)
    ids, prompt = inputs["input_ids"][[0, 2]], inputs["input_ids"].shape[1] - 2
    mask = inputs["attention_mask"][[0, 2]]
    found = {}
    for name in ("eager", "compiled"):
        cache = StaticCache(config=model.config.text_config, max_cache_len=prompt + 8)
        model(
            input_ids=ids[:, :prompt],
            attention_mask=mask[:, :prompt],
            pixel_values=inputs["pixel_values"],
            past_key_values=cache,
        )
        step = torch.compile(model.forward, fullgraph=True, backend="eager") if name == "compiled" else model
        found[name] = [
            step(input_ids=ids[:, at : at + 1], attention_mask=mask[:, : at + 1], past_key_values=cache).logits
            for at in (prompt, prompt + 1)
        ]
    for eager, compiled in zip(found["eager"], found["compiled"], strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-8, atol=1e-8)


def test_the_class_token_may_be_among_the_image_tokens() -> None:
    case = vlms.CASES["llava, full features"]
    model, inputs = case.model(), case.inputs()
    with attn_hooks.editing(model, Imbalanced(gamma=1.0, layers=(0, 1), ratio=1.0)):
        after = model(**inputs).logits
    assert (after - model(**inputs).logits).abs().max() > 1e-6


def test_features_made_elsewhere_are_refused() -> None:
    model, inputs = attn_hooks.wrap(llava(), Imbalanced(gamma=1.0)), batch()
    model(**inputs)
    ids, mask = inputs["input_ids"][2:], inputs["attention_mask"][2:]
    features = model.get_image_features(pixel_values=inputs["pixel_values"][2:])
    model(input_ids=ids, attention_mask=mask, mm_encoder_outputs={"image": features})
    with pytest.raises(EditError, match="it ran 0 times for this forward") as refused:
        model(input_ids=ids, attention_mask=mask, mm_encoder_outputs={"image": features})
    assert refused.value.code == "no-class-attention"
    for images in (slice(0, 1), slice(2, 3)):
        model.get_image_features(pixel_values=inputs["pixel_values"][images])
    with pytest.raises(EditError, match="it ran 2 times"):
        model(input_ids=ids, attention_mask=mask, mm_encoder_outputs={"image": features})


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("llava with pixtral", "pixtral, is not CLIP's"),
        ("llava_next", "llava_next makes no one token of each patch"),
        ("llava_onevision", "siglip_vision_model, is not CLIP's"),
        ("qwen2_vl", "qwen2_vl_vision, is not CLIP's"),
        ("internvl", "internvl_vision, is not CLIP's"),
        ("instructblip", "instructblip_vision_model, is not CLIP's"),
    ],
)
def test_other_towers_are_refused_by_name(family: str, reason: str) -> None:
    with pytest.raises(EditError, match=reason):
        attn_hooks.wrap(vlms.CASES[family].model(), Imbalanced(gamma=1.0, layers=(0, 1)))


def test_modulation_in_parts_is_refused() -> None:
    with pytest.raises(EditError, match="leave prompt_length out"):
        Imbalanced(gamma=1.0, head_modulation="image_mass", prompt_length=9)


def test_companion_rows_of_another_method_leave_the_streams_as_they_are() -> None:
    """VHR runs the prompt's text below it in the same batch, and takes these rows away again before decode."""
    model, inputs = llava(), batch()
    real = inputs["attention_mask"][2].bool()
    ids = inputs["input_ids"][2][real][None]
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": inputs["pixel_values"][2:]}
    settings = {
        "max_new_tokens": 3,
        "min_new_tokens": 3,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    edit = Imbalanced(gamma=1.0, alpha=1.5)
    with attn_hooks.editing(model, edit):
        alone = model.generate(**given, **settings).logits
    with attn_hooks.editing(model, edit, VHR(alpha=1.0)):
        beside = model.generate(**given, **settings).logits
    for step, logits in enumerate(beside):
        torch.testing.assert_close(logits, alone[step], rtol=1e-8, atol=1e-8)
