"""Gradients through the kernels against autograd through the PyTorch path in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from attn_kernels import AttentionInputs, Gate, HeadAffine, LogitMap, Order, Primitive, Regroup
from attn_kernels.edited_attention import backward, blocked
from attn_kernels.edited_attention.backward import backward_refusal, differentiable_edited_attention
from attn_kernels.edited_attention.lowering import NotLowered, lower
from tests.kernels.strategies import attention_inputs, primitives
from tests.kernels.triton_device import DEVICE, on_device

Attention = Callable[[AttentionInputs, Sequence[Primitive]], Tensor]


def by_kernels(inputs: AttentionInputs, edits: Sequence[Primitive]) -> Tensor:
    return differentiable_edited_attention(inputs, lower(inputs, edits))


def by_pytorch(inputs: AttentionInputs, edits: Sequence[Primitive]) -> Tensor:
    plain = [edit for edit in edits if not isinstance(edit, HeadAffine)]
    return blocked.head_affine(blocked.edited_attention(inputs, plain), edits, inputs.query)


class Leaves:
    """The tensors of a call and the finite factors of its edits, by name, as leaves of one dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.tensors: dict[str, Tensor] = {}

    def of(self, name: str, value: float | Tensor, num_heads: int) -> Tensor:
        if not isinstance(value, Tensor):
            value = torch.full((num_heads,), value, device=DEVICE)
        self.tensors[name] = value.detach().to(self.dtype).clone().requires_grad_()
        return self.tensors[name]

    def inputs(self, inputs: AttentionInputs) -> AttentionInputs:
        names = ["query", "key", "value"] + ["sink_logits"] * (inputs.sink_logits is not None)
        return replace(inputs, **{name: self.of(name, getattr(inputs, name), 0) for name in names})

    def edit(self, edit: Primitive, place: int, num_heads: int) -> Primitive:
        names = {LogitMap: ("scale", "absolute", "bias"), Regroup: ("keep",), HeadAffine: ("gain", "offset")}[
            type(edit)
        ]
        given = {name: getattr(edit, name) for name in names if getattr(edit, name) is not None}
        finite = {name: value for name, value in given.items() if isinstance(value, Tensor) or value != -torch.inf}
        return replace(edit, **{name: self.of(f"{place} {name}", value, num_heads) for name, value in finite.items()})


