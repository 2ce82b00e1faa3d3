"""Putting edits on a model and taking them off again."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from uuid import uuid4

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from attn_hooks.candidates import CandidateEdit, CandidateRunner
from attn_hooks.class_token import read_class_attention
from attn_hooks.edit import Edit
from attn_hooks.errors import error
from attn_hooks.interface import PLAN_ATTRIBUTE, LayerPlan, register
from attn_hooks.lockstep import Lockstep
from attn_hooks.model_info import (
    IMPLEMENTATION_PREFIX,
    LayerInfo,
    ModelInfo,
    inspect_model,
    interface_modules,
    underlying_model,
)
from attn_hooks.recorder import EditRecord, Recorder
from attn_hooks.registry import resolve_edits
from attn_hooks.sequence import SequenceTracker
from attn_hooks.streams import PixelsOfPrompts, PixelsToForward, StreamEdit, StreamRunner

WRAPPING_ATTRIBUTE = "attn_hooks_wrapping"
KEY_ATTRIBUTE = "attn_hooks_key"
# Of transformers' generate(), in versions that encode images before the forward.
PIXELS_ATTRIBUTE = "_supports_mm_encoder_outputs"
EXPANSION_ATTRIBUTE = "_expand_inputs_for_generation"


class EditNeverActedWarning(UserWarning):
    """An edit's scope closed and not one attention call had been edited by it."""


