"""Every path that may be chosen gives what the specification says, and says which it was.

Without a GPU the kernels run in Triton's interpreter, and plain attention by edited flash stands in for the vendor's.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
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
    SinkAndWindow,
    Sparsity,
    Tap,
    edited_attention_reference,
)
from attn_kernels.edited_attention import dispatch
from attn_kernels.edited_attention.edited_flash import edited_flash
from attn_kernels.edited_attention.lowering import lower
from tests.kernels.strategies import calls_with_edits
from tests.kernels.test_epilogue import plain_call
from tests.kernels.triton_device import on_device


def plain_attention(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    output, log_sum_exp = edited_flash(inputs, lower(inputs, []), with_log_sum_exp=True)
    assert log_sum_exp is not None
    return output, log_sum_exp


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = dispatch.vendor_refusal
    monkeypatch.setattr(dispatch, "on_gpu", lambda inputs: True)
    monkeypatch.setattr(dispatch, "vendor_attention", plain_attention)
    # The stand-in takes what the vendor does not: float32 and heads of odd sizes.
    monkeypatch.setattr(
        dispatch, "vendor_refusal", lambda i: None if refusal(i) in ("float32", "head_dim") else refusal(i)
    )


def check(inputs: AttentionInputs, edits: list[Primitive]) -> dispatch.Path:
    inputs, edits = on_device((inputs, edits))
    expected, _ = edited_attention_reference(*on_device((inputs, edits), "cpu"))
    output, path = dispatch.run(inputs, edits)
    torch.testing.assert_close(output.double().cpu(), expected, rtol=2e-3, atol=2e-3)
    return path


@given(calls_with_edits(kinds=(LogitMap, Order, Regroup, HeadAffine, Sparsity)))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_chosen_equals_the_specification(case: tuple[AttentionInputs, list[Primitive]]) -> None:
    inputs, edits = case
    edits = [replace(edit, gate=None) if isinstance(edit, Regroup) else edit for edit in edits]
    check(inputs, edits)


@given(st.integers(0, 2**31), st.booleans(), st.booleans())
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_last_rows_under_edits_that_act_on_all_rows_too(seed: int, maps: bool, affine: bool) -> None:
    inputs = plain_call(seed, 150, 4, 2, 1.0)
    index = inputs.key_index
    image, sinks = ((index >= 20) & (index < 130))[None, None], ((index == 0) | (index == 40))[None, None]
    rows = (index >= 135)[None]
    edits: list[Primitive] = [Regroup(sinks, 0.4, target=image & ~sinks, gate=Gate(image, 0.0), rows=rows)]
    if maps:
        edits.append(LogitMap(((index > 5) & (index < 9))[None, None], bias=2.0))
    if affine:
        edits.append(HeadAffine(gain=torch.tensor([1.0, 2.0, 1.0, 0.5])))
    assert check(inputs, edits).name == "vendor + last rows"


def small(**fields: object) -> AttentionInputs:
    return replace(plain_call(0, 40, 2, 1, 1.0), **fields)


SOME_KEYS = (torch.arange(40) < 3)[None, None]
MAP = LogitMap(SOME_KEYS, bias=1.0)


@pytest.mark.parametrize(
    ("inputs", "edits", "name", "why"),
    [
        (small(), [MAP], "vendor + epilogue", "3 touched keys"),
        (small(), [LogitMap(SOME_KEYS.expand(1, 2, 40), bias=1.0)], "vendor + epilogue", "by head"),
        (small(), [HeadAffine(gain=torch.tensor([1.0, 2.0]))], "vendor + affine", "no edit of the weights"),
        (small(softcap=5.0), [MAP], "edited flash", "softcap"),
        (small(window=8), [MAP], "edited flash", "sliding window"),
        (small(padded=True), [MAP], "edited flash", "padding"),
        (small(sink_logits=torch.zeros(1, 2, 1)), [MAP], "edited flash", "sink logits"),
        (small(), [Order(torch.arange(40)[None], torch.arange(40)[None])], "edited flash", "order by value"),
        (small(), [Sparsity(SinkAndWindow(1, 4))], "pytorch", "Sparsity"),
        (small(), [Regroup(SOME_KEYS, 0.5), Regroup(SOME_KEYS, 0.2)], "pytorch", "more than one Regroup"),
    ],
)
def test_the_path_and_why(inputs: AttentionInputs, edits: list[Primitive], name: str, why: str) -> None:
    path = check(inputs, edits)
    assert path.name == name
    assert why in path.why


def test_taps_dropout_gradients_and_float64_go_to_pytorch() -> None:
    received: list[Tensor] = []
    tapped = [MAP, Tap("log_sum_exp", received.append)]
    assert dispatch.run(small(), tapped)[1] == dispatch.Path("pytorch", "a Tap reads the weights")
    assert len(received) == 1
    assert dispatch.run(small(dropout=0.5), [MAP])[1].why == "dropout"
    query = small().query.requires_grad_()
    output, path = dispatch.run(small(query=query), [MAP])
    output.sum().backward()
    assert path.why == "gradients"
    assert query.grad is not None
    doubled = {name: getattr(small(), name).double() for name in ("query", "key", "value")}
    assert dispatch.run(small(**doubled), [MAP])[1].why == "float64"


def test_heads_that_no_edit_selects_keep_the_vendors_output() -> None:
    inputs, edits = on_device((small(), [replace(MAP, heads=torch.tensor([False, True]))]))
    output, _ = dispatch.run(inputs, edits)
    plain, _ = plain_attention(inputs)
    assert torch.equal(output[:, 0], plain[:, 0])
    assert not torch.equal(output[:, 1], plain[:, 1])
    inputs, edits = on_device((small(), [replace(MAP, heads=torch.tensor([False, False]))]))
    assert torch.equal(dispatch.run(inputs, edits)[0], plain)


def test_edits_lowered_on_the_prompt_serve_later_steps() -> None:
    """Keys generated later are in no group."""
    inputs, edits = on_device((small(), [MAP, Regroup(SOME_KEYS, 0.3)]))
    lowered = lower(inputs, edits)
    later = plain_call(5, 50, 2, 1, 1.0)
    step = replace(
        later,
        query=later.query[:, :, -1:],
        query_index=later.query_index[-1:],
        query_position=later.query_position[:, -1:],
        first_query=49,
    )
    step, _ = on_device((step, []))
    expected, _ = edited_attention_reference(*on_device((step, edits), "cpu"))
    output, path = dispatch.run(step, edits, lowered=lowered, path=dispatch.choose(step, lowered))
    assert path.name == "decode"
    torch.testing.assert_close(output.double().cpu(), expected, rtol=1e-4, atol=1e-4)