def gradients(
    attention: Attention, inputs: AttentionInputs, edits: Sequence[Primitive], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The output, and the gradient of its product with fixed random numbers with respect to everything."""
    leaves = Leaves(dtype)
    inputs = leaves.inputs(inputs)
    output = attention(inputs, [leaves.edit(edit, place, inputs.num_heads) for place, edit in enumerate(edits)])
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(5), device="cpu")
    (output * weights.to(output)).sum().backward()
    # A key that no row sees, or an edit that no key is in, may have no gradient at all.
    found = {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.tensors.items()}
    return {name: tensor.double().cpu() for name, tensor in (found | {"output": output.detach()}).items()}


def check(inputs: AttentionInputs, edits: Sequence[Primitive], tolerance: float = 2e-4) -> None:
    inputs, edits = on_device((inputs, list(edits)))
    compare(inputs, edits, gradients(by_pytorch, inputs, edits, torch.float64), tolerance)


def compare(inputs: AttentionInputs, edits: Sequence[Primitive], expected: dict[str, Tensor], tolerance: float) -> None:
    found = gradients(by_kernels, inputs, edits, torch.float32)
    for name, tensor in expected.items():
        size = max(1.0, float(tensor.abs().max()) if tensor.numel() else 0.0)
        error = (found[name] - tensor).abs().max() if tensor.numel() else torch.zeros(())
        assert error <= tolerance * size, f"{name}: off by {error:.2e} of {size:.2e}"


def call(
    size: int = 70, queries: int | None = None, heads: tuple[int, int] = (2, 1), dims: tuple[int, int] = (16, 8)
) -> AttentionInputs:
    """One sample, causal, no padding, with queries at the end."""
    queries = size if queries is None else queries
    generator = torch.Generator().manual_seed(7)
    index = torch.arange(size)

    def normal(heads: int, length: int, dim: int) -> Tensor:
        return torch.randn(1, heads, length, dim, generator=generator, device="cpu")

    return AttentionInputs(
        query=normal(heads[0], queries, dims[0]),
        key=normal(heads[1], size, dims[0]),
        value=normal(heads[1], size, dims[1]),
        scaling=dims[0] ** -0.5,
        query_index=index[size - queries :],
        key_index=index,
        query_position=index[None, size - queries :],
        key_position=index[None],
        key_valid=torch.ones(1, size, dtype=torch.bool),
        padded=False,
    )


def span(size: int, first: int, stop: int) -> Tensor:
    place = torch.arange(size)
    return ((place >= first) & (place < stop))[None, None]


@st.composite
def trained_calls(draw: st.DrawFn) -> tuple[AttentionInputs, list[Primitive]]:
    """Without masks, which the backward does not take; without gates, where float32 and float64 may fall on two sides."""
    inputs = draw(attention_inputs())
    inputs = replace(inputs, mask=None, bias=None)
    edits = [draw(primitives(inputs, (LogitMap, Regroup, HeadAffine))) for _ in range(draw(st.integers(0, 3)))]
    return inputs, [replace(edit, gate=None) if isinstance(edit, Regroup) else edit for edit in edits]


@given(trained_calls())
@settings(max_examples=20, deadline=None)
def test_equals_autograd_in_float64(case: tuple[AttentionInputs, list[Primitive]]) -> None:
    inputs, edits = case
    try:
        assert backward_refusal(inputs, lower(inputs, edits)) is None
    except NotLowered:
        assume(False)
    inputs, edits = on_device((inputs, edits))
    expected = gradients(by_pytorch, inputs, edits, torch.float64)
    # Where an edit removes every key of a row, or maps keys that are removed already, autograd gives NaN.
    assume(all(torch.isfinite(tensor).all() for tensor in expected.values()))
    compare(inputs, edits, expected, tolerance=2e-3)


SOURCE, TARGET, LATE, FEW = span(70, 2, 7), span(70, 5, 40), span(70, 36, 50), span(70, 66, 68)
PER_HEAD = torch.tensor([0.6, 1.3])
CASES: dict[str, tuple[AttentionInputs, list[Primitive]]] = {
    "nothing": (call(), []),
    "dara": (call(), [LogitMap(TARGET, scale=PER_HEAD)]),
    "bias": (call(), [LogitMap(SOURCE, bias=PER_HEAD, heads=torch.tensor([False, True]))]),
    "two maps on common keys": (call(), [LogitMap(TARGET, PER_HEAD, 0.5), LogitMap(SOURCE, -0.7, PER_HEAD, 0.2)]),
    "lofit": (call(), [HeadAffine(gain=PER_HEAD, offset=torch.zeros(2, 8))]),
    "target named": (call(), [Regroup(SOURCE, PER_HEAD, TARGET)]),
    "target is the rest": (call(), [Regroup(SOURCE, PER_HEAD)]),
    "more than all is kept": (call(), [Regroup(SOURCE, 1.5, TARGET)]),
    "late target that few rows see": (call(), [Regroup(SOURCE, 0.4, FEW)]),
    "empty target": (call(), [Regroup(SOURCE, 0.4, span(70, 0, 0))]),
    "empty source": (call(), [Regroup(span(70, 0, 0), 0.4, TARGET)]),
    "everything is source": (call(), [Regroup(span(70, 0, 70), 0.4)]),
    "gate half open": (call(), [Regroup(SOURCE, 0.4, TARGET, Gate(SOURCE, 0.1, FEW, 0.01))]),
    "together": (
        call(),
        [LogitMap(TARGET, PER_HEAD), Regroup(SOURCE, PER_HEAD, TARGET), HeadAffine(PER_HEAD, torch.ones(2, 8))],
    ),
    "untouched tile first": (call(), [LogitMap(LATE, PER_HEAD), Regroup(span(70, 40, 42), PER_HEAD, LATE)]),
    "wide window": (replace(call(), window=60), [LogitMap(LATE, PER_HEAD), Regroup(FEW, 0.4, LATE)]),
    "window": (replace(call(), window=20), [LogitMap(TARGET, PER_HEAD), Regroup(SOURCE, 0.4)]),
    "softcap": (replace(call(), softcap=1.5), [LogitMap(TARGET, PER_HEAD, 0.4), Regroup(SOURCE, 0.4, TARGET)]),
    "sink logits": (replace(call(), sink_logits=torch.ones(1, 2, 1)), [Regroup(SOURCE, PER_HEAD, TARGET)]),
    "not causal": (replace(call(), causal=False), [LogitMap(TARGET, PER_HEAD), Regroup(SOURCE, 0.4)]),
    "one query": (call(queries=1), [LogitMap(TARGET, PER_HEAD), Regroup(SOURCE, 0.4, TARGET)]),
    "one key": (call(1), [LogitMap(span(1, 0, 1), PER_HEAD), Regroup(span(1, 0, 1), 0.4)]),
    "more keys than queries": (call(queries=20), [LogitMap(TARGET, PER_HEAD), Regroup(SOURCE, 0.4)]),
    "grouped heads": (call(33, heads=(6, 2)), [LogitMap(span(33, 3, 20), 0.5), Regroup(span(33, 0, 2), 0.4)]),
}


@pytest.mark.parametrize("case", CASES)
def test_each_primitive_over_several_tiles(case: str) -> None:
    """In float32 70 keys are three tiles and 70 rows are five."""
    check(*CASES[case])


def test_one_program_may_serve_all_query_heads_of_a_kv_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there are many keys, or samples."""
    monkeypatch.setattr(backward, "ROUNDS", 0)
    check(*CASES["grouped heads"])


def test_a_map_of_removed_keys_has_no_gradient_there() -> None:
    """A removed key is as one that is not valid."""
    scaled, removed = LogitMap(TARGET, PER_HEAD), LogitMap(SOURCE, bias=-torch.inf)
    inputs, edits = on_device((call(), [removed, scaled]))
    nobody = on_device(replace(removed, keys=span(70, 0, 0)))
    invalid = replace(inputs, key_valid=~edits[0].keys[:, 0], padded=True)
    compare(inputs, edits, gradients(by_pytorch, invalid, [nobody, edits[1]], torch.float64), 2e-4)


def test_rows_in_scope_alone_are_edited() -> None:
    rows = torch.arange(70)[None] % 3 == 0
    check(call(), [LogitMap(TARGET, PER_HEAD, rows=rows), Regroup(SOURCE, 0.4, rows=rows)])
    check(call(), [HeadAffine(PER_HEAD, torch.ones(2, 8), rows=rows)])


def test_rows_that_see_nothing_get_and_give_no_gradient() -> None:
    valid = torch.arange(20) >= 6
    inputs, edits = on_device(
        (replace(call(20), key_valid=valid[None], padded=True), [LogitMap(span(20, 0, 9), PER_HEAD)])
    )
    found = gradients(by_kernels, inputs, edits, torch.float32)
    assert all(torch.isfinite(tensor).all() for tensor in found.values())
    assert all((found[name][:, :, :6] == 0).all() for name in ("query", "key", "value", "output"))
    assert (found["query"][:, :, 6:] != 0).any()
    # A row whose keys an edit removes is such a row, too.
    removed, _ = on_device((call(20), []))
    nothing = LogitMap(on_device(span(20, 0, 20)), PER_HEAD.to(DEVICE), bias=-torch.inf)
    found = gradients(by_kernels, removed, [nothing], torch.float32)
    assert all((tensor == 0).all() for tensor in found.values())


@pytest.mark.parametrize("mass", [0.99, 0.9999, 0.999999])
@pytest.mark.parametrize("target", [None, TARGET])
def test_a_source_that_holds_nearly_all_mass_costs_no_digits(mass: float, target: Tensor | None) -> None:
    first = span(70, 0, 1)
    lift = float(torch.logit(torch.tensor(mass, dtype=torch.float64))) + 4.0
    check(call(), [LogitMap(first, bias=lift), Regroup(first, PER_HEAD, target)], tolerance=2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    """No further from float64 than a few roundings of the largest gradient."""
    inputs, edits = on_device((call(), [LogitMap(TARGET, PER_HEAD), Regroup(SOURCE, PER_HEAD, TARGET)]))
    rounded = {name: getattr(inputs, name).to(dtype) for name in ("query", "key", "value")}
    inputs = replace(inputs, **rounded)
    expected = gradients(by_pytorch, inputs, edits, torch.float64)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in rounded.items()}
    factor = PER_HEAD.clone().to(DEVICE).requires_grad_()
    output = by_kernels(replace(inputs, **leaves), [replace(edits[0], scale=factor), replace(edits[1], keep=factor)])
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(5), device="cpu")
    (output * weights.to(output)).sum().backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None and leaf.grad.dtype == dtype
        error = (leaf.grad.double().cpu() - expected[name]).abs().max()
        assert error < 8 * torch.finfo(dtype).eps * expected[name].abs().max(), name
    assert factor.grad is not None
    shared = expected["0 scale"] + expected["1 keep"]
    assert (factor.grad.double().cpu() - shared).abs().max() < 8 * torch.finfo(dtype).eps * shared.abs().max()


