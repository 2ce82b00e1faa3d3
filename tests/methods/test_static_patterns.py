"""streaming, power, trishape and sink_scale against their formulas, written as loops."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from torch import Tensor

import attn_hooks
from attn_hooks import Edit, PowerAttention, SinkScale, Streaming, TriShape
from tests.hooks.tiny import padded_batch, prompt, tiny_llama
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


def trishape_sees(edit: TriShape, i: int, j: int, length: int) -> bool:
    return j < edit.sinks or i - j < edit.window or i >= length - edit.dense_rows


def literal_pattern(edit: Edit, sees, layers: set[int]) -> Literal:
    """``sees`` by positions of query and key, and the prompt's length where it asks for it."""
    asks_length = len(inspect.signature(sees).parameters) == 4

    def logits(s: Tensor, layer: int) -> Tensor:
        edited = s.clone()
        for b, start in enumerate(FIRST_REAL):
            for h in range(s.shape[1]):
                named = edit.heads is None or (layer, h) in edit.heads
                for i in range(start, s.shape[2]):
                    for j in range(start, i + 1):
                        length = (s.shape[2] - start,) if asks_length else ()
                        if layer in layers and named and not sees(edit, i - start, j - start, *length):
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
    (
        TriShape(sinks=1, window=2, dense_rows=3),
        literal_pattern(TriShape(sinks=1, window=2, dense_rows=3), trishape_sees, set(range(5))),
    ),
    (
        TriShape(sinks=0, window=1, dense_rows=1, heads=((1, 0), (4, 3))),
        literal_pattern(TriShape(sinks=0, window=1, dense_rows=1, heads=((1, 0), (4, 3))), trishape_sees, {1, 4}),
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


def test_tri_shape_decodes_densely_and_refuses_later_turns() -> None:
    model, ids = tiny_llama(), prompt(2, 20)
    for later_tokens in ("refuse", "dense"):
        with attn_hooks.editing(model, TriShape(sinks=1, window=2, dense_rows=3, later_tokens=later_tokens)):
            cache = model(ids).past_key_values
            edited = model(ids[:, :1], past_key_values=cache).logits
            if later_tokens == "refuse":
                with pytest.raises(attn_hooks.EditError, match="later_tokens='dense'"):
                    model(ids[:, :3], past_key_values=cache)
            else:
                model(ids[:, :3], past_key_values=cache)
            cache = model(ids).past_key_values
        torch.testing.assert_close(model(ids[:, :1], past_key_values=cache).logits, edited)


@pytest.mark.parametrize("side", ["left", "right"])
def test_tri_shape_counts_each_prompt_s_own_rows(side: str) -> None:
    model, batch = tiny_llama(), padded_batch(side)
    real = batch["attention_mask"][1].bool()
    with attn_hooks.editing(model, TriShape(sinks=1, window=2, dense_rows=2)):
        together = model(**batch).logits[1, real]
        alone = model(batch["input_ids"][1:, real]).logits[0]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_tri_shape_with_all_rows_dense_is_the_model() -> None:
    model, ids = tiny_llama(), prompt(2, 20)
    with attn_hooks.editing(model, TriShape(sinks=0, window=1, dense_rows=20)):
        torch.testing.assert_close(model(ids).logits, tiny_llama()(ids).logits, rtol=1e-4, atol=1e-4)
