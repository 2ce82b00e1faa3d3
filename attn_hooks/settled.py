"""A decode step that is compiled or captured in a CUDA graph: an operator of its own.

Whatever depends on the sequence goes in as a tensor, so that the same graph serves the next step, and the next sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from attn_hooks import engine
from attn_hooks.engine import Plain, Prepared
from attn_kernels import AttentionInputs, HeadAffine, Primitive, Ranking, Tap

if TYPE_CHECKING:
    from attn_kernels.edited_attention.lowering import LoweredEdits


@dataclass(frozen=True)
class Settled:
    """The edits of one layer as every later decode step of a sequence takes them.

    ``form`` says how lowered edits (``by_kernel``), or primitives, are put together from ``tensors``, which are this object's
    own. ``key_valid`` ``(B, M)`` bool is True for real tokens and for those to come. ``needs_plain``: some heads stay on the
    model's backend. ``ranked`` ``(B, M)`` bool: image keys whose sum ranks the heads, and which every step must see, therefore.
    """

    form: str
    tensors: list[Tensor]
    key_valid: Tensor
    by_kernel: bool
    needs_plain: bool
    ranked: Tensor | None = None

    def take_over(self, later: Settled) -> bool:
        """Makes this one what ``later`` is without moving a tensor, since captured graphs read them where they lie.

        False if it cannot become that: it then gives NaN wherever a graph still uses it.
        """
        here, there = self._all_tensors(), later._all_tensors()
        same_form = (self.form, self.by_kernel, self.needs_plain) == (later.form, later.by_kernel, later.needs_plain)
        same_form = same_form and len(here) == len(there)
        alike = same_form and all(
            (old.shape, old.dtype, old.device) == (new.shape, new.dtype, new.device)
            for old, new in zip(here, there, strict=True)
        )
        if not alike:
            self.spoil()
            return False
        for old, new in zip(here, there, strict=True):
            old.copy_(new)
        return True

    def _all_tensors(self) -> list[Tensor]:
        return [*self.tensors, self.key_valid, *([] if self.ranked is None else [self.ranked])]

    def spoil(self) -> None:
        """Whatever still computes with these edits gives NaN."""
        for tensor in self.tensors:
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))


@torch.no_grad()
def settle(inputs: AttentionInputs, prepared: Prepared, key_valid: Tensor, image: Tensor) -> Settled | str:
    """The edits ``prepared`` for a decode step, for it and all later ones; why not, if they cannot be kept.

    ``key_valid`` as in ``Settled``; ``image`` ``(B, M)`` bool: the keys of images.
    """
    if any(isinstance(edit, Tap) for edit in prepared.primitives):
        return "a Tap reads its weights"
    kept: object = prepared.primitives
    by_kernel = False
    if engine.has_kernels(inputs):
        from attn_kernels.edited_attention import dispatch

        lowered, path = dispatch.plan(inputs, prepared.primitives, prepared.lowered)
        if not prepared.is_trained:
            prepared.lowered = lowered
        if lowered is not None and path.name == "decode":
            kept, by_kernel = replace(lowered, unscoped=None), True
    weight_edits = [edit for edit in prepared.primitives if not isinstance(edit, HeadAffine)]
    needs_plain = not by_kernel and len(engine.heads_recomputed(weight_edits, inputs)) < inputs.num_heads
    # Tensors made in inference mode could not be written to outside of it.
    with torch.inference_mode(False):
        tensors: list[Tensor] = []
        form = _name_of(_taken_apart(kept, tensors))
        owned = [tensor.detach().clone() for tensor in tensors]
        ranks = any(isinstance(edit, HeadAffine) and isinstance(edit.gain, Ranking) for edit in prepared.primitives)
        return Settled(form, owned, key_valid.clone(), by_kernel, needs_plain, image.clone() if ranks else None)


class _Place(NamedTuple):
    """Where a tensor stood: its number in the list."""

    number: int


class _Parts(NamedTuple):
    """A dataclass and its fields."""

    made_of: type
    fields: tuple[tuple[str, Any], ...]


_FORMS: dict[str, Any] = {}


def _name_of(form: Any) -> str:
    """An operator takes strings, not objects; the same form gives the same name."""
    name = repr(form)
    while _FORMS.setdefault(name, form) != form:
        name += "'"
    return name


def _taken_apart(thing: Any, tensors: list[Tensor]) -> Any:
    """``thing`` with numbers for its tensors, which are added to ``tensors``."""
    if isinstance(thing, Tensor):
        number = next((number for number, known in enumerate(tensors) if known is thing), len(tensors))
        if number == len(tensors):
            tensors.append(thing)
        return _Place(number)
    if is_dataclass(thing):
        return _Parts(
            type(thing), tuple((part.name, _taken_apart(getattr(thing, part.name), tensors)) for part in fields(thing))
        )
    if isinstance(thing, list | tuple):
        return tuple(_taken_apart(part, tensors) for part in thing)
    return thing


def _put_together(form: Any, tensors: Sequence[Tensor]) -> Any:
    if isinstance(form, _Place):
        return tensors[form.number]
    if isinstance(form, _Parts):
        return form.made_of(**{name: _put_together(part, tensors) for name, part in form.fields})
    if isinstance(form, tuple):
        return tuple(_put_together(part, tensors) for part in form)
    return form


def run_settled(
    settled: Settled,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    sinks: Tensor | None,
    scaling: float,
    softcap: float | None,
    plain: Plain,
) -> Tensor:
    """One decode step ``(B, 1, H, Dv)`` under settled edits. Reads no value on the host but in PyTorch's operator.

    ``mask`` ``(B|1, H|1, 1, M)``, bool or additive, alone says which keys there are; ``sinks`` as in ``AttentionInputs``.
    """
    if settled.ranked is not None:
        shown = (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2)[:, 0, 0]
        message = (
            "attn_hooks: the mask of a compiled or captured step hides image keys that rank the heads; run it in eager"
        )
        torch._assert_async((shown | ~settled.ranked).all(), message)
    ours = plain()[0] if settled.needs_plain else None
    operator = step_by_kernel if settled.by_kernel else step_in_pytorch
    output: Tensor = operator(
        query, key, value, mask, sinks, ours, settled.key_valid, settled.tensors, settled.form, scaling, softcap
    )
    return output


def _step_by_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    sinks: Tensor | None,
    plain: Tensor | None,
    key_valid: Tensor,
    tensors: list[Tensor],
    form: str,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    from attn_kernels.edited_attention.decode import edited_decode

    lowered: LoweredEdits = _put_together(_FORMS[form], tensors)
    needs_places = lowered.num_pairs > 0 or lowered.order_values is not None
    inputs = _of_step(query, key, value, mask, sinks, key_valid, scaling, softcap, needs_places)
    output = edited_decode(inputs, lowered)
    assert isinstance(output, Tensor)
    return output.transpose(1, 2)


def _step_in_pytorch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    sinks: Tensor | None,
    plain: Tensor | None,
    key_valid: Tensor,
    tensors: list[Tensor],
    form: str,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    inputs = _of_step(query, key, value, mask, sinks, key_valid, scaling, softcap, needs_places=True)
    primitives: tuple[Primitive, ...] = _put_together(_FORMS[form], tensors)

    def unedited() -> tuple[Tensor, None]:
        assert plain is not None
        return plain.clone(), None  # an operator must not give back its own argument

    return (
        engine.in_pytorch(inputs, primitives, unedited, wants_weights=False, why="").output.transpose(1, 2).contiguous()
    )


def _of_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    sinks: Tensor | None,
    key_valid: Tensor,
    scaling: float,
    softcap: float | None,
    needs_places: bool,
) -> AttentionInputs:
    """The call of one query whose place among the keys only the device knows: the last key that its mask shows.

    ``needs_places``: something reads indices and positions; otherwise they are not even filled in.
    """
    is_bool = mask.dtype == torch.bool
    key_index = query_index = torch.empty(key.shape[2], dtype=torch.long, device=key.device)
    key_position = query_position = key_index[None]
    if needs_places:
        key_index = torch.arange(key.shape[2], device=key.device)
        shown = mask if is_bool else mask > torch.finfo(mask.dtype).min / 2
        query_index = torch.where(shown, key_index, 0).amax().reshape(1)
        key_valid = key_valid & (key_index <= query_index)
        key_position = key_valid.long().cumsum(1) - 1
        query_position = key_position.index_select(1, query_index)
    return AttentionInputs(
        query=query,
        key=key,
        value=value,
        scaling=scaling,
        query_index=query_index,
        key_index=key_index,
        query_position=query_position,
        key_position=key_position,
        key_valid=key_valid,
        mask=mask if is_bool else None,
        bias=None if is_bool else mask,
        softcap=softcap,
        sink_logits=sinks,
        first_query=key.shape[2] - 1,
    )


def _shape_of_step(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    return value.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


step_by_kernel = torch.library.custom_op("attn_hooks::edited_step", _step_by_kernel, mutates_args=())
# It waits for the device, which a CUDA graph cannot.
step_in_pytorch = torch.library.custom_op(
    "attn_hooks::edited_step_in_pytorch", _step_in_pytorch, mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
step_by_kernel.register_fake(_shape_of_step)
step_in_pytorch.register_fake(_shape_of_step)