def test_factors_alone_may_ask_and_may_be_lowered_again_at_every_step() -> None:
    """A frozen model trains as in DARA; two steps on one key group share its codes, not the first step's graph."""
    inputs, target = on_device((call(20), span(20, 3, 11)))
    factor = PER_HEAD.clone().to(DEVICE).requires_grad_()
    found = []
    for _ in range(2):
        by_kernels(inputs, [LogitMap(target, factor)]).square().sum().backward()
        assert factor.grad is not None
        found.append(factor.grad.clone())
        factor.grad = None
        with torch.no_grad():
            factor += 0.5
    assert not torch.equal(found[0], found[1])


def test_two_runs_give_the_same_bits() -> None:
    inputs, edits = on_device((call(), [LogitMap(TARGET, 0.7), Regroup(SOURCE, 0.4)]))
    first, second = (gradients(by_kernels, inputs, edits, torch.float32) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_was_lowered_under_inference_mode_does_not_stop_training() -> None:
    inputs, target = on_device((call(20), span(20, 3, 11)))
    with torch.inference_mode():
        by_kernels(inputs, [LogitMap(target, 0.5), HeadAffine(gain=PER_HEAD.to(DEVICE))])
        by_kernels(inputs, [Regroup(target, 0.5)])
    query = inputs.query.clone().requires_grad_()
    by_kernels(replace(inputs, query=query), [LogitMap(target, 0.5)]).sum().backward()
    by_kernels(replace(inputs, query=query), [Regroup(target, 0.5)]).sum().backward()
    assert query.grad is not None


def test_factor_and_offset_learn_the_planted_values() -> None:
    """A LoFiT-like offset and a DARA-like factor, from the outputs of a model that has them."""
    inputs, target = on_device((call(24), span(24, 3, 15)))
    factor, offset = torch.tensor([1.8, 0.4], device=DEVICE), torch.linspace(-1, 1, 16, device=DEVICE).view(2, 8)
    with torch.no_grad():
        taught = by_pytorch(inputs, [LogitMap(target, factor), HeadAffine(offset=offset)])
    learned_factor = torch.ones(2, device=DEVICE, requires_grad=True)
    learned_offset = torch.zeros(2, 8, device=DEVICE, requires_grad=True)
    optimizer = torch.optim.LBFGS([learned_factor, learned_offset], max_iter=25, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        output = by_kernels(inputs, [LogitMap(target, learned_factor), HeadAffine(offset=learned_offset)])
        error = (output - taught).square().sum()
        error.backward()
        return error

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(learned_factor.detach(), factor, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(learned_offset.detach(), offset, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "edits", "why"),
    [
        ({"mask": torch.ones(1, 1, 20, 20, dtype=torch.bool)}, [], "mask"),
        ({"bias": torch.zeros(1, 1, 20, 20)}, [], "mask"),
        ({}, [Order(deny=((torch.ones(1, 20, dtype=torch.bool), torch.ones(1, 20, dtype=torch.bool)),))], "Order"),
        ({}, [Order(-torch.arange(20)[None], -torch.arange(20)[None])], "Order"),
    ],
)
def test_refusals_say_why(change: dict[str, Tensor], edits: list[Primitive], why: str) -> None:
    inputs, edits = on_device((replace(call(20), **change), edits))
    lowered = lower(inputs, edits)
    assert why in (backward_refusal(inputs, lowered) or "")
    with pytest.raises(ValueError, match=why):
        differentiable_edited_attention(inputs, lowered)


def test_the_pytorch_paths_gradients_of_rows_that_see_nothing() -> None:
    """A removed key leaves the first row without any: zeros, and gradients of zero, also of later maps' factors."""
    query = torch.randn(1, 1, 4, 8, requires_grad=True)
    factor = torch.ones(1, requires_grad=True)
    index = torch.arange(4)
    inputs = AttentionInputs(
        query,
        torch.randn(1, 1, 4, 8),
        torch.randn(1, 1, 4, 8),
        0.3,
        index,
        index,
        index[None],
        index[None],
        torch.ones(1, 4, dtype=torch.bool),
    )
    first, both = (index < 1)[None, None], (index < 2)[None, None]
    edits = [LogitMap(first, bias=float("-inf")), LogitMap(both, scale=factor, bias=factor)]
    blocked.edited_attention(inputs, edits).square().sum().backward()
    assert query.grad is not None
    assert factor.grad is not None
    assert query.grad.isfinite().all()
    assert factor.grad.isfinite().all()
