"""The blocked PyTorch path against the literal specification, and the invariants both must have."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attn_kernels import (
    AttentionInputs,
    HeadAffine,
    LogitMap,
    Order,
    Primitive,
    Regroup,
    Sparsity,
    Tap,
    edited_attention,
    edited_attention_reference,
    edited_weights,
    head_affine,
    moved_mass,
    read_taps,
)
from attn_kernels.edited_attention import blocked
from attn_kernels.primitives import SMALLEST_TARGET
from tests.kernels.strategies import attention_inputs, calls_with_edits

MASKS_AND_WEIGHTS = (LogitMap, Order, Sparsity, Regroup)


def run(inputs: AttentionInputs, edits: list[Primitive]) -> Tensor:
    return head_affine(edited_attention(inputs, edits), edits, inputs.query)


def in_float64(inputs: AttentionInputs) -> AttentionInputs:
    return replace(inputs, query=inputs.query.double(), key=inputs.key.double(), value=inputs.value.double())


@given(calls_with_edits())
@settings(max_examples=200, deadline=None)
def test_blocked_equals_the_specification(case: tuple[AttentionInputs, list[Primitive]]) -> None:
    inputs, edits = case
    inputs = in_float64(inputs)
    expected, weights = edited_attention_reference(inputs, edits)
    torch.testing.assert_close(run(inputs, edits), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(edited_weights(inputs, edits), weights, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(case=calls_with_edits())
@settings(max_examples=40, deadline=None)
def test_error_is_bounded_by_the_dtype(dtype: torch.dtype, case: tuple[AttentionInputs, list[Primitive]]) -> None:
    """Scores are computed in float32 from inputs of the dtype: only the output's own rounding is of the dtype.

    Gates compare masses with a threshold, where float32 and float64 may fall on different sides; they are left out. So are masses
    that float64 alone can tell from none, where a Regroup would hand everything to them.
    """
    inputs, edits = case
    edits = [replace(edit, gate=None) if isinstance(edit, Regroup) else edit for edit in edits]
    assume(inputs.query.abs().max() < 12 or not any(isinstance(edit, Regroup) for edit in edits))
    inputs = replace(inputs, query=inputs.query.to(dtype), key=inputs.key.to(dtype), value=inputs.value.to(dtype))
    expected, _ = edited_attention_reference(inputs, edits)
    # Logits reach 200 here, and an error of 200 * 2^-23 in a logit is a relative error of e^that in a weight.
    tolerance = 64 * torch.finfo(dtype).eps if dtype != torch.float32 else 1e-3
    torch.testing.assert_close(run(inputs, edits).double(), expected, rtol=tolerance, atol=tolerance)


@given(calls_with_edits(kinds=MASKS_AND_WEIGHTS))
@settings(max_examples=100, deadline=None)
def test_row_sums_and_group_masses(case: tuple[AttentionInputs, list[Primitive]]) -> None:
    """Rows sum to 1 (0 if they see nothing) for any edit, less what a sink logit takes; groups partition that sum."""
    inputs, edits = case
    inputs = replace(in_float64(inputs), sink_logits=None)
    weights = edited_weights(inputs, edits)
    sums = weights.sum(-1)
    is_one, is_zero = (sums - 1).abs() < 1e-9, sums == 0
    assert bool((is_one | is_zero).all())
    assert bool((weights >= 0).all())
    group = torch.arange(inputs.num_keys) % 2 == 0
    masses: list[Tensor] = []
    for keys in (group, ~group):
        read_taps(inputs, [*edits, Tap("group_mass", masses.append, keys=keys[None, None])])
    torch.testing.assert_close(masses[0] + masses[1], sums, rtol=1e-9, atol=1e-9)


@given(attention_inputs())
@settings(max_examples=60, deadline=None)
def test_neutral_primitives_are_the_identity(inputs: AttentionInputs) -> None:
    inputs = in_float64(inputs)
    some = (torch.arange(inputs.num_keys) % 3 == 0)[None, None]
    neutral: list[Primitive] = [
        LogitMap(some),
        Order(),
        Regroup(some, keep=1.0),
        HeadAffine(gain=torch.ones(inputs.num_heads), offset=torch.zeros(inputs.num_heads, inputs.value.shape[-1])),
    ]
    for primitive in neutral:
        torch.testing.assert_close(run(inputs, [primitive]), run(inputs, []), rtol=1e-12, atol=1e-12)


@given(calls_with_edits(kinds=(LogitMap, Sparsity, Regroup, HeadAffine)), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_no_future_key_is_seen(case: tuple[AttentionInputs, list[Primitive]], seed: int) -> None:
    """Changing the last key and value changes the last query's output only, if that query is the last token's."""
    inputs, edits = case
    if inputs.num_queries < 2:
        return
    generator = torch.Generator().manual_seed(seed)
    key, value = inputs.key.clone(), inputs.value.clone()
    key[:, :, -1] = torch.randn(key[:, :, -1].shape, generator=generator)
    value[:, :, -1] = torch.randn(value[:, :, -1].shape, generator=generator)
    changed = run(replace(inputs, key=key, value=value), edits)
    torch.testing.assert_close(changed[:, :, :-1], run(inputs, edits)[:, :, :-1], rtol=0, atol=0)


@given(calls_with_edits(kinds=(Regroup, HeadAffine, Sparsity)), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_padding_has_no_effect(case: tuple[AttentionInputs, list[Primitive]], seed: int) -> None:
    """Whatever stands on padded keys, the output is the same."""
    inputs, edits = case
    generator = torch.Generator().manual_seed(seed)
    valid = inputs.key_valid[:, None, :, None]
    key = torch.where(valid, inputs.key, torch.randn(inputs.key.shape, generator=generator))
    value = torch.where(valid, inputs.value, torch.randn(inputs.value.shape, generator=generator))
    torch.testing.assert_close(
        run(replace(inputs, key=key, value=value), edits), run(inputs, edits), rtol=1e-6, atol=1e-6
    )


def test_order_of_application_is_fixed_whatever_the_listing() -> None:
    torch.manual_seed(0)
    inputs = plain_inputs(num_queries=7)
    first_keys = (torch.arange(7) < 2)[None, None]
    edits: list[Primitive] = [
        LogitMap(first_keys, bias=1.5),
        Order(deny=((torch.ones(1, 7, dtype=torch.bool), torch.arange(7)[None] == 3),)),
        Regroup(first_keys, keep=0.3),
        HeadAffine(gain=torch.tensor([2.0, 0.5])),
    ]
    torch.testing.assert_close(run(inputs, edits), run(inputs, edits[::-1]), rtol=0, atol=0)
    # And it matters: a map after Regroup would not be the same as before it.
    separately = edited_weights(inputs, [edits[2]])
    assert not torch.allclose(edited_weights(inputs, edits[:1] + edits[2:3]), separately)


def test_regroups_compose_in_list_order() -> None:
    torch.manual_seed(0)
    inputs = in_float64(plain_inputs(num_queries=6))
    low, high = (torch.arange(6) < 2)[None, None], (torch.arange(6) >= 4)[None, None]
    forward = [Regroup(low, keep=0.2, target=high), Regroup(high, keep=0.5, target=low)]
    for edits in (forward, forward[::-1]):
        expected, _ = edited_attention_reference(inputs, list(edits))
        torch.testing.assert_close(run(inputs, list(edits)), expected)
    assert not torch.allclose(run(inputs, list(forward)), run(inputs, list(forward[::-1])))


def test_mass_of_the_source_is_scaled_exactly() -> None:
    torch.manual_seed(0)
    inputs = in_float64(plain_inputs(num_queries=8))
    source = (torch.arange(8) == 0)[None, None]
    before, after = edited_weights(inputs, []), edited_weights(inputs, [Regroup(source, keep=0.25)])
    # Row 0 sees key 0 alone: nothing can receive its mass, so it stays.
    torch.testing.assert_close(after[:, :, 1:, 0], 0.25 * before[:, :, 1:, 0])
    torch.testing.assert_close(after[:, :, 0, 0], before[:, :, 0, 0])


@pytest.mark.parametrize("share", [0.99, 0.9999, 1 - 1e-7])
def test_a_sink_that_holds_nearly_all_mass_keeps_its_digits(share: float) -> None:
    """Subtracting the sink's part from the whole would lose every digit here; adding groups up does not."""
    torch.manual_seed(0)
    num_keys = 64
    inputs = plain_inputs(num_queries=num_keys, spread=0.05)
    logit = torch.log(torch.tensor(share / (1 - share) * (num_keys - 1)))
    sink = (torch.arange(num_keys) == 0)[None, None]
    edits: list[Primitive] = [LogitMap(sink, bias=float(logit)), Regroup(sink, keep=0.0)]
    expected, _ = edited_attention_reference(inputs, edits)
    torch.testing.assert_close(run(inputs, edits)[:, :, 1:].double(), expected[:, :, 1:], rtol=1e-5, atol=1e-5)


