"""Every path that may be chosen gives what the specification says, and says which it was.

Without a GPU the kernels run in Triton's interpreter, and plain attention by edited flash stands in for the vendor's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch import Tensor

from attn_kernels import (
    AttentionInputs,
    Gate,
    HeadAffine,
    KeyTiles,
    LogitMap,
    Order,
    PowerOfTwoBlocks,
    Primitive,
    Regroup,
    SinkAndWindow,
    Sparsity,
    Tap,
    edited_attention_reference,
    head_selection,
    read_taps,
)
from attn_kernels.edited_attention import dispatch
from attn_kernels.edited_attention.edited_flash import edited_flash
from attn_kernels.edited_attention.lowering import NotLowered, lower
from tests.kernels.strategies import calls_with_edits, primitives
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


@given(calls_with_edits(kinds=(LogitMap, Order, Regroup, HeadAffine)))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_prompts_as_short_as_a_decode_step(case: tuple[AttentionInputs, list[Primitive]]) -> None:
    """Masks, padding, windows, softcap and sink logits, as the prompt's paths see them."""
    inputs, edits = case
    with mock.patch.object(dispatch, "DECODE_QUERIES", 0):
        path = check(inputs, edits)
    refusal = dispatch.vendor_refusal(inputs)
    if path.name != "pytorch" and refusal is not None:
        assert path == dispatch.Path("edited flash", f"no log-sum-exp from the vendor under {refusal}")


@given(st.data())
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_prompts_that_the_vendor_takes(data: st.DataObject) -> None:
    """With few enough keys for an epilogue, and with too many."""
    heads, kv_heads = data.draw(st.sampled_from([(2, 1), (3, 3), (4, 2)]))
    inputs = plain_call(data.draw(st.integers(0, 2**31)), data.draw(st.sampled_from([17, 33])), heads, kv_heads, 1.0)
    kinds = (LogitMap, Order, Regroup, HeadAffine)
    edits = [data.draw(primitives(inputs, kinds)) for _ in range(data.draw(st.integers(1, 3)))]
    most = data.draw(st.sampled_from([0, dispatch.MOST_KEYS]))
    # A row scope without a row has its own test.
    edits = [edit for edit in edits if getattr(edit, "rows", None) is None or bool(edit.rows.any())]
    with mock.patch.object(dispatch, "MOST_KEYS", most):
        path = check(inputs, edits)
    assert path.name != "decode"


@given(st.integers(0, 2**31), st.booleans(), st.booleans(), st.sampled_from([256, 12, 4]))
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_last_rows_under_edits_that_act_on_all_rows_too(seed: int, maps: bool, affine: bool, keys_of_part: int) -> None:
    inputs = plain_call(seed, 150, 4, 2, 1.0)
    index = inputs.key_index
    image, sinks = ((index >= 20) & (index < 130))[None, None], ((index == 0) | (index == 40))[None, None]
    rows = (index >= 135)[None]
    edits: list[Primitive] = [Regroup(sinks, 0.4, target=image & ~sinks, gate=Gate(image, 0.0), rows=rows)]
    if maps:
        edits.append(LogitMap(((index > 5) & (index < 9))[None, None], bias=2.0))
    if affine:
        edits.append(HeadAffine(gain=torch.tensor([1.0, 2.0, 1.0, 0.5])))
    # The longest untouched run, before the image, is cut into no, one or several parts.
    with (
        mock.patch.object(dispatch, "FEWEST_KEYS_OF_PART", keys_of_part),
        mock.patch.object(dispatch, "DECODE_QUERIES", 8),
    ):
        assert check(inputs, edits).name == "vendor + last rows"


def test_an_edit_of_all_rows_beside_an_order_of_the_last_rows() -> None:
    rows, keys = (torch.arange(40) >= 30)[None], torch.arange(40) < 20
    edits: list[Primitive] = [
        Order(deny=((rows, keys[None]),)),
        LogitMap((torch.arange(40) < 25)[None, None], bias=1.0),
    ]
    with mock.patch.object(dispatch, "MOST_KEYS", 0):
        assert check(small(), edits).name == "edited flash"


