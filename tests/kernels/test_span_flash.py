"""Edits of one long span on the vendor's attention, before and within it, against the literal specification."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attn_kernels import (
    AttentionInputs,
    Gate,
    HeadAffine,
    LogitMap,
    Order,
    Primitive,
    Regroup,
    edited_attention_reference,
)
from attn_kernels.edited_attention import dispatch, span_flash
from attn_kernels.edited_attention.edited_flash import edited_flash
from attn_kernels.edited_attention.lowering import LoweredEdits, lower
from tests.kernels.test_epilogue import plain_call
from tests.kernels.triton_device import on_device

SMALL = (16, 16, 4, 1)
FLASH = (64, 64, 4, 1)


def plain_attention(inputs: AttentionInputs, first: int, keys: slice, causal: bool) -> tuple[Tensor, Tensor]:
    """Of the queries from ``first`` on to some keys."""
    part = replace(
        inputs,
        query=inputs.query[:, :, first:],
        key=inputs.key[:, :, keys],
        value=inputs.value[:, :, keys],
        key_index=inputs.key_index[keys],
        key_valid=inputs.key_valid[:, keys],
        causal=causal,
    )
    output, log_sum_exp = edited_flash(part, lower(part, []), with_log_sum_exp=True, config=FLASH)
    assert log_sum_exp is not None
    return output, log_sum_exp


def first_keys(inputs: AttentionInputs, lowered: LoweredEdits) -> Tensor:
    end = lowered.summary.end
    with mock.patch.object(span_flash, "CONFIG", SMALL):
        return span_flash.edit_first_keys(inputs, lowered, plain_attention(inputs, end, slice(end, None), True))


def last_rows(inputs: AttentionInputs, lowered: LoweredEdits, first: int, with_run: bool) -> Tensor:
    assert lowered.span is not None
    output = torch.full_like(inputs.query[..., : inputs.value.shape[-1]], float("nan"))
    run = lowered.span.longest_run(first) if with_run else (0, 0)
    parts = 2 if inputs.query.shape[0] == 1 and run[1] - run[0] >= 8 else 1
    run = (run[0], run[1] - (run[1] - run[0]) % parts)
    of_run = (
        dispatch.plain_attention_of(dispatch._rows_and_parts(inputs, first, run, parts)) if run[0] < run[1] else None
    )
    with mock.patch.multiple(span_flash, CONFIG=SMALL, CONFIG_OF_FEW_ROWS=SMALL):
        span_flash.edit_last_rows_(inputs, lowered, output, first, run, of_run)
    return output[:, :, first:]


@st.composite
def span_edits(draw: st.DrawFn, rows_from: int | None = None) -> tuple[AttentionInputs, list[Primitive]]:
    """A span with holes, a few sinks in and around it, under a map, a Regroup, or both, and sometimes a HeadAffine."""
    heads, kv_heads = draw(st.sampled_from([(2, 1), (3, 3), (4, 2)]))
    size = draw(st.sampled_from([50, 97, 130]))
    batch = draw(st.integers(1, 2))
    inputs = plain_call(
        draw(st.integers(0, 2**31)), size, heads, kv_heads, draw(st.sampled_from([0.3, 1.0, 10.0])), batch
    )
    index = inputs.key_index
    start = draw(st.integers(0, 12))
    stop = start + draw(st.integers(8, size - start - 8))
    sinks = index < 0
    for place in draw(st.lists(st.integers(0, size - 2), max_size=5)):
        sinks = sinks | (index == place)
    span = (index >= start) & (index < stop)
    # Another sample's span begins elsewhere.
    spans = torch.stack([span & (index >= start + 3 * sample) for sample in range(batch)])[:, None]
    rows = None if rows_from is None else (index >= rows_from)[None]
    number = st.floats(-2.0, 2.0)
    edits: list[Primitive] = []
    kind = draw(st.sampled_from(["map", "target", "rest", "map and others"]))
    if kind.startswith("map"):
        absolute = torch.tensor([draw(number) for _ in range(heads)])
        edits.append(LogitMap(spans, scale=draw(number), absolute=absolute, bias=draw(number), rows=rows))
    if kind == "map and others":
        others = sinks if draw(st.booleans()) else sinks & ~span
        edits.append(LogitMap(others[None, None], bias=draw(number), rows=rows))
    if kind in ("target", "rest"):
        gate = Gate(spans, draw(st.floats(0, 0.5)), spans & sinks, draw(st.floats(0.1, 1.0)))
        target = spans & ~sinks if kind == "target" else None
        keep = torch.tensor([draw(st.floats(0, 1)) for _ in range(heads)])
        edits.append(
            Regroup(sinks[None, None], keep, target=target, gate=draw(st.sampled_from([None, gate])), rows=rows)
        )
    if draw(st.booleans()):
        edits.append(HeadAffine(gain=torch.linspace(0, 2, heads), offset=torch.ones(heads, 8), rows=rows))
    return on_device((inputs, edits))


@given(span_edits())
@settings(max_examples=40, deadline=None)
def test_first_keys_equal_the_specification(case: tuple[AttentionInputs, list[Primitive]]) -> None:
    inputs, edits = case
    lowered = lower(inputs, edits)
    if lowered.span is None or lowered.summary.end == inputs.num_keys:
        return
    expected, _ = edited_attention_reference(*on_device((inputs, edits), "cpu"))
    torch.testing.assert_close(first_keys(inputs, lowered).double().cpu(), expected, rtol=2e-3, atol=2e-3)


@given(span_edits(rows_from=41), st.booleans())
@settings(max_examples=40, deadline=None)
def test_last_rows_equal_the_specification(case: tuple[AttentionInputs, list[Primitive]], with_run: bool) -> None:
    inputs, edits = case
    lowered = lower(inputs, edits)
    if lowered.span is None:
        return
    expected, _ = edited_attention_reference(*on_device((inputs, edits), "cpu"))
    output = last_rows(inputs, lowered, 41, with_run)
    torch.testing.assert_close(output.double().cpu(), expected[:, :, 41:], rtol=2e-3, atol=2e-3)


def test_the_strategy_reaches_the_kernels() -> None:
    """Most of what is drawn is a span, sometimes after a run; the tests above would pass on nothing."""
    spans, runs = 0, 0

    @given(span_edits(rows_from=41))
    @settings(max_examples=30, deadline=None, database=None)
    def count(case: tuple[AttentionInputs, list[Primitive]]) -> None:
        nonlocal spans, runs
        span = lower(*case).span
        spans += span is not None
        runs += span is not None and span.longest_run(41) != (0, 0)

    count()
    assert min(spans, runs) > 8


def test_more_other_keys_than_one_tile() -> None:
    inputs = plain_call(5, 130, 2, 1, 1.0)
    index = inputs.key_index
    span, sinks = ((index >= 40) & (index < 100))[None, None], ((index < 20) | (index == 50))[None, None]
    edits: list[Primitive] = [Regroup(sinks, 0.4, target=span & ~sinks), LogitMap(sinks, bias=0.5)]
    inputs, edits = on_device((inputs, edits))
    expected, _ = edited_attention_reference(*on_device((inputs, edits), "cpu"))
    lowered = lower(inputs, edits)
    assert lowered.span is not None
    assert lowered.span.others_without(20, 40, 130).shape[1] > SMALL[1]
    torch.testing.assert_close(first_keys(inputs, lowered).double().cpu(), expected, rtol=1e-4, atol=1e-4)
    found = last_rows(inputs, lowered, 60, True)
    torch.testing.assert_close(found.double().cpu(), expected[:, :, 60:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mass", [0.9, 0.9999, 0.999999])
def test_a_source_or_span_that_holds_nearly_all_mass_costs_no_digits(mass: float) -> None:
    """In bf16 as exact as plain attention in that dtype, twice."""
    inputs = plain_call(3, 130, 2, 1, 1.0)
    index = inputs.key_index
    image, sink = (index >= 20) & (index < 90), index == 5
    query, key, value = (part.to(torch.bfloat16) for part in (inputs.query, inputs.key, inputs.value))
    query[..., 0] = 2.0
    key[..., 0] = 0.0
    for heavy in (image, sink):
        lifted, values = key.clone(), value.clone()
        lift = torch.logit(torch.tensor(mass, dtype=torch.float64)) + (130 / heavy.sum()).log()
        lifted[:, :, heavy, 0] = (lift / (2.0 * inputs.scaling)).to(key)
        values[:, :, heavy] += 3.0
        call = replace(inputs, query=query, key=lifted, value=values)
        edits: list[Primitive] = [LogitMap(image[None, None], bias=-20.0)]
        if heavy is sink:
            edits = [Regroup(sink[None, None], 0.4, target=image[None, None])]
        on_gpu, edits = on_device((call, edits))
        expected, _ = edited_attention_reference(*on_device((on_gpu, edits), "cpu"))
        plain, _ = edited_attention_reference(call, [])
        attention = plain_attention(on_gpu, 0, slice(None), True)[0].double().cpu()
        lowered = lower(on_gpu, edits)
        for found, wanted, first in (
            (first_keys(on_gpu, lowered), expected, 0),
            (last_rows(on_gpu, lowered, 95, True), expected[:, :, 95:], 95),
        ):
            # Of a sink that is nearly all, plain attention makes hardly an error; the edit's result is to be rounded, too.
            allowed = (attention - plain)[:, :, first:].norm() / plain[:, :, first:].norm() + torch.finfo(
                key.dtype
            ).eps / 4
            assert (found.double().cpu() - wanted).norm() / wanted.norm() <= 2 * allowed


NO_SPAN: list[list[Primitive]] = [
    [Order(allow=(((torch.arange(130) < 40)[None], (torch.arange(130) > 70)[None]),))],
    [
        LogitMap((torch.arange(130) < 40)[None, None], bias=1.0),
        LogitMap((torch.arange(130) < 60)[None, None], bias=1.0),
    ],
    [LogitMap((torch.arange(130) < torch.tensor([[40], [60]]))[None], bias=1.0)],
    [HeadAffine(gain=torch.tensor([1.0, 2.0]))],
]


@pytest.mark.parametrize("edits", NO_SPAN, ids=["order", "two maps", "keys by head", "no key"])
def test_what_has_no_span(edits: list[Primitive]) -> None:
    assert lower(plain_call(0, 130, 2, 1, 1.0), edits).span is None
