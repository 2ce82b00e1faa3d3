"""Gain and offset in place against the PyTorch path."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from attn_kernels import AttentionInputs, HeadAffine, LogitMap, Primitive, head_affine
from attn_kernels.edited_attention.head_affine import head_affine_
from attn_kernels.edited_attention.lowering import NotLowered, lower
from tests.kernels.strategies import attention_inputs, primitives
from tests.kernels.triton_device import DEVICE, on_device


def random_output(inputs: AttentionInputs, layout: str, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """``(B, H, N, Dv)``, stored as ``layout`` says."""
    batch, heads, size, _ = inputs.query.shape
    value_dim = inputs.value.shape[-1]
    values = torch.randn(batch, heads, size, value_dim, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if layout == "tokens first":
        return values.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "part of a wider tensor":
        wider = torch.zeros(size, batch, heads, value_dim + 5, dtype=dtype).permute(1, 2, 0, 3)
        wider[..., 2 : value_dim + 2] = values
        return wider[..., 2 : value_dim + 2]
    return values


def plain_inputs(batch: int, heads: int, size: int, value_dim: int) -> AttentionInputs:
    index = torch.arange(size)
    return AttentionInputs(
        query=torch.zeros(batch, heads, size, 4),
        key=torch.zeros(batch, 1, size, 4),
        value=torch.zeros(batch, 1, size, value_dim),
        scaling=1.0,
        query_index=index,
        key_index=index,
        query_position=index[None],
        key_position=index[None],
        key_valid=torch.ones(1, size, dtype=torch.bool),
    )


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_equals_the_pytorch_path(data: st.DataObject) -> None:
    inputs = data.draw(attention_inputs())
    # Other primitives have bits of their own in the same codes and do nothing to outputs.
    kinds = data.draw(st.sampled_from([(HeadAffine,), (HeadAffine, LogitMap)]))
    edits = [data.draw(primitives(inputs, kinds)) for _ in range(data.draw(st.integers(1, 3)))]
    layout = data.draw(st.sampled_from(["tokens first", "heads first", "part of a wider tensor"]))
    output = random_output(inputs, layout, data.draw(st.integers(0, 2**31)))
    expected = head_affine(output.clone(), edits, inputs.query)
    only_touched = data.draw(st.booleans())
    output, inputs, edits = on_device((output, inputs, edits))
    try:
        lowered = lower(inputs, edits)
    except NotLowered:
        assume(False)
    found = head_affine_(output, lowered, lowered.heads if only_touched else None)
    assert found.data_ptr() == output.data_ptr()
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("size", "value_dim"), [(1, 1), (63, 80), (64, 16), (130, 24)])
@pytest.mark.parametrize("scoped", [False, True])
def test_several_tiles_of_rows(size: int, value_dim: int, scoped: bool) -> None:
    inputs = plain_inputs(2, 5, size, value_dim)
    rows = torch.arange(size).expand(2, -1) % 3 == torch.tensor([[0], [1]]) if scoped else None
    gain = torch.linspace(-1, 2, 10).reshape(2, 5)
    edits: list[Primitive] = [
        HeadAffine(gain, torch.linspace(-3, 3, 10 * value_dim).reshape(2, 5, value_dim), rows=rows)
    ]
    output = random_output(inputs, "tokens first", size)
    expected = head_affine(output.clone(), edits, inputs.query)
    output, inputs, edits = on_device((output, inputs, edits))
    torch.testing.assert_close(head_affine_(output, lower(inputs, edits)).cpu(), expected, rtol=1e-6, atol=1e-6)


def test_other_heads_are_not_touched() -> None:
    """Heads left out stay bit for bit, also where they hold what no arithmetic keeps."""
    inputs = plain_inputs(1, 4, 70, 16)
    heads = torch.tensor([3, 1], dtype=torch.int32)
    edits: list[Primitive] = [HeadAffine(torch.full((4,), 3.0), torch.ones(4, 16))]
    output = random_output(inputs, "tokens first", 0)
    output[:, [0, 2]] = float("nan")
    expected = output.clone()
    expected[:, [1, 3]] = 3 * output[:, [1, 3]] + 1
    output, inputs, edits, heads = on_device((output, inputs, edits, heads))
    found = head_affine_(output, lower(inputs, edits), heads)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("with_offset", [False, True])
@pytest.mark.parametrize("scoped", [False, True])
def test_a_replaced_head_is_exactly_its_offset(with_offset: bool, scoped: bool) -> None:
    inputs = plain_inputs(1, 3, 9, 16)
    offset = torch.linspace(-1, 1, 48).reshape(3, 16)
    rows = torch.arange(9)[None] >= 4 if scoped else None
    edits: list[Primitive] = [
        HeadAffine(offset=offset if with_offset else None, replace=torch.tensor([True, False, True]), rows=rows)
    ]
    output = random_output(inputs, "tokens first", 1)
    output[:, 0, 5] = float("inf")
    output[:, 2, 6] = float("nan")
    before = output.clone()
    output, inputs, edits = on_device((output, inputs, edits))
    found = head_affine_(output, lower(inputs, edits)).cpu()
    acting = torch.ones(9, dtype=torch.bool) if rows is None else rows[0]
    wanted = offset if with_offset else torch.zeros(3, 16)
    for head in (0, 2):
        torch.testing.assert_close(found[0, head, acting], wanted[head].expand(int(acting.sum()), -1), rtol=0, atol=0)
        torch.testing.assert_close(found[0, head, ~acting], before[0, head, ~acting], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_rounding_in_a_small_dtype(dtype: torch.dtype) -> None:
    inputs = plain_inputs(1, 3, 20, 32)
    gain, offset = torch.tensor([1.1, -0.3, 2.7]), torch.linspace(-2, 2, 96).reshape(3, 32)
    edits: list[Primitive] = [HeadAffine(gain, offset)]
    output = random_output(inputs, "tokens first", 2, dtype)
    exact = output.double() * gain.double()[:, None, None] + offset.double()[:, None]
    output, inputs, edits = on_device((output, inputs, edits))
    found = head_affine_(output, lower(inputs, edits)).cpu().double()
    # Half a unit in the last place, and what float32 adds to it, measured where the sum did not cancel.
    error = (found - exact).abs() / exact.abs().clamp(min=1e-2)
    # Triton's interpreter cuts bfloat16 off where the GPU rounds.
    rounding = 1.0 if dtype == torch.bfloat16 and DEVICE == "cpu" else 0.5
    assert float(error.max()) <= torch.finfo(dtype).eps * rounding * 1.01


def test_nothing_to_do() -> None:
    inputs = plain_inputs(1, 3, 9, 16)
    output = random_output(inputs, "tokens first", 1)
    before = output.clone()
    output, inputs = on_device((output, inputs))
    no_heads = torch.empty(0, dtype=torch.int32, device=output.device)
    head_affine_(output, lower(inputs, []))
    edits: list[Primitive] = [HeadAffine(gain=torch.full((3,), 2.0, device=output.device))]
    head_affine_(output, lower(inputs, edits), no_heads)
    torch.testing.assert_close(output.cpu(), before, rtol=0, atol=0)
    empty = output[:, :, :0]
    assert head_affine_(empty, lower(replace(inputs, query=inputs.query[:, :, :0]), edits)).shape == (1, 3, 0, 16)


def test_outputs_with_strided_values_are_refused() -> None:
    inputs = plain_inputs(1, 3, 9, 16)
    edits: list[Primitive] = [HeadAffine(gain=torch.full((3,), 2.0))]
    output = torch.zeros(1, 3, 16, 9).transpose(2, 3)
    output, inputs, edits = on_device((output, inputs, edits))
    with pytest.raises(ValueError, match="contiguous"):
        head_affine_(output, lower(inputs, edits))