def test_many_first_keys() -> None:
    """An image that every later row sees edited, and a text of which no key is touched."""
    inputs = plain_call(4, 150, 4, 2, 1.0)
    index = inputs.key_index
    image, sinks = ((index >= 5) & (index < 90))[None, None], ((index == 0) | (index == 40))[None, None]
    edits: list[Primitive] = [Regroup(sinks, 0.4, target=image & ~sinks, rows=(index >= 90)[None])]
    with mock.patch.object(dispatch, "FEWEST_KEYS_FOR_VENDOR", 50), mock.patch.object(dispatch, "LAST_ROWS", 0):
        path = check(inputs, [*edits, LogitMap(sinks, bias=0.5), HeadAffine(gain=torch.ones(4) * 2)])
    assert (path.name, path.why) == ("vendor + first keys", "86 touched keys among the first 90")


def small(**fields: object) -> AttentionInputs:
    return replace(plain_call(0, 40, 2, 1, 1.0), **fields)


class Diagonal:
    def visible(self, query_position: Tensor, key_position: Tensor) -> Tensor:
        return query_position == key_position

    def __repr__(self) -> str:
        return "Diagonal"


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
        (small(), [Sparsity(SinkAndWindow(1, 4))], "sparse flash", "window=4"),
        (small(), [Sparsity(SinkAndWindow(1, 4), dense_rows=2)], "sparse flash", "window=4"),
        (small(), [Sparsity(PowerOfTwoBlocks(4, 1, 1), dense_rows=2)], "pytorch", "dense rows under"),
        (small(), [Sparsity(PowerOfTwoBlocks(4, 1, 1), heads=torch.tensor([True, False]))], "sparse flash", "block=4"),
        (small(), [Sparsity(SinkAndWindow(1, 4)), HeadAffine(gain=torch.tensor([1.0, 2.0]))], "sparse flash", "visits"),
        (small(), [Sparsity(SinkAndWindow(1, 4)), Sparsity(SinkAndWindow(0, 2))], "pytorch", "more than one Sparsity"),
        (small(), [Sparsity(SinkAndWindow(1, 4)), MAP], "pytorch", "beside other edits"),
        (small(), [Sparsity(KeyTiles(torch.ones(1, 1, 3, 3) > 0, 16, 16))], "sparse flash", "key tiles of 16"),
        (small(), [Sparsity(KeyTiles(torch.ones(1, 1, 4, 3) > 0, 10, 16))], "pytorch", "key tiles of 10"),
        (
            small(window=8),
            [Sparsity(KeyTiles(torch.ones(1, 1, 3, 3) > 0, 16, 16, torch.tensor([[[0, 5]]])))],
            "pytorch",
            "columns of keys in a sliding window",
        ),
        (small(), [Sparsity(Diagonal())], "pytorch", "the pattern Diagonal"),
        (small(causal=False), [Sparsity(SinkAndWindow(1, 4))], "pytorch", "not causal"),
        (
            small(mask=(torch.arange(40) != 3).expand(1, 1, 40, 40)),
            [Sparsity(SinkAndWindow(1, 4))],
            "pytorch",
            "mask of its own",
        ),
        (small(), [Regroup(SOME_KEYS, 0.5), Regroup(SOME_KEYS, 0.2)], "edited flash twice", "several Regroups"),
    ],
)
def test_the_path_and_why(inputs: AttentionInputs, edits: list[Primitive], name: str, why: str) -> None:
    path = check(inputs, edits)
    assert path.name == name
    assert why in path.why


def test_a_mask_that_changes_in_place_is_read_again() -> None:
    index = torch.arange(40)
    mask = (index <= index[:, None])[None, None].clone()
    inputs, edits = small(mask=mask), [Sparsity(SinkAndWindow(1, 4))]
    assert check(inputs, edits).name == "sparse flash"
    mask[..., 20:, 18] = False
    assert check(inputs, edits).name == "pytorch"


def test_a_mask_is_read_again_in_a_layer_with_a_window() -> None:
    """Which it does not say, so that the model does not have it."""
    index = torch.arange(40)
    mask, edits = (index <= index[:, None])[None, None], [Sparsity(SinkAndWindow(1, 4))]
    assert check(small(mask=mask), edits).name == "sparse flash"
    assert check(small(mask=mask, window=8), edits).name == "pytorch"
    assert check(small(mask=mask), edits).name == "sparse flash"