@given(calls_with_edits(kinds=MASKS_AND_WEIGHTS))
@settings(max_examples=60, deadline=None)
def test_taps_read_what_the_weights_say(case: tuple[AttentionInputs, list[Primitive]]) -> None:
    inputs, edits = case
    inputs = in_float64(inputs)
    _, weights = edited_attention_reference(inputs, edits)
    rows = inputs.query_position >= 0
    rows = rows.expand(inputs.query.shape[0], -1)
    real = weights * rows[:, None, :, None]
    expected = {
        "column_sum": real.sum(2),
        "row_weights": weights[:, :, -1],
        "entropy": -torch.special.xlogy(weights, weights).sum(-1),
    }
    for kind, value in expected.items():
        read: list[Tensor] = []
        tap = Tap(kind, read.append, rows=rows)  # type: ignore[arg-type]
        read_taps(inputs, [*edits, tap])
        torch.testing.assert_close(read[0], value, rtol=1e-9, atol=1e-9)


def test_column_mean_counts_the_rows_that_see_a_key() -> None:
    torch.manual_seed(0)
    inputs = in_float64(plain_inputs(num_queries=5))
    means: list[Tensor] = []
    read_taps(inputs, [Tap("column_mean", means.append)])
    weights = edited_weights(inputs, [])
    for key in range(5):
        torch.testing.assert_close(means[0][..., key], weights[:, :, key:, key].mean(-1))


