"""The decode kernel against the literal specification: in the interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from attn_kernels import (
    AttentionInputs,
    Gate,
    HeadAffine,
    LogitMap,
    Order,
    Primitive,
    Ranking,
    Regroup,
    edited_attention_reference,
)
from attn_kernels.edited_attention.lowering import LoweredEdits, NotLowered, lower
from tests.kernels.strategies import attention_inputs, calls_with_edits
from tests.kernels.triton_device import DEVICE, on_device

# The package's name for it is the function of the same name.
decode = importlib.import_module("attn_kernels.edited_attention.decode")
edited_decode, number_of_splits = decode.edited_decode, decode.number_of_splits
CONFIGS, MOST_ROWS = decode.CONFIGS, decode.MOST_ROWS
KINDS = (LogitMap, Order, Regroup, HeadAffine, Ranking)
# Tiles so small that a toy call has several of them.
SMALL = (16, 4, 1)


def lowered_or_assume(inputs: AttentionInputs, edits: list[Primitive]) -> LoweredEdits:
    try:
        return lower(inputs, edits)
    except NotLowered:
        assume(False)
        raise


def ungated(edits: list[Primitive]) -> list[Primitive]:
    """Gates compare masses with a threshold, where float32 and float64 may fall on different sides."""
    return [replace(edit, gate=None) if isinstance(edit, Regroup) else edit for edit in edits]


def reference(inputs: AttentionInputs, edits: list[Primitive]) -> tuple[Tensor, Tensor]:
    return edited_attention_reference(*on_device((inputs, edits), "cpu"))


def assert_equal(output: Tensor, expected: Tensor, tolerance: float) -> None:
    assert not output.isnan().any()
    torch.testing.assert_close(output.double().cpu(), expected, rtol=tolerance, atol=tolerance)


def long_call(
    num_keys: int,
    num_queries: int = 1,
    heads: tuple[int, int] = (4, 2),
    batch: int = 2,
    dims: tuple[int, int] = (16, 16),
) -> AttentionInputs:
    """A decode call without padding whose cache has several tiles."""
    generator = torch.Generator().manual_seed(num_keys)
    key_index = torch.arange(num_keys)
    query_index = key_index[num_keys - num_queries :]
    return AttentionInputs(
        query=torch.randn(batch, heads[0], num_queries, dims[0], generator=generator),
        key=torch.randn(batch, heads[1], num_keys, dims[0], generator=generator),
        value=torch.randn(batch, heads[1], num_keys, dims[1], generator=generator),
        scaling=dims[0] ** -0.5,
        query_index=query_index,
        key_index=key_index,
        query_position=query_index[None],
        key_position=key_index[None],
        key_valid=torch.ones(1, num_keys, dtype=torch.bool),
        first_query=num_keys - num_queries,
        padded=False,
    )


def group(num_keys: int, *indices: int | slice) -> Tensor:
    keys = torch.zeros(1, 1, num_keys, dtype=torch.bool)
    for index in indices:
        keys[..., index] = True
    return keys


@given(calls_with_edits(kinds=KINDS))
@settings(max_examples=60, deadline=None)
def test_equals_the_specification(case: tuple[AttentionInputs, list[Primitive]]) -> None:
    inputs, edits = on_device((case[0], ungated(case[1])))
    lowered = lowered_or_assume(inputs, edits)
    expected, _ = reference(inputs, edits)
    assert_equal(edited_decode(inputs, lowered, config=SMALL), expected, 2e-3)


@pytest.mark.parametrize("splits", [1, 2, 5])
@given(
    keep=st.sampled_from([0.0, 0.3, 1.0]),
    with_target=st.booleans(),
    gated=st.booleans(),
    by_head=st.booleans(),
    num_queries=st.sampled_from([1, 3]),
)
@settings(max_examples=8, deadline=None)
def test_any_number_of_splits(
    splits: int, keep: float, with_target: bool, gated: bool, by_head: bool, num_queries: int
) -> None:
    inputs = long_call(75, num_queries)
    source, target = group(75, 0, 40), group(75, 1, slice(20, 60))
    if by_head:
        source = source & (torch.arange(4) != 1)[:, None]
    # The gate is open in some rows and shut in others, and no mass is near a threshold.
    gate = Gate(group(75, slice(0, 40)), at_least=0.35, share=group(75, slice(0, 20)), at_most=0.55) if gated else None
    rows = torch.tensor([[True] * num_queries, [i != 1 for i in range(num_queries)]])
    edits: list[Primitive] = [
        LogitMap(group(75, slice(10, 30)), scale=0.5, absolute=0.25, bias=torch.linspace(-1, 1, 4)),
        Regroup(source, keep, target if with_target else None, gate, rows=rows),
        HeadAffine(gain=torch.linspace(0.5, 2, 4), offset=torch.ones(2, 4, 16)),
    ]
    inputs, edits = on_device((inputs, edits))
    expected, _ = reference(inputs, edits)
    output = edited_decode(inputs, lower(inputs, edits), splits=splits, config=SMALL)
    assert_equal(output, expected, 1e-4)


def test_gates_open_and_shut_by_row() -> None:
    inputs = long_call(40, num_queries=3, heads=(6, 2))
    source = group(40, slice(0, 10))
    _, weights = reference(inputs, [])
    threshold = float(weights[..., :10].sum(-1).median()) + 1e-3
    for edit in (
        Regroup(source, 0.1, gate=Gate(source, at_least=threshold)),
        Regroup(source, 0.1, group(40, 20), gate=Gate(group(40, slice(0, 40)), share=source, at_most=threshold)),
    ):
        case, edits = on_device((inputs, [edit]))
        expected, edited = reference(case, edits)
        changed = (edited - weights).abs().sum(-1) > 1e-6
        assert bool(changed.any())
        assert not bool(changed.all())
        assert_equal(edited_decode(case, lower(case, edits), splits=2, config=SMALL), expected, 1e-4)


@given(inputs=attention_inputs(), splits=st.sampled_from([1, 2]))
@settings(max_examples=25, deadline=None)
def test_log_sum_exp_is_that_of_the_edited_logits(inputs: AttentionInputs, splits: int) -> None:
    first = (torch.arange(inputs.num_keys) == 0)[None, None]
    edits: list[Primitive] = [LogitMap(first, bias=1.0), Regroup(first, keep=0.5)]
    inputs, edits = on_device((inputs, edits))
    output, log_sum_exp = edited_decode(
        inputs, lower(inputs, edits), return_log_sum_exp=True, splits=splits, config=SMALL
    )
    expected, _ = reference(inputs, edits)
    assert_equal(output, expected, 2e-3)
    # Lifting every key by the same amount lifts the log-sum-exp by as much, less what a sink logit keeps.
    _, weights = reference(inputs, edits[:1])
    sees = weights.sum(-1) > 0
    log_sum_exp = log_sum_exp.double().cpu()
    assert log_sum_exp.shape == weights.shape[:3]
    if inputs.sink_logits is None:
        assert bool((log_sum_exp[~sees] == -torch.inf).all())
        scores = _edited_scores(on_device(inputs, "cpu"), first)
        torch.testing.assert_close(log_sum_exp[sees], scores.logsumexp(-1)[sees], rtol=1e-3, atol=1e-3)
    else:
        sink = on_device(inputs, "cpu").sink_logits.double().expand(weights.shape[:3])
        torch.testing.assert_close((sink - log_sum_exp).exp(), 1 - weights.sum(-1), rtol=2e-3, atol=2e-3)


def _edited_scores(inputs: AttentionInputs, first: Tensor) -> Tensor:
    key = inputs.key.double().repeat_interleave(inputs.num_heads // inputs.key.shape[1], 1)
    scores = inputs.query.double() @ key.transpose(-1, -2) * inputs.scaling
    if inputs.softcap is not None:
        scores = inputs.softcap * torch.tanh(scores / inputs.softcap)
    visible = inputs.visible(slice(0, inputs.num_queries))
    if inputs.bias is not None:
        scores = scores + torch.where(visible, inputs.bias, 0.0)
    return (scores + first[:, :, None].double()).masked_fill(~visible, -torch.inf)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("mass", [0.99, 0.9999, 0.999999])
def test_a_source_that_holds_nearly_all_mass_costs_no_digits(mass: float, splits: int) -> None:
    inputs = long_call(70, heads=(2, 1), batch=1, dims=(32, 32))
    sink = group(70, 0)
    lift = float(torch.logit(torch.tensor(mass, dtype=torch.float64))) + 4.0
    edits: list[Primitive] = [LogitMap(sink, bias=lift), Regroup(sink, keep=0.4)]
    inputs, edits = on_device((inputs, edits))
    _, weights = reference(inputs, edits[:1])
    assert float(weights[..., 0].min()) > 0.9 * mass
    expected, _ = reference(inputs, edits)
    assert_equal(edited_decode(inputs, lower(inputs, edits), splits=splits, config=SMALL), expected, 1e-5)


@pytest.mark.parametrize("with_target", [False, True])
@pytest.mark.parametrize("splits", [1, 3])
def test_scores_in_the_hundreds(splits: int, with_target: bool) -> None:
    """The target's mass beside the source's is far below what float32 can hold, and still receives what is freed."""
    inputs = long_call(70, heads=(2, 1), batch=1)
    sink = group(70, 0)
    target = group(70, slice(5, 50)) if with_target else None
    edits: list[Primitive] = [LogitMap(sink, bias=400.0), Regroup(sink, keep=0.25, target=target)]
    inputs, edits = on_device((inputs, edits))
    expected, _ = reference(inputs, edits)
    assert_equal(edited_decode(inputs, lower(inputs, edits), splits=splits, config=SMALL), expected, 1e-4)


@pytest.mark.parametrize("splits", [1, 2])
def test_a_row_that_sees_nothing_gives_zeros(splits: int) -> None:
    inputs = long_call(40, num_queries=2)
    hidden = torch.ones(2, 1, 2, 40, dtype=torch.bool)
    hidden[1, :, 0] = False
    no_valid = replace(inputs, key_valid=torch.tensor([[True], [False]]).expand(2, 40), padded=True)
    edits: list[Primitive] = [Regroup(group(40, 3), 0.5, gate=Gate(group(40, 3), 0.0, group(40, 4), 1.0))]
    for case in (replace(inputs, mask=hidden), no_valid):
        case, on_it = on_device((case, edits))
        output, log_sum_exp = edited_decode(
            case, lower(case, on_it), return_log_sum_exp=True, splits=splits, config=SMALL
        )
        assert_equal(output, reference(case, on_it)[0], 1e-4)
        assert bool((output[1, :, 0] == 0).all())
        assert bool((log_sum_exp[1, :, 0] == -torch.inf).all())


@pytest.mark.parametrize("regrouped", [False, True])
@pytest.mark.parametrize("dims", [(64, 80), (7, 33)])
def test_rows_and_head_sizes_that_are_no_power_of_two(dims: tuple[int, int], regrouped: bool) -> None:
    """7 query heads share a key and value head, and with 5 queries need more than one program."""
    inputs = long_call(50, num_queries=5, heads=(7, 1), batch=1, dims=dims)
    edits: list[Primitive] = [Regroup(group(50, 0), 0.5, group(50, 1, 2))] if regrouped else []
    inputs, edits = on_device((inputs, edits))
    assert_equal(edited_decode(inputs, lower(inputs, edits), splits=2, config=SMALL), reference(inputs, edits)[0], 1e-4)


def test_strides_of_a_cache_that_is_not_contiguous() -> None:
    inputs = long_call(40)
    edits: list[Primitive] = [LogitMap(group(40, 2), bias=2.0)]
    key, value = (
        torch.cat([part, part], 2).transpose(1, 2).contiguous().transpose(1, 2)[:, :, :40]
        for part in (inputs.key, inputs.value)
    )
    inputs = replace(inputs, key=key, value=value, query=inputs.query.transpose(2, 3).contiguous().transpose(2, 3))
    inputs, edits = on_device((inputs, edits))
    assert_equal(edited_decode(inputs, lower(inputs, edits), config=SMALL), reference(inputs, edits)[0], 1e-4)


def test_keys_after_the_codes_are_touched_by_no_edit() -> None:
    """The engine lowers once; the cache grows while it decodes."""
    inputs = long_call(60)
    short, whole = [Regroup(group(41, 0, 33), 0.5)], [Regroup(group(60, 0, 33), 0.5)]
    lowered = lower(inputs, on_device(short))
    inputs, edits = on_device((inputs, list[Primitive](whole)))
    assert_equal(edited_decode(inputs, on_device(lowered), splits=2, config=SMALL), reference(inputs, edits)[0], 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_plain_attention(dtype: torch.dtype) -> None:
    inputs = long_call(200, heads=(4, 2), dims=(64, 64))
    inputs = replace(inputs, **{name: getattr(inputs, name).to(dtype) for name in ("query", "key", "value")})
    expected, _ = reference(inputs, [])
    plain = functional.scaled_dot_product_attention(inputs.query, inputs.key, inputs.value, enable_gqa=True)
    inputs, edits = on_device((inputs, list[Primitive]([Regroup(group(200, 0), 1.0)])))
    for chosen in ([], edits):
        output = edited_decode(inputs, lower(inputs, chosen), splits=3, config=SMALL)
        assert output.dtype == dtype
        error = (output.double().cpu() - expected).abs()
        # The interpreter truncates to bfloat16, which doubles every rounding error.
        allowed = 4 if dtype == torch.bfloat16 and DEVICE == "cpu" else 2
        assert float(error.max()) <= allowed * float((plain.double() - expected).abs().max())


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("window", [None, 9])
def test_pages(window: int | None, splits: int) -> None:
    """Samples of different lengths, their pages anywhere in the pool."""
    lengths, page_size = [45, 18], 8
    generator = torch.Generator().manual_seed(3)
    order = torch.randperm(20, generator=generator)
    page_table = order[:12].reshape(2, 6).to(torch.int32)
    key_pages, value_pages = torch.randn(2, 20, page_size, 2, 16, generator=generator)
    edits: list[Primitive] = [LogitMap(group(48, slice(3, 9)), bias=1.0), Regroup(group(48, 0, 12), 0.5)]
    whole = replace(long_call(48, num_queries=2), window=window)
    paged = on_device(replace(whole, key=key_pages, value=value_pages))
    lowered = lower(paged, on_device(edits))
    output = edited_decode(
        paged,
        on_device(lowered),
        page_table=page_table.to(DEVICE),
        lengths=torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
        splits=splits,
        config=SMALL,
    )
    for b, length in enumerate(lengths):
        key, value = (
            pages[page_table[b].long()].flatten(0, 1)[:length].transpose(0, 1)[None]
            for pages in (key_pages, value_pages)
        )
        one = replace(long_call(length, num_queries=2, batch=1), query=whole.query[b : b + 1], key=key, value=value)
        cut = [replace(edit, **_cut(edit, length)) for edit in edits]
        expected, _ = edited_attention_reference(replace(one, window=window), cut)
        assert_equal(output[b : b + 1], expected, 1e-4)


def _cut(edit: Primitive, length: int) -> dict[str, Tensor]:
    name = "source" if isinstance(edit, Regroup) else "keys"
    return {name: getattr(edit, name)[..., :length]}


def test_refuses_more_rows_than_it_takes() -> None:
    inputs = on_device(long_call(MOST_ROWS, num_queries=MOST_ROWS // 2 + 1, heads=(4, 2)))
    with pytest.raises(NotLowered, match="1026 rows"):
        edited_decode(inputs, lower(inputs, []))


def test_calls_that_follow_one_another_find_their_counters_at_zero() -> None:
    inputs = on_device(long_call(40))
    lowered = lower(inputs, [])
    first = edited_decode(inputs, lowered, splits=2, config=SMALL)
    second = edited_decode(inputs, lowered, splits=3, config=SMALL)
    torch.testing.assert_close(first, second)


def test_a_call_like_an_earlier_one_goes_to_the_compiled_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the arguments that Triton's own launch would have passed on, at a later length of the cache."""
    launches: list[tuple[str, str, dict[str, object]]] = []

    class Compiled:
        def __init__(self, kernel: str, names: list[str]) -> None:
            self.kernel, self.names = kernel, names

        def __getitem__(self, grid: tuple[int, ...]):
            return lambda *args: launches.append((self.kernel, "compiled", dict(zip(self.names, args, strict=True))))

    class Triton(Compiled):
        def __getitem__(self, grid: tuple[int, ...]):
            def launch(*args: object, **options: object) -> Compiled:
                launches.append((self.kernel, "triton", dict(zip(self.names, args, strict=True))))
                return Compiled(self.kernel, self.names)

            return launch

    for kernel in ("_edited_decode", "_merge"):
        names = list(inspect.signature(getattr(decode, kernel).fn).parameters)
        monkeypatch.setattr(decode, kernel, Triton(kernel, names))
    edits = on_device([Regroup(group(41, 0), 0.5)])
    lowered = lower(on_device(long_call(60)), edits)
    for num_keys in (60, 61):
        edited_decode(on_device(long_call(num_keys)), lowered, splits=2)
    edited_decode(on_device(replace(long_call(62), softcap=5.0)), lowered, splits=3)
    whole_call = ["_edited_decode", "_merge"]
    assert [kernel for kernel, _, _ in launches] == whole_call * 3
    assert [by for _, by, _ in launches] == ["triton"] * 2 + ["compiled"] * 2 + ["triton"] * 2
    for which, expected in enumerate(({"num_keys", "query_offset", "k_b", "k_h", "v_b", "v_h"}, set())):
        first, second = launches[which][2], launches[2 + which][2]
        tensors = {name for name in first if isinstance(first[name], Tensor)}
        assert tensors == {name for name in second if isinstance(second[name], Tensor)}
        assert {name for name in first if name not in tensors and first[name] != second[name]} == expected


