"""torch.compile before and after wrap: compiled code must notice that edits came, changed and went.

One layer and few cases, since each wrap compiles each layer anew and that takes seconds.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import attn_hooks
from attn_hooks import ACT, Ablate, Edit, Streaming
from tests.hooks import snapshot
from tests.hooks.tiny import generated, logits, tiny_llama

EDITS: dict[str, Edit] = {
    "act": ACT(beta=0.1, alpha=1.05, heads={0: [1, 4]}),
    "streaming": Streaming(sinks=1, window=3),
    "ablate": Ablate(heads={0: [3]}),
}


def small() -> Any:
    return tiny_llama(num_hidden_layers=1)


def eagerly(name: str | None) -> Tensor:
    """What the uncompiled model gives."""
    model = small()
    return logits(attn_hooks.wrap(model, EDITS[name]) if name else model)


@pytest.fixture(autouse=True)
def compiled_afresh() -> Iterator[None]:
    """Compilation leaves caches behind, and pytest would keep its trace of thousands of lines."""
    trace = logging.getLogger("torch.__trace")
    propagate, trace.propagate = trace.propagate, False
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    trace.propagate = propagate


@pytest.mark.parametrize(("name", "backend"), [("act", "eager"), ("streaming", "aot_eager")])
def test_wrap_then_compile(name: str, backend: str) -> None:
    model = small()
    before = snapshot.take(model)
    compiled = torch.compile(attn_hooks.wrap(model, EDITS[name]), backend=backend)
    torch.testing.assert_close(logits(compiled), eagerly(name))
    assert attn_hooks.edits_in_force(compiled) == attn_hooks.edits_in_force(model) == (EDITS[name],)
    assert attn_hooks.report(compiled).edits[0].calls["prefill"] > 0
    assert attn_hooks.unwrap(compiled) is compiled
    torch.testing.assert_close(logits(compiled), eagerly(None))
    # torch.compile leaves a mark of its own on the model.
    assert [change for change in snapshot.changes(before, model) if "_is_torch_compile" not in change] == []


@pytest.mark.parametrize("run_first", [False, True], ids=["wrapped at once", "wrapped after a run"])
def test_compile_then_wrap(run_first: bool) -> None:
    compiled = torch.compile(small(), backend="eager")
    if run_first:
        torch.testing.assert_close(logits(compiled), eagerly(None))
    assert attn_hooks.wrap(compiled, EDITS["streaming"]) is compiled
    torch.testing.assert_close(logits(compiled), eagerly("streaming"))
    attn_hooks.wrap(compiled, EDITS["ablate"])
    torch.testing.assert_close(logits(compiled), eagerly("ablate"))
    attn_hooks.unwrap(compiled)
    torch.testing.assert_close(logits(compiled), eagerly(None))


def test_compiled_in_place() -> None:
    model = small()
    model.compile(backend="eager")
    torch.testing.assert_close(logits(model), eagerly(None))
    with attn_hooks.editing(model, EDITS["streaming"]):
        torch.testing.assert_close(logits(model), eagerly("streaming"))
    torch.testing.assert_close(logits(model), eagerly(None))


def test_a_compiled_decoder_inside_a_model() -> None:
    model = small()
    model.model = torch.compile(model.model, backend="eager")
    torch.testing.assert_close(logits(model), eagerly(None))
    attn_hooks.wrap(model, EDITS["act"])
    torch.testing.assert_close(logits(model), eagerly("act"))
    attn_hooks.unwrap(model)
    torch.testing.assert_close(logits(model), eagerly(None))


def test_generate_with_a_compiled_forward() -> None:
    plain = generated(small(), new_tokens=3)
    edited = generated(attn_hooks.wrap(small(), EDITS["streaming"]), new_tokens=3)
    assert not torch.equal(plain, edited)
    model = small()
    model.forward = torch.compile(model.forward, backend="eager")
    attn_hooks.wrap(model, EDITS["streaming"])
    assert torch.equal(generated(model, new_tokens=3), edited)
    assert torch.equal(generated(attn_hooks.unwrap(model), new_tokens=3), plain)