@given(calls_with_edits())
@settings(max_examples=40, deadline=None)
def test_a_selection_of_heads_equals_those_heads_of_all(case: tuple[AttentionInputs, list[Primitive]]) -> None:
    inputs, edits = case
    assert edited_attention(inputs, edits, torch.tensor([], dtype=torch.long)).shape[1] == 0
    heads = torch.arange(inputs.num_heads)[::2]
    torch.testing.assert_close(edited_attention(inputs, edits, heads), edited_attention(inputs, edits)[:, heads])


@given(calls_with_edits(kinds=MASKS_AND_WEIGHTS))
@settings(max_examples=40, deadline=None)
def test_block_size_has_no_effect(case: tuple[AttentionInputs, list[Primitive]]) -> None:
    inputs, edits = case
    inputs = in_float64(inputs)
    whole = edited_attention(inputs, edits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocked, "SCORES_PER_BLOCK", 1)
        row_by_row = edited_attention(inputs, edits)
    torch.testing.assert_close(row_by_row, whole, rtol=1e-12, atol=1e-12)


def test_moved_mass_is_the_freed_mass_of_a_regroup() -> None:
    torch.manual_seed(0)
    inputs = in_float64(plain_inputs(num_queries=12))
    sink = (torch.arange(12) == 0)[None, None]
    regroup = Regroup(sink, keep=0.4)
    moved = moved_mass(inputs, [HeadAffine(gain=torch.ones(2)), regroup])
    freed = 0.6 * edited_weights(inputs, [])[..., 0]
    freed[:, :, 0] = 0
    assert moved[0] is None
    torch.testing.assert_close(moved[1], freed.mean())


