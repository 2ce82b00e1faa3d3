"""streaming, power and sink_scale against their formulas, written as loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import attn_hooks
from attn_hooks import Edit, PowerAttention, SinkScale, Streaming
from tests.literal import Literal, literal_attention
from tests.models import left_padded, llama

FIRST_REAL = [0, 5, 10]


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def streaming_sees(edit: Streaming, i: int, j: int) -> bool:
    return j < edit.sinks or i - j < edit.window


def power_sees(edit: PowerAttention, i: int, j: int) -> bool:
    distance = i // edit.block - j // edit.block
    power = distance == 0 or 2 ** int(math.log2(distance)) == distance
    return distance < edit.window_blocks or power or j // edit.block < edit.sink_blocks


def literal_pattern(edit: Edit, sees, layers: set[int]) -> Literal:
    def logits(s: Tensor, layer: int) -> Tensor:
        edited = s.clone()
        for b, start in enumerate(FIRST_REAL):
            for h in range(s.shape[1]):
                named = edit.heads is None or (layer, h) in edit.heads
                for i in range(start, s.shape[2]):
                    for j in range(start, i + 1):
                        if layer in layers and named and not sees(edit, i - start, j - start):
                            edited[b, h, i, j] = -torch.inf
        return edited

    return Literal(logits=logits)


def literal_sink_scale(edit: SinkScale) -> Literal:
    def logits(s: Tensor, layer: int) -> Tensor:
        edited = s.clone()
        for b, start in enumerate(FIRST_REAL):
            for j in range(start, min(start + edit.sinks, s.shape[3])):
                edited[b, :, :, j] += math.log(edit.scale)
        return edited

    return Literal(logits=logits)


CASES = [
    (Streaming(sinks=1, window=3), literal_pattern(Streaming(sinks=1, window=3), streaming_sees, set(range(5)))),
    (
        Streaming(sinks=0, window=2, heads=((1, 0), (4, 3))),
        literal_pattern(Streaming(sinks=0, window=2, heads=((1, 0), (4, 3))), streaming_sees, {1, 4}),
    ),
    (
        PowerAttention(block=2, window_blocks=1, sink_blocks=0),
        literal_pattern(PowerAttention(block=2, window_blocks=1, sink_blocks=0), power_sees, set(range(5))),
    ),
    (
        PowerAttention(block=1, window_blocks=2, sink_blocks=1, dense_layers=(0, 4)),
        literal_pattern(PowerAttention(block=1, window_blocks=2, sink_blocks=1), power_sees, {1, 2, 3}),
    ),
    (SinkScale(scale=0.1), literal_sink_scale(SinkScale(scale=0.1))),
    (SinkScale(scale=3.0, sinks=2), literal_sink_scale(SinkScale(scale=3.0, sinks=2))),
]


@pytest.mark.parametrize(("edit", "literal"), CASES, ids=[str(edit) for edit, _ in CASES])
def test_prefill_is_the_formula(edit: Edit, literal: Literal) -> None:
    model = llama()
    ids, mask = left_padded()
    with literal_attention(model, literal):
        expected = model(ids, attention_mask=mask).logits
    with attn_hooks.editing(model, edit):
        edited = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(edited[mask.bool()], expected[mask.bool()], rtol=1e-9, atol=1e-9)


def test_scale_zero_hides_the_sink_and_the_first_row_sees_nothing() -> None:
    """Row 0 has only the sink to see; it gets zeros instead of NaN."""
    model = llama()
    ids, _ = left_padded((6,))
    with attn_hooks.editing(model, SinkScale(scale=0.0)):
        assert model(ids).logits.isfinite().all()
