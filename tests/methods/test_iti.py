"""iti against hooks on o_proj written by hand; its probes against logistic regression's own conditions and a known head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attn_hooks
from attn_hooks import ITI, AttnHooksError, LoFiT, Streaming, inspect_model, save_edits
from attn_hooks.probes import HeadOutputs, HeadProbes, fit_iti, logistic_regression, probe_heads
from tests.families import build_tiny, family, token_ids
from tests.hooks.tiny import EOS, HEAD_DIM, NUM_HEADS, NUM_LAYERS, generated, logits, padded_batch, prompt, tiny_llama

HEADS = ((0, 2), (2, 7), (2, 0))
DIRECTION = torch.nn.functional.normalize(torch.linspace(-1.0, 2.0, 24).view(3, HEAD_DIM), dim=-1)
SIGMA = torch.tensor([0.3, 0.1, 0.2])


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def iti(**options: Any) -> ITI:
    return ITI(**({"heads": HEADS, "direction": DIRECTION, "sigma": SIGMA} | options))


def by_hand(model: Any, rows: Tensor, alpha: float = 15.0, **inputs: Any) -> Tensor:
    """Logits of the tiny Llama with equation 2 on ``rows`` ``(B, N)`` of o_proj's input."""

    def at(index: int) -> Any:
        def before(_: Any, given: tuple[Tensor]) -> tuple[Tensor]:
            z = given[0].unflatten(-1, (NUM_HEADS, HEAD_DIM)).clone()
            for (layer, head), direction, sigma in zip(HEADS, DIRECTION, SIGMA, strict=True):
                if layer == index:
                    z[:, :, head] += rows[..., None] * alpha * sigma * direction
            return (z.flatten(-2),)

        return before

    handles = [
        layer.self_attn.o_proj.register_forward_pre_hook(at(index)) for index, layer in enumerate(model.model.layers)
    ]
    found = logits(model, **inputs)
    for handle in handles:
        handle.remove()
    return found


def refusal(code: str) -> Any:
    return pytest.raises(AttnHooksError, match=rf"\[{code}\]")


# The edit


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("alpha", [15.0, -2.0])
def test_of_a_prompt_the_last_row_is_shifted(side: str, alpha: float) -> None:
    batch = padded_batch(side)
    rows = torch.zeros(2, 12)
    rows[0, 11] = rows[1, 11 if side == "left" else 6] = 1
    expected = by_hand(tiny_llama(), rows, alpha, **batch)
    assert (expected - logits(tiny_llama(), **batch)).abs().max() > 0.1
    found = logits(attn_hooks.wrap(tiny_llama(), iti(alpha=alpha)), **batch)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-5, atol=1e-5)


def test_every_generated_row_is_shifted() -> None:
    tokens = prompt()
    found = generated(attn_hooks.wrap(tiny_llama(), iti()), input_ids=tokens)
    for _ in range(6):
        rows = (torch.arange(tokens.shape[1]) >= 11).float().expand(2, -1)
        following = by_hand(tiny_llama(), rows, input_ids=tokens)[:, -1]
        following[:, EOS] = -torch.inf  # six tokens are asked for
        tokens = torch.cat([tokens, following.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(found, tokens)
    assert not torch.equal(found, generated(tiny_llama()))


def test_given_answers_are_scored_as_they_are_generated() -> None:
    whole = prompt(length=18)
    batch = {"input_ids": whole, "attention_mask": torch.ones_like(whole)}
    rows = (torch.arange(18) >= 11).float().expand(2, -1)
    expected = by_hand(tiny_llama(), rows, **batch)
    model = attn_hooks.wrap(tiny_llama(), iti(prompt_length=12))
    torch.testing.assert_close(logits(model, **batch), expected, rtol=1e-5, atol=1e-5)
    stepped = attn_hooks.wrap(tiny_llama(), iti(prompt_length=12))
    first = stepped(whole[:, :9], use_cache=True)
    parts, cache = [first.logits], first.past_key_values
    for part in (whole[:, 9:14], whole[:, 14:15], whole[:, 15:]):
        out = stepped(part, past_key_values=cache)
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=1e-4)


def test_on_all_rows_it_is_an_offset() -> None:
    expected = logits(
        attn_hooks.wrap(tiny_llama(), LoFiT(heads=HEADS, offset=3.0 * SIGMA[:, None] * DIRECTION)),
        **padded_batch("left"),
    )
    found = logits(attn_hooks.wrap(tiny_llama(), iti(rows="all", alpha=3.0)), **padded_batch("left"))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_tokens_that_may_be_prompt_or_answer_are_refused() -> None:
    model = attn_hooks.wrap(tiny_llama(), iti())
    cache = model(prompt(), use_cache=True).past_key_values
    with refusal("phase"):
        model(prompt(length=4), past_key_values=cache)


def test_saved_and_loaded(tmp_path: Path) -> None:
    save_edits([iti(alpha=4.0), Streaming()], tmp_path / "iti")
    wrapped = attn_hooks.wrap(tiny_llama(), f"iti:{tmp_path / 'iti'}")
    assert attn_hooks.edits_in_force(wrapped) == (iti(alpha=4.0),)
    save_edits([Streaming()], tmp_path / "other")
    save_edits([iti(), iti(alpha=1.0)], tmp_path / "two")
    for name in ("other", "two", "missing"):
        with refusal("bad-saved-edits"):
            attn_hooks.wrap(tiny_llama(), f"iti:{tmp_path / name}")


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({"heads": ((0, 2), (0, 2), (1, 1))}, "bad-parameters"),
        ({"direction": DIRECTION[:2]}, "bad-parameters"),
        ({"sigma": SIGMA[:2]}, "bad-parameters"),
        ({"sigma": SIGMA[:, None]}, "bad-parameters"),
        ({"rows": "some"}, "bad-parameters"),
        ({"direction": DIRECTION[:, :4]}, "wrong-shape"),
        ({"heads": ((9, 2), (2, 7), (2, 0))}, "layer-out-of-range"),
        ({"heads": ((0, 8), (2, 7), (2, 0))}, "head-out-of-range"),
    ],
)
def test_what_does_not_fit_is_refused(changed: dict[str, Any], code: str) -> None:
    with refusal(code):
        attn_hooks.wrap(tiny_llama(), iti(**changed))