def test_taps_dropout_gradients_of_an_order_and_float64_go_to_pytorch() -> None:
    received: list[Tensor] = []
    tapped = [MAP, Tap("log_sum_exp", received.append)]
    assert dispatch.run(small(), tapped)[1] == dispatch.Path("pytorch", "a Tap reads the weights")
    assert len(received) == 1
    assert dispatch.run(small(dropout=0.5), [MAP])[1].why == "dropout"
    query = small().query.requires_grad_()
    output, path = dispatch.run(small(query=query), [Order(allow=(((torch.arange(40) < 9)[None], SOME_KEYS[0]),))])
    output.sum().backward()
    assert path.why == "gradients under an Order"
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


TO_LAST_ROWS = LogitMap((torch.arange(40) < 30)[None, None], bias=1.0, rows=(torch.arange(40) >= 35)[None])


@pytest.mark.parametrize(
    ("edit", "most_keys", "name"),
    [
        (MAP, 64, "vendor + epilogue"),
        (Regroup(SOME_KEYS, 0.3), 64, "vendor + epilogue"),
        (MAP, 0, "edited flash"),
        (TO_LAST_ROWS, 0, "vendor + last rows"),
        (HeadAffine(gain=torch.tensor([1.0, 2.0])), 64, "vendor + affine"),
    ],
)
def test_other_heads_are_equal_bit_for_bit(
    edit: Primitive, most_keys: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "MOST_KEYS", most_keys)
    chosen = edit if isinstance(edit, HeadAffine) else replace(edit, heads=torch.tensor([False, True]))
    inputs, edits = on_device((small(), [chosen]))
    output, path = dispatch.run(inputs, edits)
    plain, log_sum_exp = plain_attention(inputs)
    assert path.name == name
    assert torch.equal(output[:, 0], plain[:, 0])
    assert not torch.equal(output[:, 1], plain[:, 1])
    given, _ = dispatch.run(inputs, edits, vendor=(plain, log_sum_exp))
    assert torch.equal(given, output)


@pytest.mark.parametrize("fields", [{}, {"softcap": 5.0}, {"padded": True}, {"window": 8}], ids=str)
@pytest.mark.parametrize("num_queries", [1, 40])
def test_no_selected_head(fields: dict[str, object], num_queries: int) -> None:
    none = torch.tensor([False, False])
    inputs = last_queries(small(**fields), num_queries)
    edits = [replace(MAP, heads=none), Regroup(SOME_KEYS, 0.3, heads=none), HeadAffine(replace=none)]
    path = check(inputs, edits)
    assert path.name != "pytorch"


def last_queries(inputs: AttentionInputs, number: int) -> AttentionInputs:
    first = inputs.num_queries - number
    return replace(
        inputs,
        query=inputs.query[:, :, first:],
        query_index=inputs.query_index[first:],
        query_position=inputs.query_position[:, first:],
        first_query=first,
    )


@pytest.mark.parametrize("size", [40, 41, 50, 80])
@pytest.mark.parametrize("num_queries", [1, 7, 30])
def test_one_lowering_serves_calls_with_more_keys(size: int, num_queries: int) -> None:
    """Twice, since a call keeps lists and tiles on the lowered edits."""
    prompt, edits = on_device((small(), [MAP, Regroup(SOME_KEYS, 0.3), HeadAffine(gain=torch.tensor([1.0, 2.0]))]))
    lowered = lower(prompt, edits)
    dispatch.run(prompt, edits, lowered=lowered)
    later, _ = on_device((last_queries(plain_call(5, size, 2, 1, 1.0), num_queries), []))
    expected, _ = edited_attention_reference(*on_device((later, edits), "cpu"))
    for _ in range(2):
        output, path = dispatch.run(later, edits, lowered=lowered)
        assert path.name == ("decode" if num_queries <= dispatch.DECODE_QUERIES else "edited flash")
        torch.testing.assert_close(output.double().cpu(), expected, rtol=1e-3, atol=1e-3)


def test_many_keys_and_a_row_scope_without_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "MOST_KEYS", 0)
    check(small(), [replace(TO_LAST_ROWS, rows=torch.zeros(1, 40, dtype=torch.bool))])


