"""Recall of sparse methods in a whole model against the weights that eager attention hands out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attn_hooks
from attn_hooks import AttnHooksError, Edit, PowerAttention, SinkScale, Streaming, XAttention
from attn_hooks.recall import recall_of
from attn_kernels import SinkAndWindow
from attn_kernels.patterns import Pattern, PowerOfTwoBlocks
from tests.models import FAMILIES, left_padded, llama, prompts

LENGTHS = (40, 29, 17)


def weights_of(model: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    model.set_attn_implementation("eager")
    attentions: list[torch.Tensor] = list(model(**inputs, output_attentions=True).attentions)
    return attentions


def kept(weights: torch.Tensor, pattern: Pattern, mask: torch.Tensor) -> list[float]:
    """By loops: mean over the real rows of all samples of the share on the keys that the pattern shows, for each head."""
    found = []
    for head in range(weights.shape[1]):
        rows = []
        for sample, real in enumerate(mask.bool()):
            first = int(real.long().argmax())
            for row in range(first, weights.shape[2]):
                shown = [
                    key
                    for key in range(first, row + 1)
                    if bool(pattern.visible(torch.tensor(row - first), torch.tensor(key - first)))
                ]
                weight = weights[sample, head, row]
                rows.append(float(weight[shown].sum() / weight[first : row + 1].sum()))
        found.append(sum(rows) / len(rows))
    return found


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_recall_is_that_of_eager_weights(family: str) -> None:
    """Padded samples; grouped heads, windows, softcap, learned sinks; all edits in one forward, the model untouched."""
    ids, mask = left_padded(LENGTHS)
    inputs = {"input_ids": ids, "attention_mask": mask}
    # Eager attention's padded rows are NaN in float64.
    model = FAMILIES[family]().float()
    before = model(**inputs).logits
    patterns: list[tuple[Edit, Pattern]] = [
        (Streaming(sinks=1, window=5), SinkAndWindow(1, 5)),
        (PowerAttention(block=2, window_blocks=1), PowerOfTwoBlocks(2, 1, 1)),
    ]
    measured = recall_of(model, [edit for edit, _ in patterns], rows=1000, **inputs)
    assert attn_hooks.edits_in_force(model) == ()
    assert torch.equal(model(**inputs).logits.nan_to_num(), before.nan_to_num())
    assert (measured.tokens, measured.rows) == (sum(LENGTHS), max(LENGTHS))
    assert measured.edits == tuple(edit for edit, _ in patterns)
    weights = weights_of(model, inputs)
    for number, (_, pattern) in enumerate(patterns):
        for layer, recall in measured.by_edit[number].items():
            heads = [head.recall for head in recall.by_head()]
            assert heads == pytest.approx(kept(weights[layer], pattern, mask), abs=1e-4), (number, layer)


@torch.no_grad()
def test_a_method_that_chooses_is_asked_in_every_layer() -> None:
    ids = prompts(2, 96)
    model = llama()
    edits = [XAttention(stride=4, block=8, threshold=threshold) for threshold in (0.0, 0.5, 0.95, 1.0)]
    measured = recall_of(model, edits, input_ids=ids)
    totals = [measured.of(number).total() for number in range(4)]
    assert totals == sorted(totals, key=lambda total: total.density)
    assert totals[0].recall < totals[1].recall < totals[2].recall
    assert (totals[3].recall, totals[3].density, totals[3].recall_p5) == (1.0, 1.0, 1.0)
    # The others' share of a block that holds the diagonal and the first keys.
    assert totals[0].density < 0.35
    for layer, recall in measured.by_edit[1].items():
        with attn_hooks.editing(model, XAttention(stride=4, block=8, threshold=0.5, layers=(layer,))):
            model(input_ids=ids)
            moved = attn_hooks.report(model).to_dict()["edits"][0]["mass_moved"]
        # The report measures the last 16 rows.
        assert moved == pytest.approx(1 - float(recall.recall[:, :, -16:].mean()), abs=1e-4), layer


@torch.no_grad()
def test_heads_and_layers_that_a_method_leaves_alone_keep_everything() -> None:
    model = llama()
    edits = [Streaming(sinks=0, window=2, heads=((1, 0), (1, 3))), PowerAttention(block=1, dense_layers=(0, 2, 3, 4))]
    of_heads, of_layers = recall_of(model, edits, input_ids=prompts(1, 30)).by_edit
    assert [head.recall == 1.0 for head in of_heads[1].by_head()] == [False, True, True, False]
    assert [of_heads[layer].total().density for layer in (0, 2, 3, 4)] == [1.0] * 4
    assert [of_layers[layer].total().recall == 1.0 for layer in range(5)] == [True, False, True, True, True]


@torch.no_grad()
def test_the_edits_in_force_count_on_both_sides() -> None:
    model, ids = llama(), prompts(1, 30)
    edit = Streaming(sinks=1, window=4)
    before = recall_of(model, [edit], input_ids=ids).of(0).total()
    with attn_hooks.editing(model, SinkScale(scale=0.01)):
        after = recall_of(model, [edit], input_ids=ids).of(0).total()
        assert len(attn_hooks.edits_in_force(model)) == 1
    assert after.density == before.density
    # The sink, which a window keeps, weighs less.
    assert after.recall < before.recall


def test_rows_are_spread_from_the_first_to_the_last() -> None:
    model, ids = llama(), prompts(1, 60)
    every = recall_of(model, [Streaming(window=4)], rows=60, input_ids=ids)
    some = recall_of(model, ["streaming"], rows=4, input_ids=ids)
    assert some.rows == 4
    assert some.by_edit[0][0].visible[0, 0].tolist() == [1, 21, 40, 60]
    assert every.by_edit[0][0].recall.shape == (1, 4, 60)


def test_a_method_that_chooses_no_keys_is_refused() -> None:
    with pytest.raises(AttnHooksError, match="no-pattern"):
        recall_of(llama(), [SinkScale()], input_ids=prompts())
    with pytest.raises(AttnHooksError, match="layer-out-of-range"):
        recall_of(llama(), [Streaming(layers=(7,))], input_ids=prompts())
