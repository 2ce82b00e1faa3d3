"""Decode steps that repeat the one before give what steps give that are read in full, and any other step is read in full."""

from __future__ import annotations

import copy
import importlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import attn_hooks
from attn_hooks import ACT, Edit, SinkScale, engine
from attn_hooks.repeated import RepeatedStep
from attn_kernels.edited_attention import dispatch
from attn_kernels.edited_attention.lowering import LoweredEdits
from tests.hooks.test_compiled_decode import EDITS, PASTA_EDIT, kernel_edits
from tests.kernels.triton_device import DEVICE
from tests.models import gpt_oss, left_padded, llama

# The package's name for it is the function of the same name.
decode = importlib.import_module("attn_kernels.edited_attention.decode")
LAYERS = 4
NAMES = [name for name in EDITS if name not in ("none", "streaming")]
LENGTHS = (9, 6, 3)


@pytest.fixture(autouse=True)
def _on_device() -> Iterator[None]:
    with torch.device(DEVICE):
        yield


@pytest.fixture
def repeated(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Edits go to the kernels; for each call that could repeat a step, whether it did."""
    monkeypatch.setattr(engine, "has_kernels", lambda inputs: inputs.query.shape[2] == 1)
    monkeypatch.setattr(dispatch, "on_gpu", lambda inputs: inputs.query.shape[2] == 1)
    monkeypatch.setattr(attn_hooks.interface, "_is_measured", lambda *_: False)
    run, found = RepeatedStep.run, []

    def watched(self: RepeatedStep, *given: Any) -> Tensor | None:
        output = run(self, *given)
        found.append(output is not None)
        return output

    monkeypatch.setattr(RepeatedStep, "run", watched)
    return found


def model_of() -> PreTrainedModel:
    return llama(torch.float32, num_hidden_layers=LAYERS).to(DEVICE)


def decoded(model: PreTrainedModel, batch: int, padded: bool, steps: int = 5, **of_call: Any) -> Tensor:
    """Logits ``(B, steps, V)`` of greedy steps after a prompt."""
    ids, mask = left_padded(LENGTHS[:batch] if padded else LENGTHS[:1] * batch, image=True)
    cache, found = DynamicCache(), []
    with torch.no_grad():
        last = model(ids, attention_mask=mask if padded else None, past_key_values=cache).logits[:, -1]
        for _ in range(steps):
            mask = torch.cat([mask, mask.new_ones(batch, 1)], 1)
            token = last.argmax(-1, keepdim=True)
            positions = mask.sum(1, keepdim=True) - 1
            given = {"attention_mask": mask if padded else None, "position_ids": positions}
            last = model(token, past_key_values=cache, **given, **of_call).logits[:, -1]
            found.append(last)
    return torch.stack(found, 1)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_repeated_steps(name: str, padded: bool, repeated: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """An order by value gives no value to later keys, and SPIN asks what a mask hides, so that both are asked at every step."""
    model = attn_hooks.wrap(model_of(), *kernel_edits(name))
    found = decoded(model, 3, padded)
    assert set(repeated) == (set() if name == "ordered" or (name == "spin" and padded) else {True})
    report = attn_hooks.report(model)
    monkeypatch.undo()
    attn_hooks.unwrap(model)
    attn_hooks.wrap(model, *kernel_edits(name))
    expected = decoded(model, 3, padded)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(report.edits, attn_hooks.report(model).edits, strict=True):
        assert (ours.calls, ours.rows, ours.heads) == (theirs.calls, theirs.rows, theirs.heads)


def test_sinks_of_the_model(repeated: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    model = attn_hooks.wrap(gpt_oss().to(DEVICE), SinkScale(scale=4.0))
    found = decoded(model, 2, padded=False)
    assert True in repeated
    monkeypatch.undo()
    torch.testing.assert_close(found, decoded(model, 2, padded=False), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("edits", [(PASTA_EDIT,), (ACT(beta=0.1, alpha=1.1), SinkScale(scale=2.0))])
def test_generate_with_beams(edits: tuple[Edit, ...], repeated: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    model = attn_hooks.wrap(model_of(), *edits)
    ids, mask = left_padded(LENGTHS)
    given: dict[str, Any] = {"num_beams": 2, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    found = model.generate(ids, attention_mask=mask, **given)
    assert repeated and all(repeated)
    monkeypatch.undo()
    assert torch.equal(found, model.generate(ids, attention_mask=mask, **given))


@pytest.mark.parametrize("name", ["act", "gated_regroup", "spin"])
def test_a_copied_cache(name: str, repeated: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its steps are prepared anew. A lock stands for a compiled kernel, which cannot be copied; the interpreter has none."""
    model, cache = attn_hooks.wrap(model_of(), *kernel_edits(name)), DynamicCache()
    known = decode._edits

    def with_kernel(lowered: LoweredEdits) -> Any:
        edits = known(lowered)
        edits.compiled["kernel"] = threading.Lock()
        return edits

    monkeypatch.setattr(decode, "_edits", with_kernel)
    with torch.no_grad():
        model(left_padded(LENGTHS[:1], image=True)[0], past_key_values=cache)
        for token in (5, 6):
            model(torch.tensor([[token]]), past_key_values=cache)
        caches = [cache, copy.deepcopy(cache)]
        found = [
            [model(torch.tensor([[token]]), past_key_values=each).logits for token in (7, 8, 9)] for each in caches
        ]
    assert all(repeated)
    torch.testing.assert_close(*found)


class TestStepsReadInFull:
    """After three steps alike, one that differs."""

    def step(self, model: PreTrainedModel, token: Tensor, cache: DynamicCache, **given: Any) -> Tensor:
        with torch.set_grad_enabled(given.pop("with_gradients", False)):
            return model(token, past_key_values=cache, **given).logits.detach()

    def after_three(self, model: PreTrainedModel, then: dict[str, Any], new: int = 1, crop: int = 0) -> Tensor:
        ids, _ = left_padded(LENGTHS[:1])
        cache = DynamicCache()
        with torch.no_grad():
            model(ids, past_key_values=cache)
        for number in range(3):
            self.step(model, torch.tensor([[5 + number]]), cache)
        if crop:
            cache.crop(-crop)
        self.step(model, torch.full((1, new), 9), cache, **then)
        return self.step(model, torch.tensor([[11]]), cache)

    @pytest.mark.parametrize(
        ("case", "then", "new", "crop"),
        [
            ("weights asked for", {"output_attentions": True}, 1, 0),
            ("several tokens", {}, 2, 0),
            ("a cropped cache", {}, 1, 2),
            ("gradients", {"with_gradients": True}, 1, 0),
        ],
    )
    def test_one(
        self,
        case: str,
        then: dict[str, Any],
        new: int,
        crop: int,
        repeated: list[bool],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        model = attn_hooks.wrap(model_of(), SinkScale(scale=4.0))
        found = self.after_three(model, dict(then), new, crop)
        full = 2 * LAYERS
        # The first step after the prompt is read in full, the two after it are not; then one is, and the last as the case has it.
        assert repeated[:full] == [True] * full and not any(
            repeated[full : full + LAYERS] if case == "gradients" else []
        )
        monkeypatch.undo()
        expected = self.after_three(model, dict(then), new, crop)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    def test_other_edits(self, repeated: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
        """What a step repeats belongs to the edits in force."""

        def last(model: PreTrainedModel) -> Tensor:
            cache = DynamicCache()
            with torch.no_grad():
                model(left_padded(LENGTHS[:1])[0], past_key_values=cache)
            for number in range(2):
                self.step(model, torch.tensor([[5 + number]]), cache)
            with attn_hooks.editing(model, SinkScale(scale=0.1)):
                self.step(model, torch.tensor([[9]]), cache)
            return self.step(model, torch.tensor([[11]]), cache)

        model = attn_hooks.wrap(model_of(), SinkScale(scale=4.0))
        found = last(model)
        monkeypatch.undo()
        torch.testing.assert_close(found, last(model), rtol=1e-4, atol=1e-4)