@pytest.mark.parametrize("gap", [50.0, 68.0, 70.0, 87.0, 95.0, 103.0, 200.0])
def test_a_target_with_hardly_any_mass_gets_the_freed_mass_and_no_nan(gap: float) -> None:
    """From a gap of 70 in the logits on the other key counts as without mass; at 95 its weight is a denormal of float32."""
    inputs = plain_inputs(num_queries=2)
    key = torch.zeros_like(inputs.key)
    key[:, :, 0] = 1
    inputs = replace(inputs, query=torch.full_like(inputs.query, gap / 4), key=key, scaling=1.0)
    first = (torch.arange(2) == 0)[None, None]
    weights = edited_weights(inputs, [Regroup(first, keep=0.4)])[:, :, 1]
    expected = torch.tensor([0.4, 0.6]) if math.exp(-gap) > SMALLEST_TARGET else torch.tensor([1.0, 0.0])
    torch.testing.assert_close(weights, expected.expand_as(weights), rtol=1e-3, atol=1e-3)


def test_moved_mass_leaves_right_padding_out() -> None:
    torch.manual_seed(0)
    inputs = in_float64(plain_inputs(num_queries=12))
    valid = (torch.arange(12) < 9)[None]
    sink = (torch.arange(12) == 0)[None, None]
    (padded,) = moved_mass(replace(inputs, key_valid=valid), [Regroup(sink, keep=0.4)])
    freed = 0.6 * edited_weights(inputs, [])[:, :, :9, 0]
    freed[:, :, 0] = 0
    torch.testing.assert_close(padded, freed.mean())


class _LargestTensor(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("edit", ["regroup", "head_affine", "tap"])
def test_no_square_tensor_is_ever_made(edit: str) -> None:
    length = 1024
    inputs = plain_inputs(num_queries=length)
    sink = (torch.arange(length) == 0)[None, None]
    read: list[Tensor] = []
    edits: dict[str, list[Primitive]] = {
        "regroup": [Regroup(sink, keep=0.4)],
        "head_affine": [HeadAffine(gain=torch.tensor([2.0, 1.0]))],
        "tap": [Tap("column_sum", read.append)],
    }
    with _LargestTensor() as largest:
        run(inputs, edits[edit])
    assert largest.elements <= inputs.num_heads * blocked.ROWS_PER_BLOCK * length


def test_gradients_flow_through_every_primitive() -> None:
    torch.manual_seed(0)
    inputs = in_float64(plain_inputs(num_queries=6))
    first_keys = (torch.arange(6) < 2)[None, None]
    scale = torch.tensor([1.1, 0.9], dtype=torch.float64, requires_grad=True)
    gain = torch.tensor([1.2, 0.8], dtype=torch.float64, requires_grad=True)
    keep = torch.tensor([0.5, 0.3], dtype=torch.float64, requires_grad=True)

    def function(query: Tensor, scale: Tensor, keep: Tensor, gain: Tensor) -> Tensor:
        edits = [LogitMap(first_keys, scale=scale), Regroup(first_keys, keep=keep), HeadAffine(gain=gain)]
        return run(replace(inputs, query=query), edits)

    query = inputs.query.clone().requires_grad_()
    assert torch.autograd.gradcheck(function, (query, scale, keep, gain))


def plain_inputs(num_queries: int, spread: float = 1.0) -> AttentionInputs:
    """One sample, two query heads over one kv head, causal, no padding."""
    index = torch.arange(num_queries)
    return AttentionInputs(
        query=torch.randn(1, 2, num_queries, 4) * spread,
        key=torch.randn(1, 1, num_queries, 4),
        value=torch.randn(1, 1, num_queries, 4),
        scaling=0.5,
        query_index=index,
        key_index=index,
        query_position=index[None],
        key_position=index[None],
        key_valid=torch.ones(1, num_queries, dtype=torch.bool),
    )
