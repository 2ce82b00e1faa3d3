"""The edited flash kernel against the literal specification: in the interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings

from attn_kernels import AttentionInputs, HeadAffine, LogitMap, Order, Primitive, Regroup, edited_attention_reference
from attn_kernels.edited_attention.edited_flash import edited_flash
from attn_kernels.edited_attention.lowering import NotLowered, lower
from tests.kernels.strategies import attention_inputs, calls_with_edits
from tests.kernels.triton_device import DEVICE, on_device

KINDS = (LogitMap, Order, Regroup, HeadAffine)
# Tiles so small that a toy call has several of them.
SMALL = (16, 64, 4, 1)


def lowered_or_assume(inputs: AttentionInputs, edits: list[Primitive]):
    try:
        return lower(inputs, edits)
    except NotLowered:
        assume(False)


def ungated(edits: list[Primitive]) -> list[Primitive]:
    """Gates compare masses with a threshold, where float32 and float64 may fall on different sides."""
    return [replace(edit, gate=None) if isinstance(edit, Regroup) else edit for edit in edits]


@given(calls_with_edits(kinds=KINDS))
@settings(max_examples=60, deadline=None)
def test_equals_the_specification(case: tuple[AttentionInputs, list[Primitive]]) -> None:
    inputs, edits = on_device(case)
    expected, _ = edited_attention_reference(*on_device((inputs, edits), "cpu"))
    output, _ = edited_flash(inputs, lowered_or_assume(inputs, edits), config=SMALL)
    torch.testing.assert_close(output.double().cpu(), expected, rtol=2e-3, atol=2e-3)


@given(attention_inputs())
@settings(max_examples=25, deadline=None)
def test_without_edits_gives_plain_attention_and_its_log_sum_exp(inputs: AttentionInputs) -> None:
    inputs, _ = on_device((inputs, []))
    expected, weights = edited_attention_reference(*on_device((inputs, []), "cpu"))
    output, log_sum_exp = edited_flash(inputs, lower(inputs, []), with_log_sum_exp=True, config=SMALL)
    torch.testing.assert_close(output.double().cpu(), expected, rtol=2e-3, atol=2e-3)
    assert log_sum_exp is not None
    assert torch.isfinite(log_sum_exp.cpu()[weights.sum(-1) > 0]).all()


def test_no_query_head_is_left_out_when_heads_are_chosen() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 4, 33, 16, generator=generator, device="cpu") for _ in range(3))
    index = torch.arange(33)
    inputs = AttentionInputs(
        query, key, value, 0.25, index, index, index[None], index[None], torch.ones(1, 33, dtype=torch.bool)
    )
    inputs, _ = on_device((inputs, []))
    whole, _ = edited_flash(inputs, lower(inputs, []), config=SMALL)
    kept = torch.full_like(whole, 7.0)
    chosen = torch.tensor([1, 3], dtype=torch.int32, device=DEVICE)
    some, _ = edited_flash(inputs, lower(inputs, []), heads=chosen, output=kept, config=SMALL)
    assert bool((some[:, [0, 2]] == 7).all())
    torch.testing.assert_close(some[:, [1, 3]], whole[:, [1, 3]])


@pytest.mark.parametrize("mass", [0.99, 0.9999, 0.999999])
def test_a_source_that_holds_nearly_all_mass_costs_no_digits(mass: float) -> None:
    generator = torch.Generator().manual_seed(1)
    size, dim = 70, 32
    query = torch.randn(1, 2, size, dim, generator=generator)
    key, value = torch.randn(1, 1, size, dim, generator=generator), torch.randn(1, 1, size, dim, generator=generator)
    index = torch.arange(size)
    inputs = AttentionInputs(
        query, key, value, dim**-0.5, index, index, index[None], index[None], torch.ones(1, size, dtype=torch.bool)
    )
    sink = (index == 0)[None, None]
    lift = float(torch.logit(torch.tensor(mass, dtype=torch.float64))) + 4.0
    edits: list[Primitive] = [LogitMap(sink, bias=lift), Regroup(sink, keep=0.4)]
    inputs, edits = on_device((inputs, edits))
    expected, _ = edited_attention_reference(*on_device((inputs, edits), "cpu"))
    output, _ = edited_flash(inputs, lower(inputs, edits), config=SMALL)
    torch.testing.assert_close(output.double().cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target_is_span", [True, False])
def test_tiles_touched_in_full_are_left_out_of_the_plain_loop(target_is_span: bool) -> None:
    """A span over several tiles of 64 keys, beginning and ending inside one."""
    generator = torch.Generator().manual_seed(2)
    size = 270
    query, key, value = (torch.randn(1, 1, size, 16, generator=generator) for _ in range(3))
    index = torch.arange(size)
    inputs = AttentionInputs(
        query, key, value, 0.25, index, index, index[None], index[None], torch.ones(1, size, dtype=torch.bool)
    )
    span = ((index >= 60) & (index < 200))[None, None]
    sinks = ((index == 0) | (index == 100) | (index == 230))[None, None]
    edits: list[Primitive] = [LogitMap(span, absolute=0.5)]
    if target_is_span:
        edits = [Regroup(sinks, keep=0.3, target=span & ~sinks)]
    inputs, edits = on_device((inputs, edits))
    assert lower(inputs, edits).untouched(size, 64).leaves_out
    expected, _ = edited_attention_reference(*on_device((inputs, edits), "cpu"))
    output, _ = edited_flash(inputs, lower(inputs, edits), config=SMALL)
    torch.testing.assert_close(output.double().cpu(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dims", [(64, 64), (80, 96), (96, 80), (128, 128), (256, 256)])
def test_half_precision_and_head_sizes(dtype: torch.dtype, dims: tuple[int, int]) -> None:
    """No further from float64 than plain attention of that dtype, twice; 71 queries fill no tile."""
    generator = torch.Generator().manual_seed(3)
    size, (head_dim, value_dim) = 71, dims
    index = torch.arange(size)
    inputs = AttentionInputs(
        query=torch.randn(2, 4, size, head_dim, generator=generator).to(dtype),
        key=torch.randn(2, 2, size, head_dim, generator=generator).to(dtype),
        value=torch.randn(2, 2, size, value_dim, generator=generator).to(dtype),
        scaling=head_dim**-0.5,
        query_index=index,
        key_index=index,
        query_position=index[None],
        key_position=index[None],
        key_valid=(index >= torch.tensor([[0], [5]])),
    )
    source = ((index < 3) | (index == 40))[None, None]
    edits: list[Primitive] = [LogitMap(source, scale=1.5), Regroup(source, keep=0.4)]
    expected, _ = edited_attention_reference(inputs, edits)
    plainly, _ = edited_attention_reference(inputs, [])
    inputs, edits = on_device((inputs, edits))
    error = (edited_flash(inputs, lower(inputs, edits), config=SMALL)[0].double().cpu() - expected).norm()
    plain_error = (edited_flash(inputs, lower(inputs, []), config=SMALL)[0].double().cpu() - plainly).norm()
    rounding = torch.finfo(dtype).eps / 4 * expected.norm()
    assert error < 2 * max(plain_error, rounding)