def test_gated_heads_are_refused() -> None:
    model = build_tiny(family("qwen3_next"))
    layer = inspect_model(model).layers[-1]
    shift = {"direction": torch.ones(1, layer.value_dim), "sigma": torch.ones(1)}
    with refusal("gated-heads"):
        attn_hooks.wrap(model, ITI(heads=((layer.index, 0),), **shift))


# Head outputs


@pytest.mark.parametrize("side", ["left", "right"])
def test_outputs_are_those_of_the_last_token(side: str) -> None:
    model = tiny_llama()
    seen = []
    handle = model.model.layers[2].self_attn.o_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    alone = prompt(1, 12)
    short = prompt(1, 7, seed=2)
    model(alone)
    model(short)
    handle.remove()
    expected = torch.cat([z[:, -1] for z in seen]).view(2, NUM_HEADS, HEAD_DIM)
    outputs = HeadOutputs.collect(model, [padded_batch(side), {"input_ids": alone}])
    assert (outputs.samples, outputs.layers) == (3, tuple(range(NUM_LAYERS)))
    torch.testing.assert_close(outputs.of_layer(2), expected[[0, 1, 0]], rtol=1e-4, atol=1e-4)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_layers_of_several_widths_and_half_precision() -> None:
    for name in ("gemma4_text", "laguna"):
        model = build_tiny(family(name)).bfloat16()
        layers = inspect_model(model).layers
        outputs = HeadOutputs.collect(model, [{"input_ids": token_ids(family(name), model)}])
        found = [tuple(outputs.of_layer(layer.index).shape[1:]) for layer in layers]
        assert found == [(layer.num_heads, layer.value_dim) for layer in layers]
        assert len(set(found)) > 1


def test_the_file_goes_with_its_object() -> None:
    outputs = HeadOutputs.collect(tiny_llama(), [{"input_ids": prompt()}])
    path = Path(outputs._folder.name)
    read = outputs.of_layer(0)
    assert path.exists()
    del outputs
    assert not path.exists()
    assert read.isfinite().all()


def test_texts_that_give_no_outputs_are_refused() -> None:
    model = tiny_llama()
    empty = {"input_ids": prompt(), "attention_mask": torch.tensor([[1] * 12, [0] * 12])}
    for batches in ([], [empty]):
        with refusal("bad-head-outputs"):
            HeadOutputs.collect(model, batches)
    with refusal("bad-head-outputs"):
        HeadOutputs.collect(tiny_llama().train(), [{"input_ids": prompt()}])
    model.model.layers[1].self_attn.v_proj.weight.data[0, 0] = float("nan")
    with refusal("bad-head-outputs"):
        HeadOutputs.collect(model, [{"input_ids": prompt()}])


# Probes


@pytest.mark.parametrize("size", [0.01, 1.0, 100.0])
def test_logistic_regression_is_at_its_minimum(size: float) -> None:
    """Where the gradient of the regularised loss is zero; it is convex. Head 1 tells the classes apart without error."""
    torch.manual_seed(0)
    z = size * torch.randn(60, 3, 5)
    truth = (z[:, 1, 0] > 0).long()
    with torch.enable_grad():
        weight, bias = (found.requires_grad_() for found in logistic_regression(z, truth))
        score = torch.einsum("nhd,hd->nh", z.double(), weight) + bias
        sign = (2 * truth - 1)[:, None]
        loss = torch.log1p(torch.exp(-sign * score)).sum() + (weight**2).sum() / 2
        gradients = torch.autograd.grad(loss, (weight, bias))
    for gradient in gradients:
        assert gradient.abs().max() < 1e-5
    assert ((score > 0) == truth[:, None].bool()).float().mean(0)[1] > 0.95