def half_precision(head_dim: int, size: int, heads: int = 2) -> AttentionInputs:
    inputs = plain_call(3, size, heads, 1, 1.0)
    generator = torch.Generator().manual_seed(3)
    shapes = {"query": heads, "key": 1, "value": 1}
    drawn = {name: torch.randn(1, count, size, head_dim, generator=generator) for name, count in shapes.items()}
    return replace(inputs, scaling=head_dim**-0.5, **{name: part.bfloat16() for name, part in drawn.items()})


@pytest.mark.parametrize(
    "head_dim",
    [
        64,
        80,
        96,
        128,
    ],
)
def test_an_epilogue_for_each_head_dim(head_dim: int) -> None:
    inputs, edits = on_device((half_precision(head_dim, 40), [MAP]))
    expected, _ = edited_attention_reference(*on_device((inputs, edits), "cpu"))
    output, path = dispatch.run(inputs, edits)
    assert path.name == "vendor + epilogue"
    torch.testing.assert_close(output.double().cpu(), expected, rtol=3e-2, atol=3e-2)


def test_many_heads_on_one_key_head() -> None:
    """Falcon-7B has 71 query heads on one: times 16 queries more rows than the decode kernel takes."""
    check(plain_call(2, 16, 71, 1, 1.0), [LogitMap(SOME_KEYS[..., :16], bias=1.0)])


@pytest.mark.parametrize(
    "edit",
    [
        lambda factor: HeadAffine(gain=factor),
        lambda factor: HeadAffine(offset=factor[:, None].expand(2, 8)),
        lambda factor: LogitMap(SOME_KEYS, scale=factor),
        lambda factor: LogitMap(SOME_KEYS, bias=factor),
        lambda factor: Regroup(SOME_KEYS, factor),
    ],
    ids=["gain", "offset", "scale", "bias", "keep"],
)
@pytest.mark.parametrize("num_queries", [1, 40])
def test_gradients_of_an_edits_factors(edit: Callable[[Tensor], Primitive], num_queries: int) -> None:
    """The model may be frozen, as in LoFiT: nothing else asks for a gradient."""
    inputs = on_device(last_queries(small(), num_queries))
    factor = torch.tensor([0.5, 0.7], device=inputs.query.device, requires_grad=True)
    # A tensor that is there already stays the same tensor.
    output, path = dispatch.run(inputs, [on_device(edit(factor))])
    assert path.name == "edited flash with gradients"
    output.sum().backward()
    assert factor.grad is not None


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


@pytest.mark.parametrize("num_queries", [1, 150])
def test_a_target_with_hardly_any_mass_gives_no_infinity(num_queries: int) -> None:
    index = torch.arange(150)
    inputs = last_queries(plain_call(6, 150, 2, 1, 1.0), num_queries)
    image, sinks = ((index >= 10) & (index < 100))[None, None], (index < 2)[None, None]
    inputs, edits = on_device((inputs, [LogitMap(sinks, bias=-95.0), Regroup(image, 0.0, target=sinks)]))
    for fewest in (40, 512):
        with mock.patch.object(dispatch, "FEWEST_KEYS_FOR_VENDOR", fewest):
            assert dispatch.run(inputs, edits)[0].isfinite().all()