@dataclass
class Wrapping:
    """The edits in force on one model, and what is needed to leave no trace of them.

    The model's own config is never touched: each attention module gets a private copy of its config that names our
    attention function, and its own config back at the end.
    """

    edits: tuple[Edit, ...]
    info: ModelInfo
    recorder: Recorder
    key: str = field(default_factory=lambda: uuid4().hex)
    trackers: dict[str, SequenceTracker] = field(default_factory=dict)
    own_configs: dict[str, Any] = field(default_factory=dict)
    hooked: dict[str, list[RemovableHandle]] = field(default_factory=dict)
    second_stream: StreamRunner | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A model unpickled in a fresh process needs our names known there."""
        register()
        vars(self).update(state)

    def install(self, model: nn.Module) -> None:
        register()
        private_configs: dict[int, Any] = {}
        num_edited = 0
        for layer in self.info.layers:
            own = layer.module.config
            if id(own) not in private_configs:
                private_configs[id(own)] = copy.copy(own)
                private_configs[id(own)]._attn_implementation_internal = IMPLEMENTATION_PREFIX + layer.backend
                setattr(private_configs[id(own)], KEY_ATTRIBUTE, self.key)
            self.own_configs[layer.module_name] = own
            layer.module.config = private_configs[id(own)]
            edits = self.edits_of_layer(layer.index)
            if edits:
                tracker = self._tracker_of(model, layer.module_name)
                self._follow_hidden(model, layer, edits, tracker)
                plan = LayerPlan(self.key, self.info, layer, edits, tracker, self.recorder, own, num_edited)
                num_edited += 1
                setattr(layer.module, PLAN_ATTRIBUTE, plan)
        for place, edit in enumerate(self.edits):
            if isinstance(edit, StreamEdit) and edit.has_stream:
                self._run_second_stream(model, place, edit)
        lockstep = next((edit for edit in self.edits if edit.needs_companions), None)
        if lockstep is not None:
            self._add_companions(model, lockstep)
        if any("vision" in edit.reads for edit in self.edits):
            tracker = self._tracker_of(model, self.info.layers[0].module_name)
            self.hooked["class token"] = read_class_attention(model, tracker)
        setattr(model, WRAPPING_ATTRIBUTE, self)

    def remove(self, model: nn.Module) -> None:
        for layer in self.info.layers:
            if layer.module_name in self.own_configs:
                layer.module.config = self.own_configs[layer.module_name]
            if hasattr(layer.module, PLAN_ATTRIBUTE):
                delattr(layer.module, PLAN_ATTRIBUTE)
        for handles in self.hooked.values():
            for handle in handles:
                handle.remove()
        second_stream, self.second_stream = self.second_stream, None
        self.own_configs, self.hooked = {}, {}
        for name in (PIXELS_ATTRIBUTE, EXPANSION_ATTRIBUTE):
            vars(model).pop(name, None)
        delattr(model, WRAPPING_ATTRIBUTE)
        if second_stream is not None:
            # What interrupted a forward has passed its hooks by.
            second_stream.part()

    def edits_of_layer(self, layer: int) -> tuple[tuple[int, Edit], ...]:
        """Edits that act in a layer, each with its place in the list."""
        return tuple((place, edit) for place, edit in enumerate(self.edits) if layer in edit.layers_in(self.info))

    def warn_of_idle_edits(self, first: int, stacklevel: int) -> None:
        """Warns of the edits from place ``first`` on that no call reached, at the caller's ``stacklevel``."""
        for place, edit in enumerate(self.edits[first:], start=first):
            if not self.recorder.records[place].calls:
                message = f"{edit} never acted on {self.info.model_class}: no attention call reached it in its scope."
                warnings.warn(message, EditNeverActedWarning, stacklevel=stacklevel + 1)

    def _follow_hidden(
        self, model: nn.Module, layer: LayerInfo, edits: tuple[tuple[int, Edit], ...], tracker: SequenceTracker
    ) -> None:
        name = layer.decoder_layer
        if name is None or name in self.hooked or not any("hidden" in edit.reads for _, edit in edits):
            return
        hook = partial(tracker.before_layer, name)
        self.hooked[name] = [model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)]

    def _add_companions(self, model: nn.Module, edit: Edit) -> None:
        module_name = self.info.layers[0].module_name
        tracker, (_, decoder) = self._tracker_of(model, module_name), _decoder_of(model, module_name)
        lockstep = Lockstep(edit.method, self.info, tracker, model.get_input_embeddings)
        self.hooked["companions"] = [
            decoder.register_forward_pre_hook(lockstep.before_forward, with_kwargs=True, prepend=True),
            decoder.register_forward_hook(lockstep.after_forward),
        ]

    def _run_second_stream(self, model: nn.Module, place: int, edit: StreamEdit) -> None:
        module_name = self.info.layers[0].module_name
        tracker, (_, decoder) = self._tracker_of(model, module_name), _decoder_of(model, module_name)
        if edit.changes_pixels and hasattr(model, PIXELS_ATTRIBUTE):
            vars(model)[PIXELS_ATTRIBUTE] = PixelsToForward()
            vars(model)[EXPANSION_ATTRIBUTE] = PixelsOfPrompts(model, self.info, edit.method)
        runner_type = CandidateRunner if isinstance(edit, CandidateEdit) else StreamRunner
        runner = runner_type(edit, place, self.info, tracker, self.recorder, alone=len(self.edits) == 1)
        self.second_stream = runner
        self.hooked["second stream"] = [
            model.register_forward_pre_hook(runner.before_forward, with_kwargs=True),
            decoder.register_forward_pre_hook(runner.before_decoder, with_kwargs=True),
            model.register_forward_hook(runner.after_forward, always_call=True),
        ]

    def _tracker_of(self, model: nn.Module, module_name: str) -> SequenceTracker:
        """The tracker of the innermost transformers model around an attention module."""
        name, decoder = _decoder_of(model, module_name)
        if name not in self.trackers:
            self.trackers[name] = SequenceTracker(decoder, model, self.info)
        if name not in self.hooked:
            tracker = self.trackers[name]
            self.hooked[name] = [
                decoder.register_forward_pre_hook(tracker.before_forward, with_kwargs=True),
                decoder.register_forward_hook(tracker.after_forward),
            ]
            if decoder is not model:
                outer = model.register_forward_pre_hook(tracker.before_outer_forward, with_kwargs=True)
                self.hooked[name].append(outer)
            if self.info.embeds_outside:
                embedding = model.get_input_embeddings()
                self.hooked[name].append(embedding.register_forward_pre_hook(tracker.before_embedding))
        return self.trackers[name]


def _decoder_of(model: nn.Module, module_name: str) -> tuple[str, nn.Module]:
    name = module_name
    while name:
        name = name.rpartition(".")[0]
        ancestor = model.get_submodule(name)
        if isinstance(ancestor, PreTrainedModel):
            return name, ancestor
    return "", model


def wrap(model: nn.Module, *edits: object) -> nn.Module:
    """Puts edits in force on ``model`` and returns the same object. Wrapping again replaces the edits before.

    An edit is a method's name (``"act"``), a config (``ACT(beta=0.4)``), a mapping ``{"method": "act", "beta": 0.4}`` or
    the path of a recipe (its ``edits``). Methods act in the fixed order of the primitives, and in list order where two
    write the same thing. Everything is checked before the model is touched: a wrap that raises leaves it as it was.

    Raises ``UnsupportedModelError`` or ``EditError`` (both ``ValueError``); docs/errors.md lists the messages.
    """
    resolved = resolve_edits(edits)
    wrapping = _checked(model, resolved)
    target = underlying_model(model)
    before = _wrapping_of(target)
    if before is not None:
        before.remove(target)
        before.warn_of_idle_edits(first=0, stacklevel=2)
    wrapping.install(target)
    return model