@pytest.fixture(scope="module")
def outputs() -> HeadOutputs:
    return HeadOutputs.collect(tiny_llama(), [{"input_ids": prompt(30, seed=seed)} for seed in range(8)])


def planted(outputs: HeadOutputs, layer: int, head: int) -> list[int]:
    """Labels that the output of one head decides."""
    z = outputs.of_layer(layer)[:, head]
    score = z @ torch.linspace(-1, 1, HEAD_DIM)
    return (score > score.median()).int().tolist()


@pytest.mark.parametrize(("layer", "head"), [(3, 5), (1, 2)])
def test_the_head_that_knows_is_found(outputs: HeadOutputs, layer: int, head: int) -> None:
    probes = probe_heads(outputs, planted(outputs, layer, head))
    assert probes.select(k=1) == [(layer, head)]
    ranked = probes.ranked()
    assert ranked[0][2] > 0.9 > ranked[1][2]
    assert len(probes.select(share=0.1)) == 3


def test_a_group_is_trained_on_or_held_out_as_a_whole(outputs: HeadOutputs) -> None:
    """Each text twice under random labels: seen in training, its copy is told by heart; held out as a whole, it is guessed."""
    batches = [{"input_ids": prompt(60, seed=1)}] * 2
    twice = HeadOutputs.collect(tiny_llama(), batches)
    labels = torch.randint(0, 2, (60,), generator=torch.Generator().manual_seed(0)).tolist() * 2
    alone = probe_heads(twice, labels)
    grouped = probe_heads(twice, labels, groups=list(range(60)) * 2)

    def mean(probes: HeadProbes) -> float:
        return torch.cat(list(probes.accuracy.values())).mean().item()

    assert mean(grouped) < 0.55 < 0.6 < mean(alone)


def test_equal_accuracies_keep_the_order_of_heads() -> None:
    probes = HeadProbes({0: torch.tensor([0.5, 0.9]), 1: torch.tensor([0.9, 0.7])})
    assert probes.select(k=3) == [(0, 1), (1, 0), (1, 1)]
    for wrong in ({}, {"k": 5}, {"k": 0}, {"share": 2.0}, {"k": 1, "share": 0.5}):
        with refusal("bad-parameters"):
            probes.select(**wrong)


def test_mass_mean_shift(outputs: HeadOutputs) -> None:
    labels = planted(outputs, 3, 5)
    others = HeadOutputs.collect(tiny_llama(), [{"input_ids": prompt(20, seed=50)}])
    edit = fit_iti(outputs, labels, [(3, 5), (0, 1)], alpha=4.0, spread=others)
    assert (edit.heads, edit.alpha) == (((3, 5), (0, 1)), 4.0)
    truth = torch.tensor(labels).bool()
    for (layer, head), direction, sigma in zip(edit.heads, edit.direction, edit.sigma, strict=True):
        z = outputs.of_layer(layer)[:, head]
        shift = z[truth].mean(0) - z[~truth].mean(0)
        torch.testing.assert_close(direction, shift / shift.norm(), rtol=1e-5, atol=1e-6)
        along = others.of_layer(layer)[:, head] @ direction
        torch.testing.assert_close(sigma, ((along - along.mean()) ** 2).mean().sqrt(), rtol=1e-4, atol=1e-6)
    same = fit_iti(outputs, labels, [(3, 5)])
    torch.testing.assert_close(same.direction, edit.direction[:1])
    assert not torch.allclose(same.sigma, edit.sigma[:1])
    assert same.alpha == 15.0


def test_the_shift_moves_outputs_to_the_true_side(outputs: HeadOutputs) -> None:
    """Measured again under the edit itself: the mean along theta rises by alpha sigma."""
    edit = fit_iti(outputs, planted(outputs, 3, 5), [(3, 5)], alpha=2.0)
    model = attn_hooks.wrap(tiny_llama(), edit)
    shifted = HeadOutputs.collect(model, [{"input_ids": prompt(30, seed=seed)} for seed in range(8)])
    moved = (shifted.of_layer(3)[:, 5] - outputs.of_layer(3)[:, 5]) @ edit.direction[0]
    torch.testing.assert_close(moved, (2.0 * edit.sigma[0]).expand_as(moved), rtol=1e-4, atol=1e-5)


def test_labels_that_do_not_fit_are_refused(outputs: HeadOutputs) -> None:
    fitting = planted(outputs, 3, 5)
    for labels in (fitting[:-1], [2, *fitting[1:]], [0] * len(fitting), [1] + [0] * (len(fitting) - 1)):
        with refusal("bad-head-outputs"):
            probe_heads(outputs, labels)
    with refusal("bad-head-outputs"):
        probe_heads(outputs, fitting, groups=[0])
    with refusal("bad-parameters"):
        probe_heads(outputs, fitting, validation=1.0)
    for labels, heads in (
        (fitting[:-1], [(0, 0)]),
        ([0] * len(fitting), [(0, 0)]),
        (fitting, [(9, 0)]),
        (fitting, [(0, 8)]),
    ):
        with refusal("bad-head-outputs"):
            fit_iti(outputs, labels, heads)
