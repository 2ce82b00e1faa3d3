"""measure_recall against recall, density and error computed literally from the specification's weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attn_kernels import (
    AttentionInputs,
    KeyTiles,
    LogitMap,
    Primitive,
    Recall,
    SinkAndWindow,
    Sparsity,
    edited_attention_reference,
    measure_recall,
)
from attn_kernels.edited_attention import blocked
from attn_kernels.edited_attention.reference import _allowed
from bench.structured import Part, Structure, structured_query_key
from tests.kernels.strategies import attention_inputs, primitives


def literal(inputs: AttentionInputs, sparsity: Sparsity, rows: list[int], edits: list[Primitive]) -> dict[str, Tensor]:
    """By loops over samples, heads and rows, in float64."""
    dense_output, weights = edited_attention_reference(inputs, edits)
    sparse_output, _ = edited_attention_reference(inputs, [*edits, sparsity])
    shape = (*weights.shape[:2], len(rows))
    found = {
        name: torch.zeros(shape, dtype=torch.float64) for name in ("recall", "visited", "visible", "error", "norm")
    }
    for b in range(shape[0]):
        for h in range(shape[1]):
            for place, i in enumerate(rows):
                at = (b, h, place)
                visible, visited = (_allowed(inputs, some, b, h, i) for some in (edits, [*edits, sparsity]))
                total = weights[b, h, i][visible].sum()
                real = bool(inputs.query_valid[b % len(inputs.query_valid), i]) and bool(visible.any())
                found["recall"][at] = weights[b, h, i][visited].sum() / total if real and total > 0 else torch.nan
                if real:
                    found["visited"][at], found["visible"][at] = visited.sum(), visible.sum()
                    found["error"][at] = (sparse_output[b, h, i] - dense_output[b, h, i]).norm()
                    found["norm"][at] = dense_output[b, h, i].norm()
    return found


def check(measured: Recall, expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(
            getattr(measured, name).double(),
            value,
            rtol=1e-4,
            atol=1e-5,
            equal_nan=True,
            msg=name,
        )


@given(st.data())
def test_it_is_the_literal_computation(data: st.DataObject) -> None:
    """Grouped heads, padding on both sides, more keys than queries, masks, biases, windows, softcap, learned sinks."""
    inputs = data.draw(attention_inputs())
    sparsity: Any = data.draw(primitives(inputs, (Sparsity,)))
    rows = data.draw(st.lists(st.integers(0, inputs.num_queries - 1), min_size=1, max_size=4, unique=True))
    edits: list[Primitive] = [data.draw(primitives(inputs, (LogitMap,)))] if data.draw(st.booleans()) else []
    check(measure_recall(inputs, sparsity, torch.tensor(rows), edits), literal(inputs, sparsity, rows, edits))


def padded_call(past: int = 5) -> AttentionInputs:
    """Two samples, the second with 9 keys of padding; 4 heads on 2, 40 queries after ``past`` keys."""
    num_keys = 40 + past
    index = torch.arange(num_keys)
    first = torch.tensor([[0], [9]])
    return AttentionInputs(
        3 * torch.randn(2, 4, 40, 8),
        torch.randn(2, 2, num_keys, 8),
        torch.randn(2, 2, num_keys, 8),
        8**-0.5,
        index[past:],
        index,
        index[past:] - first,
        index - first,
        index >= first,
    )


@pytest.mark.parametrize("past", [0, 5])
@pytest.mark.parametrize("rows_at_once", [1, 3, 128])
def test_key_tiles_in_blocks_of_rows(past: int, rows_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = padded_call(past)
    chosen = torch.rand(2, 4, 5, 6) < 0.5
    tiles = KeyTiles(chosen, 8, 8)
    expected = literal(inputs, Sparsity(tiles), list(range(40)), [])
    monkeypatch.setattr(blocked, "ROWS_PER_BLOCK", rows_at_once)
    measured = measure_recall(inputs, tiles)
    check(measured, expected)
    of_heads = Sparsity(tiles, heads=torch.tensor([True, False, True, False]))
    measured = measure_recall(inputs, of_heads)
    check(measured, literal(inputs, of_heads, list(range(40)), []))
    assert (measured.recall[0, 1] == 1).all()
    assert measured.by_head()[3].density == 1.0


def test_totals_count_rows_for_recall_and_pairs_for_density() -> None:
    inputs = padded_call(0)
    measured = measure_recall(inputs, SinkAndWindow(1, 6))
    recall = torch.cat([measured.recall[0].flatten(), measured.recall[1, :, 9:].flatten()])
    assert measured.recall[1, :, :9].isnan().all()
    total = measured.total()
    assert total.recall == pytest.approx(float(recall.mean()))
    assert total.recall_p5 == float(recall.sort().values[int(0.05 * (len(recall) - 1))])
    pairs = [(min(i + 1, 7), i + 1) for length in (40, 31) for i in range(length)]
    assert total.density == sum(visited for visited, _ in pairs) / sum(visible for _, visible in pairs)
    assert total.output_error == pytest.approx(
        float(measured.error.square().sum().sqrt() / measured.norm.square().sum().sqrt())
    )
    heads = measured.by_head()
    assert sum(head.recall for head in heads) / 4 == pytest.approx(total.recall)
    joined = Recall.joined([measured.of(2), measured.of(0)])
    assert joined.by_head() == [heads[2], heads[0]]


def test_extremes() -> None:
    inputs = padded_call()
    everything = measure_recall(inputs, SinkAndWindow(0, 100)).total()
    assert (everything.recall, everything.recall_p5, everything.density) == (1.0, 1.0, 1.0)
    assert everything.output_error < 1e-6
    nothing = measure_recall(inputs, KeyTiles(torch.zeros(1, 1, 5, 6, dtype=torch.bool), 8, 8)).total()
    assert (nothing.recall, nothing.density) == (0.0, 0.0)
    assert nothing.output_error == pytest.approx(1.0)
    of_padding = measure_recall(inputs, SinkAndWindow(0, 100), torch.arange(4)).of(0)
    assert of_padding.recall[1].isnan().all()


def test_it_finds_what_structured_heads_need() -> None:
    """Sinks and the band are all that a streaming head asks for, and miss a slash, verticals and a needle."""
    made = structured_query_key(2048, heads=8, kv_heads=2, head_dim=64, structure=Structure(needle_share=0.8))
    rows = torch.arange(1100, 2048, 7)
    of_head = measure_recall(made.inputs, SinkAndWindow(4, made.structure.local or 0), rows).by_head()
    for head, found in enumerate(of_head):
        mix = made.mix(head)
        assert found.recall == pytest.approx(mix.sink + mix.local, abs=0.08), head
        assert found.density < 0.1
    needle = made.needles[0]
    last = measure_recall(made.inputs, SinkAndWindow(4, made.structure.local or 0), torch.tensor([2047]))
    assert float(last.recall[0, needle.head, 0]) < 0.25
    tiles = torch.zeros(1, 1, 1, 2048, dtype=torch.bool)
    tiles[..., needle.key] = True
    kept = measure_recall(made.inputs, KeyTiles(tiles, 2048, 1), torch.tensor([2047]))
    assert float(kept.recall[0, needle.head, 0]) == pytest.approx(0.8, abs=0.08)
    assert made.parts(needle.head, [2047])[0, needle.key] == Part.NEEDLE