def test_heads_of_another_layer_bring_no_numbers_from_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a copy waits for the device, and every layer names heads of its own."""
    inputs = on_device(small())
    device = inputs.query.device
    here, there = (head_selection(chosen, device) for chosen in ([True, False], [False, True]))

    def edits(heads: Tensor) -> list[Primitive]:
        group = SOME_KEYS.to(device)
        return [LogitMap(group, bias=1.25, heads=heads), Regroup(group, 0.35, heads=heads)]

    lower(inputs, edits(here))
    made = mock.Mock(wraps=torch.tensor)
    monkeypatch.setattr(torch, "tensor", made)
    lowered = lower(inputs, edits(there))
    made.assert_not_called()
    assert lowered.heads is not None
    assert lowered.heads.tolist() == [1]
    assert lowered.map_coefficients[0, 2].tolist() == [0.0, 1.25]


@pytest.mark.parametrize("num_queries", [1, 40])
def test_heads_that_the_caller_knows_to_change(num_queries: int) -> None:
    gain, offset = torch.tensor([1.0, 2.0]), torch.zeros(2, 8)
    known = HeadAffine(gain=gain, offset=offset, heads=torch.tensor([False, True]))
    check(last_queries(small(), num_queries), [known, MAP])
    assert lower(small(), [known]).heads is not None


@given(calls_with_edits(kinds=(LogitMap, Order, Regroup, HeadAffine)), st.booleans(), st.data())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_masses_and_log_sum_exps_are_the_specifications(
    case: tuple[AttentionInputs, list[Primitive]], some_heads: bool, data: st.DataObject
) -> None:
    inputs, edits = case
    keys = torch.tensor(data.draw(st.lists(st.booleans(), min_size=inputs.num_keys, max_size=inputs.num_keys)))
    group = keys[None, None].expand(len(inputs.query), 1, -1)
    heads = torch.arange(0, inputs.num_heads, 2) if some_heads else None
    inputs, edits, group, heads = on_device((inputs, edits, group, heads))
    for kind in ("group_mass", "log_sum_exp"):
        expected: list[Tensor] = []
        is_mass = kind == "group_mass"
        tap = Tap("group_mass", expected.append, keys=group) if is_mass else Tap("log_sum_exp", expected.append)
        read_taps(inputs, [*edits, tap], heads)
        found = dispatch.row_totals(inputs, edits, heads, group if is_mass else None, [])
        if found is None:
            with pytest.raises(NotLowered):
                lower(inputs, edits)
            return
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected[0].float(), rtol=2e-3, atol=2e-3)


def test_what_no_kernel_can_sum_is_left_to_others() -> None:
    inputs = on_device(plain_call(0, 40, 4, 2, 1.0))
    by_head = torch.zeros(1, inputs.num_heads, 40, dtype=torch.bool, device=inputs.query.device)
    assert dispatch.row_totals(inputs, [], None, by_head, []) is None
    regroup = Regroup(by_head[:, :1], keep=0.5)
    assert dispatch.row_totals(inputs, [regroup, regroup], None, None, []) is None
    assert dispatch.row_totals(inputs, [regroup], None, by_head[:, :1], []) is not None
    vendor: list[tuple[Tensor, Tensor]] = []
    assert dispatch.row_totals(inputs, [], None, None, vendor) is vendor[0][1]


@given(calls_with_edits(kinds=(LogitMap, Order, HeadAffine)), st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_several_regroups_take_two_passes(case: tuple[AttentionInputs, list[Primitive]], data: st.DataObject) -> None:
    inputs, edits = case
    edits = edits[:1] + [data.draw(primitives(inputs, (Regroup,))) for _ in range(data.draw(st.integers(2, 3)))]
    shared = data.draw(st.sampled_from([True, True, False]))
    inputs = replace(inputs, sink_logits=None) if shared else inputs

    def for_kernels(edit: Primitive) -> Primitive:
        # At a gate's edge rounding would decide.
        if not isinstance(edit, Regroup):
            return edit
        target = edit.target if edit.target is None or not shared else edit.target[:, :1]
        return replace(edit, source=edit.source[:, :1] if shared else edit.source, target=target, gate=None)

    with mock.patch.object(dispatch, "DECODE_QUERIES", 0):
        path = check(inputs, [for_kernels(edit) for edit in edits])
    if shared:
        assert path.name == "edited flash twice"
    event(path.name)


@pytest.mark.parametrize("share", [0.0, 0.9, 0.9999])
def test_several_regroups_keep_their_digits_beside_a_heavy_sink(share: float) -> None:
    inputs = plain_call(1, 70, 4, 2, 1.0)
    inputs.key[:, :, 0] *= 1 + 30 * share
    source, image = torch.zeros(2, 1, 1, 70, dtype=torch.bool)
    source[..., :2], image[..., 5:50] = True, True
    everywhere = torch.ones(1, 1, 70, dtype=torch.bool)
    gate = Gate(of=everywhere, at_least=0.5, share=image, at_most=0.99)
    heads = head_selection([True, False, True, True], torch.device("cpu"))
    rows = (torch.arange(70) > 50)[None]
    edits: list[Primitive] = [
        Regroup(source, keep=0.4, target=image, gate=gate, heads=heads),
        Regroup(image, keep=torch.tensor([0.0, 0.5, 1.0, 0.7]), rows=rows),
        Regroup(source, keep=0.0),
    ]
    assert check(inputs, edits).name == "edited flash twice"