def test_a_call_without_regroup_is_one_launch_unless_it_merges_much(monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[int] = []

    class Counted:
        def __getitem__(self, grid: tuple[int, ...]):
            return lambda *args, **options: launches.append(args[3])

    monkeypatch.setattr(decode, "_merge", Counted())
    for num_queries, regrouped, expected in ((1, False, []), (1, True, [4]), (32, False, [4])):
        launches.clear()
        monkeypatch.setattr(decode, "MOST_MERGED_IN_PLACE", 4 * 16 * 16)
        monkeypatch.setattr(decode, "can_overlap", lambda device: False)
        edits = on_device([Regroup(group(64, 0), 0.5)] if regrouped else [])
        inputs = on_device(long_call(64, num_queries))
        edited_decode(inputs, lower(inputs, edits), splits=4, config=SMALL)
        assert launches == expected


@pytest.mark.parametrize("splits", [3, 40])
def test_many_rows_merged_by_a_second_launch(monkeypatch: pytest.MonkeyPatch, splits: int) -> None:
    """21 rows of a head, which neither fill a program nor the last one of the merge, in more splits than it loads at once."""
    monkeypatch.setattr(decode, "MOST_MERGED_IN_PLACE", 0)
    inputs = long_call(400, num_queries=7, heads=(6, 2))
    edits: list[Primitive] = [
        LogitMap(group(400, slice(10, 30)), scale=0.5),
        HeadAffine(gain=torch.linspace(0.5, 2, 6)),
    ]
    for regroup in (
        [],
        [Regroup(group(400, 0), 0.5)],
        [Regroup(group(400, 0), 0.5, group(400, 2, 300), Gate(group(400, 0), 1e-9))],
    ):
        case, on_it = on_device((inputs, [*edits, *regroup]))
        output = edited_decode(case, lower(case, on_it), splits=splits, config=SMALL)
        assert_equal(output, reference(case, on_it)[0], 1e-4)


@pytest.mark.parametrize("programs", [1, 4, 8, 32, 64, 1000])
@pytest.mark.parametrize("tiles", [0, 1, 16, 128, 1024])
def test_splits_are_at_least_one_and_at_most_the_tiles(programs: int, tiles: int) -> None:
    splits = number_of_splits(programs, tiles, 132, 32)
    assert 1 <= splits <= max(1, min(tiles, 32))
    assert set(CONFIGS) == {64, 128, 256}


def test_captured_calls_share_no_counter_until_all_are_taken() -> None:
    counters = decode._Counters(torch.device("cpu"))
    first, second = counters.captured(6), counters.captured(6)
    assert first.data_ptr() + 8 * 4 == second.data_ptr()
    assert counters.captured(decode.COUNTERS_FOR_GRAPHS).data_ptr() == first.data_ptr()


@pytest.mark.parametrize("splits", [1, 2])
def test_queries_that_see_the_future(splits: int) -> None:
    inputs = replace(long_call(40, num_queries=3), causal=False, first_query=10, query_index=torch.arange(10, 13))
    edits: list[Primitive] = [Regroup(group(40, 30), 0.5)]
    inputs, edits = on_device((inputs, edits))
    output = edited_decode(inputs, lower(inputs, edits), splits=splits, config=SMALL)
    assert_equal(output, reference(inputs, edits)[0], 1e-4)


STEPS: dict[str, list[Primitive]] = {
    "map": [LogitMap(group(30, slice(2, 9)), absolute=0.5)],
    "gated": [Regroup(group(30, 0), 0.4, group(30, slice(3, 20)), Gate(group(30, slice(0, 20)), 0.0))],
    "ranking": [HeadAffine(gain=Ranking(torch.linspace(-1, 1, 2 * 2 * 16).reshape(2, 2, 16), 3, 0.1))],
    "ranking of one": [
        HeadAffine(gain=torch.linspace(0.5, 2, 4)),
        # A column, whose rows do not lie side by side.
        HeadAffine(
            gain=Ranking(torch.ones(2, 2, 16), 1, 0.25, where=torch.tensor([[True, True], [False, True]])[:, 0])
        ),
    ],
    "all": [
        LogitMap(group(30, slice(2, 9)), bias=0.5),
        Regroup(group(30, 0), 0.4),
        HeadAffine(gain=torch.linspace(0.5, 2, 4), offset=torch.ones(4, 16)),
    ],
}


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("name", STEPS)
def test_one_step_after_another(name: str, with_sinks: bool) -> None:
    """Of one object, in one launch and in several, and from memory that is aligned and that is not."""
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])[None, :, None] if with_sinks else None
    first, edits = on_device((replace(long_call(40), sink_logits=sinks), STEPS[name]))
    call = decode.DecodeCall(first, lower(first, edits))
    lengths = (40, 41, 42, 1023, 1024, 2100, 2101) if DEVICE == "cuda" else (40, 41, 1024, 1100)
    for num_keys in lengths:
        inputs = on_device(replace(long_call(num_keys), sink_logits=sinks))
        if num_keys % 2:
            key = torch.empty(2, 2, num_keys, 17, device=DEVICE)[..., 1:].copy_(inputs.key)
            inputs = replace(inputs, key=key)
        expected, _ = reference(inputs, edits)
        assert_equal(call.again(inputs.query, inputs.key, inputs.value), expected, 1e-4)
    assert (len(call.steps) > 0) == (DEVICE == "cuda")