def unwrap(model: nn.Module) -> nn.Module:
    """Takes all edits off and returns the same object: weights, config, hooks and outputs are what they were.

    A model that is not wrapped is returned as it is. Warns of edits that never acted.
    """
    target = underlying_model(model)
    _refuse_if_wrapped_elsewhere(target)
    wrapping = _wrapping_of(target)
    if wrapping is not None:
        wrapping.remove(target)
        wrapping.warn_of_idle_edits(first=0, stacklevel=2)
    return model


@contextmanager
def editing(model: nn.Module, *edits: object) -> Iterator[nn.Module]:
    """Adds edits for the length of a ``with`` block, on top of those in force, and restores on any exit.

    ``report(model)`` inside the block tells what they did. Warns of edits that never acted.
    """
    target = underlying_model(model)
    before = _wrapping_of(target)
    outer = before.edits if before is not None else ()
    wrapping = _checked(model, (*outer, *resolve_edits(edits)))
    if before is not None:
        # What the outer edits do in the block counts for them, too.
        wrapping.recorder.records.update(before.recorder.records)
        before.remove(target)
    wrapping.install(target)
    try:
        yield model
    finally:
        # The block may have called wrap() or unwrap() itself; whatever is in force ends here.
        inside = _wrapping_of(target)
        if inside is not None:
            inside.remove(target)
        if before is not None:
            before.install(target)
    # The third frame up, past contextlib's.
    wrapping.warn_of_idle_edits(first=len(outer), stacklevel=3)


def edits_in_force(model: nn.Module) -> tuple[Edit, ...]:
    """The edits in force on ``model``, in list order; empty if it is not wrapped."""
    wrapping = _wrapping_of(underlying_model(model))
    return wrapping.edits if wrapping is not None else ()


def wrapping_of(model: nn.Module, what: str) -> Wrapping:
    """The wrapping in force; raises if there is none. ``what`` completes "there is nothing to ..."."""
    wrapping = _wrapping_of(underlying_model(model))
    if wrapping is None:
        raise error("not-wrapped", model=type(model).__name__, what=what)
    return wrapping


def _wrapping_of(model: nn.Module) -> Wrapping | None:
    return vars(model).get(WRAPPING_ATTRIBUTE)


def _refuse_if_wrapped_elsewhere(model: nn.Module) -> None:
    """Raises if the attention of ``model`` carries the mark of a wrapping that does not lie on ``model`` itself."""
    own = _wrapping_of(model)
    for _, module in interface_modules(model):
        key = getattr(module.config, KEY_ATTRIBUTE, None)
        if key is not None and (own is None or key != own.key):
            raise error("wrapped-elsewhere", model=type(model).__name__)


def _checked(model: nn.Module, edits: tuple[Edit, ...]) -> Wrapping:
    info = inspect_model(model)
    _refuse_if_wrapped_elsewhere(underlying_model(model))
    for edit in edits:
        edit.check(info)
    check_composition(edits, info)
    return Wrapping(edits, info, Recorder({place: EditRecord() for place in range(len(edits))}))


def check_composition(edits: tuple[Edit, ...], info: ModelInfo) -> None:
    """Raises ``EditError`` naming two edits that cannot stand together in some layer."""
    for place, first in enumerate(edits):
        for second in edits[place + 1 :]:
            shared = set(first.layers_in(info)) & set(second.layers_in(info))
            if first.writes == second.writes == "routing" and shared:
                reason = f"both choose with whose queries and keys the heads attend, in layer {min(shared)}"
                raise error("cannot-compose", first=first.method, second=second.method, reason=reason)
            if first.writes == second.writes == "visibility" and shared:
                reason = f"both choose which keys are visited, in layer {min(shared)}"
                raise error("cannot-compose", first=first.method, second=second.method, reason=reason)
            streams = [isinstance(edit, StreamEdit) and edit.has_stream for edit in (first, second)]
            if all(streams):
                reason = "both make the next token's logits from a second stream"
                raise error("cannot-compose", first=first.method, second=second.method, reason=reason)
            for tries, other in ((first, second), (second, first)):
                if isinstance(tries, CandidateEdit) and getattr(other, "later_tokens", None) == "turn":
                    reason = (
                        f"{tries.method} tries several tokens in one forward, which {other.method} with later_tokens='turn' "
                        "would take for a turn"
                    )
                    raise error("cannot-compose", first=first.method, second=second.method, reason=reason)
