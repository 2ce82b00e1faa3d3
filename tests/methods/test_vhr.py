"""VHR, held to two independent forwards and a slow reading of its equations, layer after layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import attn_hooks
from attn_hooks.errors import AttnHooksError
from attn_hooks.methods.vhr import VHR, median, vision_aware_head_divergence
from attn_hooks.model_info import MARKS_OF_IMAGE
from tests.hooks import vlms

FAMILIES = sorted(set(vlms.CASES) - {"paligemma", "gemma3", "blip-2", "instructblip"})
LAYERS, NEW = (0, 1), 4


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@contextmanager
def scaled(
    model: Any, gains: dict[int, Tensor], first_row: int, seen: dict[int, Tensor], asked: Set[int] = frozenset()
) -> Iterator[None]:
    """Heads times their gain ``(B, H)`` in rows from ``first_row`` on without ``asked``; ``seen`` gets each layer's heads before
    that."""
    with ExitStack() as stack:
        for layer in attn_hooks.inspect_model(model).layers:

            def hook(_module: Any, args: tuple[Tensor], layer: Any = layer) -> tuple[Tensor]:
                heads = args[0].unflatten(-1, (layer.num_heads, -1)).clone()
                seen[layer.index] = heads.clone()
                if layer.index in gains:
                    rows = sorted(set(range(first_row, heads.shape[1])) - asked)
                    heads[:, rows] *= gains[layer.index][:, None, :, None]
                return (heads.flatten(-2),)

            handle = layer.module.o_proj.register_forward_pre_hook(hook)
            stack.callback(handle.remove)
        yield


def literal_gain(z: Tensor, z0: Tensor, alpha: float, outlier: float | None) -> list[float]:
    """For one sample, ``(H, Dv)`` each, head by head."""
    scores = [float((z[h] - z0[h]).norm()) for h in range(len(z))]
    mean = sum(scores) / len(scores)
    spread = (sum((score - mean) ** 2 for score in scores) / len(scores)) ** 0.5
    if outlier is not None:
        scores = [
            0.0 if score > mean + outlier * spread and float(z0[h].norm()) > float(z[h].norm()) else score
            for h, score in enumerate(scores)
        ]
    ordered = sorted(scores)
    middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    return [alpha if score > middle else 1.0 for score in scores]


def literal_vhr(case: vlms.Case, model: Any, edit: VHR) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
    """Greedy tokens, the last step's logits, and the gains."""
    inputs = case.inputs()
    marks = {getattr(model.config, name, None) for name in MARKS_OF_IMAGE}
    text = vlms.batch_of([[token for token in row if token[1] is None and token[0] not in marks] for row in case.rows])
    has_image = [any(number is not None for _, number in row) for row in case.rows]
    last = inputs["input_ids"].shape[1] - 1
    gains: dict[int, Tensor] = {}
    for layer in LAYERS:
        with_image: dict[int, Tensor] = {}
        without: dict[int, Tensor] = {}
        with scaled(model, gains, last, with_image):
            model(**inputs, use_cache=False)
        with scaled(model, gains, text["input_ids"].shape[1] - 1, without):
            model(**text, use_cache=False)
        gains[layer] = torch.tensor(
            [
                literal_gain(with_image[layer][row, -1], without[layer][row, -1], edit.alpha, edit.outlier)
                if has_image[row]
                else [1.0] * with_image[layer].shape[2]
                for row in range(len(has_image))
            ]
        )
    tokens = inputs["input_ids"][:, :0]
    for _ in range(NEW):
        given = dict(inputs)
        given["input_ids"] = torch.cat([inputs["input_ids"], tokens], 1)
        given["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(tokens)], 1)
        if "mm_token_type_ids" in inputs:
            given["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(tokens)], 1)
        with scaled(model, gains, last, {}):
            logits = model(**given, use_cache=False).logits[:, -1]
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
    return tokens, logits, gains


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_two_forwards_layer_after_layer(family: str) -> None:
    """Three prompts, padded: two images or more, none, one; prompt and decode."""
    case, edit = vlms.CASES[family], VHR(layers=LAYERS, alpha=3.0, outlier=0.5)
    model = case.model()
    before = model(**case.inputs()).logits
    tokens, logits, gains = literal_vhr(case, model, edit)
    assert all((gain[[0, 2]] > 1).any() and (gain[1] == 1).all() for gain in gains.values())
    with attn_hooks.editing(model, edit):
        found = model.generate(
            **case.inputs(),
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    assert torch.equal(found.sequences[:, -NEW:], tokens)
    torch.testing.assert_close(found.logits[-1], logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(model(**case.inputs()).logits, before)


def test_a_layer_s_choice_reaches_the_next() -> None:
    """Scored in one go, without the reinforcement below, the second layer would choose by other numbers."""
    case = vlms.CASES["llava"]
    model = case.model()
    _, _, gains = literal_vhr(case, model, VHR(layers=LAYERS, alpha=3.0))
    divergences = []
    for below in ({}, {0: gains[0]}):
        seen: dict[int, Tensor] = {}
        with scaled(model, below, case.inputs()["input_ids"].shape[1] - 1, seen):
            model(**case.inputs(), use_cache=False)
        divergences.append(seen[1][:, -1])
    assert not torch.allclose(*divergences)


def test_at_most_half_of_the_heads_and_none_among_equals() -> None:
    scores = torch.rand(5, 7, generator=torch.Generator().manual_seed(1))
    assert ((scores > median(scores)).sum(1) == 3).all()
    assert ((scores[:, :6] > median(scores[:, :6])).sum(1) == 3).all()
    assert not (torch.zeros(1, 4) > median(torch.zeros(1, 4))).any()


def test_heads_that_surge_without_the_image_are_left_out() -> None:
    with_image, without = torch.ones(1, 4, 2), torch.ones(1, 4, 2)
    without[0, 1] = 9.0
    with_image[0, 2] = 3.0
    kept = vision_aware_head_divergence(with_image, without, 1.0)
    assert kept[0].tolist() == pytest.approx([0.0, 0.0, 8**0.5, 0.0])
    assert vision_aware_head_divergence(with_image, without, None)[0, 1] > 10


@pytest.mark.parametrize("rows", ["generated", "text", "all"])
def test_alpha_1_changes_nothing(rows: Any) -> None:
    case = vlms.CASES["llava"]
    model = case.model()
    before = model(**case.inputs()).logits
    with attn_hooks.editing(model, VHR(alpha=1.0, rows=rows)):
        real = case.inputs()["attention_mask"].bool()
        assert torch.equal(model(**case.inputs()).logits[real], before[real])


def test_rows_are_those_asked_for() -> None:
    case = vlms.CASES["llava"]
    model, inputs = case.model(), case.inputs()
    before, changed = model(**inputs).logits, {}
    for rows in ("generated", "text", "all"):
        with attn_hooks.editing(model, VHR(rows=rows, layers=LAYERS)):
            different = (model(**inputs).logits[2] - before[2]).abs().amax(-1) > 1e-6
        changed[rows] = different.nonzero().squeeze(-1).tolist()
    real = inputs["attention_mask"][2].nonzero().squeeze(-1).tolist()
    text_after = [place for place in real if place > real[0] + 2 + vlms.SQUARE]
    assert changed["generated"] == real[-1:]
    assert changed["text"] == text_after
    assert changed["all"] == real


def test_beams_streams_and_other_methods_go_with_it() -> None:
    """The second stream of another method sees reinforced heads, too, and each prompt's beams its own."""
    case = vlms.CASES["llava"]
    model, inputs = case.model(), case.inputs()
    with attn_hooks.editing(model, VHR(layers=LAYERS)):
        greedy = model.generate(**inputs, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
        beams = model.generate(**inputs, max_new_tokens=NEW, min_new_tokens=NEW, num_beams=2, do_sample=False)
        assert beams.shape == greedy.shape
    spin = attn_hooks.SPIN(r=0.5, layers=LAYERS)
    with attn_hooks.editing(model, VHR(layers=LAYERS), spin, attn_hooks.VCD(beta=0.0)):
        together = model.generate(**inputs, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    assert together.shape == greedy.shape


@pytest.mark.parametrize("edit", [attn_hooks.AGLA(beta=0.1, keep=0.5), attn_hooks.DAMRO(beta=0.0, tokens=3)], ids=str)
def test_what_other_methods_read_of_the_prompt_is_still_there(edit: Any) -> None:
    """With companions that change nothing the second stream of another method is what it is without them."""
    case = vlms.CASES["llava"]
    model, given = case.model(), {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    with attn_hooks.editing(model, edit):
        alone = model.generate(**case.inputs(), **given, output_logits=True, return_dict_in_generate=True)
    with attn_hooks.editing(model, VHR(alpha=1.0, layers=LAYERS), edit):
        found = model.generate(**case.inputs(), **given, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(found.sequences, alone.sequences)
    torch.testing.assert_close(found.logits, alone.logits, rtol=1e-4, atol=1e-5)


def refused(code: str, action: Callable[[], Any]) -> None:
    with pytest.raises(AttnHooksError) as refusal:
        action()
    assert refusal.value.code == code


def test_what_it_cannot_do_is_refused() -> None:
    case = vlms.CASES["llava"]
    model, inputs = case.model(), case.inputs()
    text_config = model.config.get_text_config()
    with attn_hooks.editing(model, VHR()):
        static = StaticCache(config=text_config, max_cache_len=64)
        refused("no-companions", lambda: model(**inputs, past_key_values=static))
        refused("phase", lambda: model(**case.inputs("right")))
        model(**inputs)
    refused(
        "no-companions", lambda: attn_hooks.wrap(vlms.CASES["gemma3"].model(), VHR())(**vlms.CASES["gemma3"].inputs())
    )
    cache = DynamicCache(config=text_config)
    model(**inputs, past_key_values=cache)
    with attn_hooks.editing(model, VHR()):
        refused("phase", lambda: model(input_ids=torch.full((3, 1), 5), past_key_values=cache))
        model(**inputs)
