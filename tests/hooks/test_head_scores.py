"""Image masses of heads against the weights that eager attention hands out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attn_hooks
from attn_hooks import PASTA, AttnHooksError
from attn_hooks.head_scores import score_heads
from attn_hooks.model_info import MARKS_OF_IMAGE
from tests.hooks import vlms
from tests.models import gemma2, left_padded, llama, prompts

FAMILIES = sorted(set(vlms.CASES) - {"paligemma"})


def expected(weights: torch.Tensor, kinds: torch.Tensor) -> dict[str, list[float]]:
    """By loops, from the weights ``(B, H, N, N)`` of one layer."""
    last: list[list[float]] = []
    text: list[list[float]] = []
    for row, held in enumerate(kinds.tolist()):
        image = [j for j, kind in enumerate(held) if kind >= 16]
        if not image:
            continue
        reach = [[j for j in image if held[j] == kind] for kind in set(held) if kind >= 16]
        behind = [
            i
            for i, kind in enumerate(held)
            if kind and any(i > max(places) for places in reach) and not any(min(p) <= i <= max(p) for p in reach)
        ]
        masses = weights[row, :, :, image].sum(-1)  # (H, N)
        real = max(j for j, kind in enumerate(held) if kind)
        last.append(masses[:, real].tolist())
        text.append(masses[:, behind].mean(-1).tolist())
    return {
        "image_mass": torch.tensor(last).mean(0).tolist(),
        "image_mass_of_text": torch.tensor(text).mean(0).tolist(),
    }


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_masses_are_those_of_eager_weights(family: str, side: str) -> None:
    """A padded batch with several images, none and one."""
    case = vlms.CASES[family]
    model, inputs = case.model(), case.inputs(side)
    before = model(**inputs).logits
    scores = score_heads(model, **inputs)
    assert torch.equal(model(**inputs).logits, before)
    kinds = case.kinds(side)
    assert scores.image_tokens == int((kinds >= 16).sum())
    assert scores.tokens == int((kinds[[0, 2]] != 0).sum())
    model.set_attn_implementation("eager")
    output = model(**inputs, output_attentions=True, return_dict=True)
    attentions = getattr(output, "language_model_outputs", output).attentions
    for place in range(len(scores.layers)):
        for name, heads in expected(attentions[place], kinds).items():
            torch.testing.assert_close(scores.by_measure[name][place], torch.tensor(heads), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_edits_in_force_count() -> None:
    model: Any = vlms.CASES["llava"].model()
    inputs = vlms.CASES["llava"].inputs()
    before = score_heads(model, **inputs).by_measure
    with attn_hooks.editing(model, PASTA(spans="image", alpha=0.01)):
        after = score_heads(model, **inputs).by_measure
        assert len(attn_hooks.edits_in_force(model)) == 1
    assert all((after[name] > before[name]).all() for name in ("image_mass", "image_mass_of_text"))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl"])
@torch.no_grad()
def test_divergence_is_that_of_two_forwards(family: str) -> None:
    case = vlms.CASES[family]
    model: Any = case.model()
    marks = {getattr(model.config, name, None) for name in MARKS_OF_IMAGE}
    text = vlms.batch_of([[token for token in row if token[1] is None and token[0] not in marks] for row in case.rows])
    heads: list[torch.Tensor] = []
    layers = attn_hooks.inspect_model(model).layers
    handles = [
        layer.module.o_proj.register_forward_pre_hook(
            lambda _module, args: heads.append(args[0][:, -1].unflatten(-1, (4, -1)))
        )
        for layer in layers
    ]
    model(**case.inputs())
    model(**text)
    for handle in handles:
        handle.remove()
    found = score_heads(model, **case.inputs()).by_measure["vhd"]
    for place in range(len(layers)):
        distance = (heads[place] - heads[len(layers) + place]).norm(dim=-1)
        torch.testing.assert_close(found[place], distance[[0, 2]].mean(0), rtol=1e-4, atol=1e-5)


def test_a_measure_that_cannot_be_had_says_why() -> None:
    scores = score_heads(vlms.CASES["gemma3"].model(), **vlms.CASES["gemma3"].inputs())
    assert "vhd" not in scores.by_measure
    assert "Gemma3" in scores.missing["vhd"]


def test_heads_are_ranked() -> None:
    ids, mask = left_padded(image=True)
    scores = score_heads(gemma2(), input_ids=ids, attention_mask=mask)
    ranked = scores.ranked("image_mass")
    assert len(ranked) == 5 * 4
    assert [score for *_, score in ranked] == sorted(scores.by_measure["image_mass"].flatten().tolist(), reverse=True)
    layer, head, score = ranked[0]
    assert float(scores.by_measure["image_mass"][layer, head]) == score


def test_a_model_or_prompt_without_images_is_refused() -> None:
    with pytest.raises(AttnHooksError, match="needs-image"):
        score_heads(llama(image_token_id=None), input_ids=prompts())
    with pytest.raises(AttnHooksError, match="no-image-in-prompt"):
        score_heads(llama(), input_ids=prompts())
