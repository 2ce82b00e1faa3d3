"""The epilogue on plain attention, with flagged tiles computed again, against the literal specification."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from attn_kernels import (
    AttentionInputs,
    HeadAffine,
    LogitMap,
    Order,
    Primitive,
    Regroup,
    edited_attention,
    edited_attention_reference,
)
from attn_kernels.edited_attention import epilogue
from attn_kernels.edited_attention.edited_flash import edited_flash
from attn_kernels.edited_attention.epilogue import epilogue_
from attn_kernels.edited_attention.lowering import NotLowered, lower
from attn_kernels.primitives import SMALLEST_TARGET
from tests.kernels.strategies import primitives
from tests.kernels.triton_device import on_device

FLASH = (64, 64, 4, 1)


def plain_call(seed: int, size: int, heads: int, kv_heads: int, spread: float, batch: int = 1) -> AttentionInputs:
    generator = torch.Generator().manual_seed(seed)
    index = torch.arange(size)
    return AttentionInputs(
        query=torch.randn(batch, heads, size, 16, generator=generator) * spread,
        key=torch.randn(batch, kv_heads, size, 16, generator=generator),
        value=torch.randn(batch, kv_heads, size, 8, generator=generator),
        scaling=0.25,
        query_index=index,
        key_index=index,
        query_position=index[None],
        key_position=index[None],
        key_valid=torch.ones(1, size, dtype=torch.bool),
        first_query=0,
        padded=False,
    )


def by_epilogue(inputs: AttentionInputs, edits: list[Primitive]) -> tuple[Tensor, Tensor]:
    lowered = lower(inputs, edits)
    output, log_sum_exp = edited_flash(inputs, lower(inputs, []), with_log_sum_exp=True, config=FLASH)
    assert log_sum_exp is not None
    flags = epilogue_(inputs, lowered, output, log_sum_exp, rows_per_flag=FLASH[0])
    edited_flash(inputs, lowered, output=output, row_tiles=flags, config=FLASH)
    return output, flags


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_equals_the_specification(data: st.DataObject) -> None:
    heads, kv_heads = data.draw(st.sampled_from([(2, 1), (3, 3), (4, 2)]))
    spread = data.draw(st.sampled_from([0.3, 1.0, 20.0]))
    size = data.draw(st.sampled_from([1, 5, 70]))
    inputs = plain_call(data.draw(st.integers(0, 2**31)), size, heads, kv_heads, spread, data.draw(st.integers(1, 2)))
    kinds = (LogitMap, Order, Regroup, HeadAffine)
    edits = [data.draw(primitives(inputs, kinds)) for _ in range(data.draw(st.integers(1, 3)))]
    inputs, edits = on_device((inputs, edits))
    try:
        lowered = lower(inputs, edits)
    except NotLowered:
        assume(False)
    assume(lowered.order_values is None and lowered.edits_weights)
    expected, _ = edited_attention_reference(*on_device((inputs, edits), "cpu"))
    output, _ = by_epilogue(inputs, edits)
    torch.testing.assert_close(output.double().cpu(), expected, rtol=2e-3, atol=2e-3)


def test_a_target_without_mass_in_float32_gives_nothing_by_any_way() -> None:
    inputs = plain_call(0, 70, 2, 1, 20.0)
    keys = inputs.key_index
    source, target = (keys % 3 == 0)[None, None], (keys % 7 == 1)[None, None]
    weights = edited_attention_reference(inputs, [])[1]
    of_target = weights.masked_fill(~target, 0).sum(-1)
    assert bool(((of_target > 0) & (of_target < SMALLEST_TARGET)).any())
    edits: list[Primitive] = [Regroup(source, keep=0.0, target=target)]
    expected, _ = edited_attention_reference(inputs, edits)
    by_blocks = edited_attention(inputs, edits)
    torch.testing.assert_close(by_blocks.double(), expected, rtol=2e-3, atol=2e-3)
    output, _ = by_epilogue(*on_device((inputs, edits)))
    torch.testing.assert_close(output.double().cpu(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("mass", [0.5, 0.99, 0.9999])
def test_tiles_that_would_lose_digits_are_computed_again(mass: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sink of this mass in bf16: as exact as attention without edits in that dtype, and not so without the flags."""
    inputs = plain_call(3, 130, 2, 1, 1.0)
    index = inputs.key_index
    query, key, value = (part.to(torch.bfloat16) for part in (inputs.query, inputs.key, inputs.value))
    # A first key of large norm along a direction that every query shares.
    lift = torch.logit(torch.tensor(mass, dtype=torch.float64)).item() + torch.tensor(130.0).log().item()
    query[..., 0] = 2.0
    key[..., 0] = 0.0
    key[:, :, 0] = 0.0
    key[:, :, 0, 0] = lift / (2.0 * inputs.scaling)
    value[:, :, 0] = 3.0
    inputs = AttentionInputs(
        **{name: getattr(inputs, name) for name in inputs.__dataclass_fields__}
        | {"query": query, "key": key, "value": value}
    )
    edits: list[Primitive] = [Regroup((index == 0)[None, None], keep=0.4)]
    inputs, edits = on_device((inputs, edits))
    expected, _ = edited_attention_reference(*on_device((inputs, edits), "cpu"))
    plain, _ = edited_attention_reference(*on_device((inputs, []), "cpu"))
    attention, _ = edited_flash(inputs, lower(inputs, []), config=FLASH)

    def relative(found: Tensor, wanted: Tensor) -> float:
        return float((found.double().cpu() - wanted)[:, :, 1:].norm() / wanted[:, :, 1:].norm())

    output, flags = by_epilogue(inputs, edits)
    assert relative(output, expected) < 2 * max(relative(attention, plain), torch.finfo(torch.bfloat16).eps / 2)
    if mass >= 0.99:
        assert bool(flags.any())
        monkeypatch.setattr(epilogue, "GROWTH", 1e9)
        monkeypatch.setattr(epilogue, "SMALLEST_REMAINDER", 0.0)
        careless, _ = by_epilogue(inputs, edits)
        assert relative(careless, expected) > 4 * relative(output, expected)
