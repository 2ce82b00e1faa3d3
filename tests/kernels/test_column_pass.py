"""Column sums from a log-sum-exp against the literal specification's weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from attn_kernels import AttentionInputs, HeadAffine, LogitMap, Order, Primitive, Regroup, Tap, read_taps
from attn_kernels.edited_attention import column_pass as module
from attn_kernels.edited_attention.column_pass import column_pass
from attn_kernels.edited_attention.edited_flash import edited_flash
from attn_kernels.edited_attention.lowering import NotLowered, lower
from attn_kernels.edited_attention.reference import _allowed, edited_attention_reference
from tests.kernels.strategies import attention_inputs, primitives
from tests.kernels.triton_device import on_device

SMALL = (16, 16, 4, 1)


def in_float64(inputs: AttentionInputs) -> AttentionInputs:
    return replace(inputs, query=inputs.query.double(), key=inputs.key.double(), value=inputs.value.double())


def log_sum_exp_of(inputs: AttentionInputs, edits: list[Primitive]) -> Tensor:
    """``(B, H, N)`` float32, from the PyTorch path in float64."""
    found: list[Tensor] = []
    read_taps(in_float64(inputs), [*edits, Tap("log_sum_exp", found.append)])
    return found[0].float()


def specified_columns(
    inputs: AttentionInputs, edits: list[Primitive], heads: Tensor, rows: Tensor | None, mean: bool
) -> Tensor:
    """``(B, h, M)`` float64 from the weights of the specification, row by row."""
    _, weights = edited_attention_reference(inputs, edits)
    visible = torch.zeros(weights.shape, dtype=torch.float64)
    for b, h, i in torch.cartesian_prod(*(torch.arange(size) for size in weights.shape[:3])).tolist():
        visible[b, h, i] = _allowed(inputs, edits, b, h, i)
    scope = torch.ones(1, inputs.num_queries) if rows is None else rows
    sums = (weights * scope[:, None, :, None]).sum(2)
    if mean:
        sums = sums / (visible * scope[:, None, :, None]).sum(2).clamp(min=1)
    return sums[:, heads]


def tapped_columns(
    inputs: AttentionInputs, edits: list[Primitive], heads: Tensor, rows: Tensor | None, mean: bool
) -> Tensor:
    """The same from the PyTorch path, for longer calls."""
    found: list[Tensor] = []
    read_taps(in_float64(inputs), [*edits, Tap("column_mean" if mean else "column_sum", found.append, rows=rows)])
    return found[0][:, heads]


def assert_columns(
    inputs: AttentionInputs,
    edits: list[Primitive],
    heads: Tensor | None,
    rows: Tensor | None,
    mean: bool,
    config: tuple[int, int, int, int] | None = SMALL,
    splits: int | None = None,
    tolerance: float = 1e-5,
    expected_columns: Callable[..., Tensor] = tapped_columns,
) -> None:
    chosen = torch.arange(inputs.num_heads) if heads is None else heads.long()
    expected = expected_columns(inputs, edits, chosen, rows, mean)
    log_sum_exp = log_sum_exp_of(inputs, edits)
    inputs, edits, log_sum_exp = on_device((inputs, edits, log_sum_exp))
    heads, rows = on_device((heads, rows))
    found = column_pass(inputs, log_sum_exp, heads, lower(inputs, edits), rows, mean, config=config, splits=splits)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double().cpu(), expected, rtol=tolerance, atol=tolerance)


def random_scope(data: st.DataObject, inputs: AttentionInputs) -> Tensor | None:
    draw = data.draw
    kind = draw(st.sampled_from(["all", "none", "last", "some"]))
    shape = (draw(st.sampled_from([1, inputs.query.shape[0]])), inputs.num_queries)
    if kind == "all":
        return None
    if kind == "last":
        return (torch.arange(inputs.num_queries) == inputs.num_queries - 1).expand(shape)
    if kind == "none":
        return torch.zeros(shape, dtype=torch.bool)
    return torch.rand(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**31)))) < 0.5


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_equals_the_specification(data: st.DataObject) -> None:
    inputs = data.draw(attention_inputs())
    edits = [data.draw(primitives(inputs, (LogitMap, Order, HeadAffine))) for _ in range(data.draw(st.integers(0, 3)))]
    try:
        lower(inputs, edits)
    except NotLowered:
        assume(False)
    heads = data.draw(st.sampled_from([None, torch.tensor([inputs.num_heads - 1]), torch.arange(inputs.num_heads)]))
    rows = random_scope(data, inputs)
    mean, splits = data.draw(st.booleans()), data.draw(st.sampled_from([None, 1, 3]))
    # Logits reach 200 here, and an error of 200 * 2^-23 in a logit is a relative error of e^that in a weight.
    assert_columns(inputs, edits, heads, rows, mean, SMALL, splits, 2e-3, specified_columns)


def long_call(
    num_queries: int,
    num_keys: int,
    dtype: torch.dtype = torch.float32,
    spread: float = 1.0,
    batch: int = 1,
    **fields: Any,
) -> AttentionInputs:
    """Four query heads over two, unpadded; several tiles of keys and of rows."""
    generator = torch.Generator().manual_seed(num_queries + num_keys)
    key_index = torch.arange(num_keys)
    query_index = key_index[num_keys - num_queries :]
    inputs = AttentionInputs(
        query=(torch.randn(batch, 4, num_queries, 8, generator=generator) * spread).to(dtype),
        key=torch.randn(batch, 2, num_keys, 8, generator=generator).to(dtype),
        value=torch.randn(batch, 2, num_keys, 8, generator=generator).to(dtype),
        scaling=8**-0.5,
        query_index=query_index,
        key_index=key_index,
        query_position=query_index[None],
        key_position=key_index[None],
        key_valid=torch.ones(1, num_keys, dtype=torch.bool),
        padded=False,
        first_query=num_keys - num_queries,
    )
    return replace(inputs, **fields)


CASES: dict[str, dict[str, Any]] = {
    "plain": {"batch": 2},
    "whole tiles": {"num_queries": 64, "num_keys": 64},
    "more keys than queries": {"num_queries": 37, "num_keys": 83},
    "one query": {"num_queries": 1, "num_keys": 83},
    "one key": {"num_queries": 1, "num_keys": 1},
    "window": {"window": 21},
    "narrow window": {"window": 1, "num_queries": 50},
    "softcap": {"softcap": 2.0, "spread": 3.0},
    "not causal": {"causal": False},
    "window, not causal": {"causal": False, "window": 30},
    "large logits": {"spread": 15.0},
    "bfloat16": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("splits", "scoped"), [(1, False), (3, True)])
def test_inner_and_edge_tiles(name: str, splits: int, scoped: bool) -> None:
    case = {"num_queries": 83, "num_keys": 83} | CASES[name]
    inputs = long_call(**case)
    rows = torch.arange(inputs.num_queries)[None] >= 20 if scoped else None
    heads = torch.tensor([3, 0], dtype=torch.int32)
    tolerance = 1e-4 if name == "large logits" else 1e-5
    assert_columns(inputs, [], heads, rows, True, splits=splits, tolerance=tolerance)


@pytest.mark.parametrize("pad", ["left", "right"])
def test_padding_in_inner_tiles(pad: str) -> None:
    inputs = long_call(70, 70, batch=2)
    index = inputs.key_index
    first, stop = (40, 70) if pad == "left" else (0, 45)
    valid = torch.stack([(index >= first) & (index < stop), torch.ones(70, dtype=torch.bool)])
    # Whatever stands on a padded key, infinite or not a number.
    key = torch.where(valid[:, None, :, None], inputs.key, float("nan"))
    clean = replace(inputs, key_valid=valid, padded=True)
    expected = tapped_columns(clean, [], torch.arange(4), None, True)
    log_sum_exp = log_sum_exp_of(clean, [])
    dirty, log_sum_exp = on_device((replace(clean, key=key), log_sum_exp))
    found = column_pass(dirty, log_sum_exp, mean=True, config=SMALL)
    torch.testing.assert_close(found.double().cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("first_touched", [0, 33, 82])
@pytest.mark.parametrize("splits", [1, 3])
def test_edits_touch_some_tiles_only(first_touched: int, splits: int) -> None:
    """Untouched key tiles go the plain way, before and after the touched one; an allow pair shows future keys."""
    inputs = long_call(83, 83)
    touched = (inputs.key_index >= first_touched) & (inputs.key_index < first_touched + 5)
    some_rows = (torch.arange(83) % 7 == 0)[None]
    edits: list[Primitive] = [
        LogitMap(touched[None, None], scale=0.5, bias=torch.linspace(-1, 1, 4), rows=some_rows),
        Order(allow=((some_rows, touched[None]),), heads=torch.tensor([True, False, True, False])),
        Order(deny=((~some_rows, (inputs.key_index == first_touched)[None]),)),
    ]
    assert_columns(inputs, edits, torch.tensor([2, 1]), None, True, splits=splits)


def test_a_key_group_shorter_than_the_keys() -> None:
    inputs = long_call(40, 40)
    edits: list[Primitive] = [LogitMap((torch.arange(10) % 2 == 0)[None, None], bias=2.0)]
    assert_columns(inputs, edits, None, None, False)


def test_the_sizes_in_use() -> None:
    inputs = long_call(300, 300)
    expected = tapped_columns(inputs, [], torch.arange(4), None, False)
    log_sum_exp = log_sum_exp_of(inputs, [])
    for dtype_config in (None, module.CONFIGS[64]):
        found = column_pass(*on_device((inputs, log_sum_exp)), config=dtype_config)
        torch.testing.assert_close(found.double().cpu(), expected, rtol=1e-5, atol=1e-5)


def test_log_sum_exp_of_any_strides() -> None:
    inputs = long_call(50, 50, batch=2)
    log_sum_exp = log_sum_exp_of(inputs, [])
    strided = torch.zeros(50, 2, 4, 3)
    strided[..., 1] = log_sum_exp.permute(2, 0, 1)
    inputs, log_sum_exp, strided = on_device((inputs, log_sum_exp, strided))
    expected = column_pass(inputs, log_sum_exp, config=SMALL)
    found = column_pass(inputs, strided[..., 1].permute(1, 2, 0), config=SMALL)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_from_the_log_sum_exp_of_edited_flash(softcap: float | None) -> None:
    inputs = long_call(70, 70, softcap=softcap)
    edits: list[Primitive] = [LogitMap((inputs.key_index < 3)[None, None], bias=1.5)]
    expected = tapped_columns(inputs, edits, torch.arange(4), None, True)
    inputs, edits = on_device((inputs, edits))
    lowered = lower(inputs, edits)
    _, log_sum_exp = edited_flash(inputs, lowered, with_log_sum_exp=True)
    assert log_sum_exp is not None
    found = column_pass(inputs, log_sum_exp, lowered=lowered, mean=True, config=SMALL)
    torch.testing.assert_close(found.double().cpu(), expected, rtol=1e-5, atol=1e-5)


def test_sums_of_all_columns_are_the_number_of_rows() -> None:
    inputs = long_call(61, 70, batch=2)
    rows = torch.arange(61)[None] % 3 == 0
    log_sum_exp = log_sum_exp_of(inputs, [])
    found = column_pass(*on_device((inputs, log_sum_exp)), rows=on_device(rows), config=SMALL)
    torch.testing.assert_close(found.sum(-1).cpu(), torch.full((2, 4), float(rows.sum())))


def test_no_heads_and_a_regroup() -> None:
    inputs = long_call(5, 5, batch=2)
    log_sum_exp = log_sum_exp_of(inputs, [])
    regroup: list[Primitive] = [Regroup((inputs.key_index == 0)[None, None], keep=0.5)]
    inputs, log_sum_exp, regroup = on_device((inputs, log_sum_exp, regroup))
    none = torch.empty(0, dtype=torch.int64, device=log_sum_exp.device)
    assert column_pass(inputs, log_sum_exp, none).shape == (2, 0, 5)
    with pytest.raises(NotLowered, match="Regroup"):
        column_pass(inputs, log_sum_exp, lowered=lower(inputs, regroup))
