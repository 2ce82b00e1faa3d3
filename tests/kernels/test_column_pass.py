"""The column pass against the specification's weights."""

from __future__ import annotations

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from attn_kernels import LogitMap, Order, edited_attention_reference, read_taps
from attn_kernels.edited_attention.column_pass import column_pass
from attn_kernels.edited_attention.edited_flash import edited_flash
from attn_kernels.edited_attention.lowering import NotLowered, lower
from attn_kernels.primitives import Tap
from tests.kernels.strategies import attention_inputs, primitives
from tests.kernels.triton_device import on_device

SMALL = (16, 64, 4, 1)


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_equals_the_column_sums_and_means_of_the_specification(data: st.DataObject) -> None:
    inputs = data.draw(attention_inputs())
    edits = [data.draw(primitives(inputs, (LogitMap, Order))) for _ in range(data.draw(st.integers(0, 2)))]
    chosen = torch.randperm(inputs.num_heads)[: data.draw(st.integers(1, inputs.num_heads))].sort().values
    rows = torch.rand(inputs.query.shape[0], inputs.num_queries) < data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    _, weights = edited_attention_reference(inputs, edits)
    expected_sum = torch.where(rows[:, None, :, None], weights, 0.0).sum(2)[:, chosen]
    means: list[torch.Tensor] = []
    read_taps(inputs, [*edits, Tap("column_mean", means.append, rows=rows)], chosen)

    inputs, edits, chosen, rows = on_device((inputs, edits, chosen, rows))
    try:
        lowered = lower(inputs, edits)
    except NotLowered:
        assume(False)
    _, log_sum_exp = edited_flash(inputs, lowered, with_log_sum_exp=True, config=SMALL)
    assert log_sum_exp is not None
    found = column_pass(inputs, log_sum_exp, chosen, lowered, rows)
    torch.testing.assert_close(found.double().cpu(), expected_sum, rtol=2e-3, atol=2e-3)
    found = column_pass(inputs, log_sum_exp, chosen, lowered, rows, mean=True)
    torch.testing.assert_close(found.cpu(), means[0], rtol=2e-3, atol=2e-3)
