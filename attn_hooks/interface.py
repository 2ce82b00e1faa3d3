"""The functions registered with transformers: where every attention call of a wrapped model arrives.

One name for each backend that a model may run on (``attn_hooks_sdpa``, ``attn_hooks_eager``): with no edit in force the
call goes to that very backend, so the outputs are its own, bit for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from attn_hooks.call import AttentionCall, Phase
from attn_hooks.edit import STAGES, Edit
from attn_hooks.engine import Prepared, Result, compute, routed
from attn_hooks.errors import AttnHooksError, error
from attn_hooks.layout import TokenKind, TokenLayout
from attn_hooks.model_info import HONOURED_BACKENDS, IMPLEMENTATION_PREFIX, LayerInfo, ModelInfo, eager_attention_of
from attn_hooks.recorder import Recorder
from attn_hooks.repeated import RepeatedStep
from attn_hooks.selected_keys import selected_keys_mask
from attn_hooks.sequence import SequenceState, SequenceTracker, SharedByLayers, StaticStep, is_captured, share
from attn_hooks.settled import Settled, run_settled, settle
from attn_hooks.tensor_parallel import local_heads
from attn_kernels import AttentionInputs, Primitive, edited_attention, moved_mass
from attn_kernels.primitives import TapKind

PLAN_ATTRIBUTE = "attn_hooks_plan"
REPEATED = "repeated"

# What a call may carry beside its tensors: honoured by the engine, or without influence on attention itself.
HONOURED = {
    "dropout",
    "is_causal",
    "output_attentions",
    "position_bias",
    "s_aux",
    "scaling",
    "sinks",
    "sliding_window",
    "softcap",
}
WITHOUT_INFLUENCE = {
    "attention_interface",
    "cache_position",
    "logits_to_keep",
    "num_items_in_batch",
    "output_hidden_states",
    "output_router_logits",
    "position_embeddings",
    "position_ids",
    "return_dict",
    "use_cache",
}
KNOWN = HONOURED | WITHOUT_INFLUENCE
# Measuring the mass that moved takes longer than a decode step of the layer, and on a GPU than launching it: of so many
# edited layers one is measured, in turns, in a decode step and in a forward of several tokens.
LAYERS_PER_MEASURE, LAYERS_PER_MEASURE_ON_GPU = {"decode": 64, "prompt": 1}, {"decode": 512, "prompt": 256}
_sdpa_at_import = functional.scaled_dot_product_attention


@dataclass
class LayerPlan:
    """What is to happen in one layer; lies on the attention module itself, so that copies and engines carry it.

    ``place``: among the edited layers. ``selections``, ``constant`` and ``prepared`` keep what does not change from call to
    call.
    """

    key: str
    model: ModelInfo
    layer: LayerInfo
    edits: tuple[tuple[int, Edit], ...]
    tracker: SequenceTracker
    recorder: Recorder
    own_config: Any
    place: int
    selections: dict[Any, Tensor] = field(default_factory=dict)
    constant: dict[Any, list[Primitive]] = field(default_factory=dict)
    prepared: dict[Any, Prepared] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles prepare anew: compiled kernels stay behind."""
        return vars(self) | {"selections": {}, "constant": {}, "prepared": {}}


def register() -> None:
    """Makes the names known to transformers. Safe to call again."""
    for backend in HONOURED_BACKENDS:
        name = IMPLEMENTATION_PREFIX + backend
        if name not in ALL_ATTENTION_FUNCTIONS:
            AttentionInterface.register(name, _forward_for(backend))
            AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[backend])


def _forward_for(backend: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        unedited = eager_attention_of(module) if backend == "eager" else ALL_ATTENTION_FUNCTIONS[backend]
        attention_mask = selected_keys_mask(module, query, key, attention_mask, kwargs)
        plan: LayerPlan | None = getattr(module, PLAN_ATTRIBUTE, None)
        if plan is None:
            return unedited(module, query, key, value, attention_mask, **kwargs)
        step = plan.tracker.static_step
        if step is not None:
            return _without_host(plan, step, unedited, module, query, key, value, attention_mask, kwargs)
        if plan.tracker.in_flight.without_edits:
            return unedited(module, query, key, value, attention_mask, **kwargs)
        edited = _edited_outside_of_graph if torch.compiler.is_compiling() else _edited
        return edited(plan, unedited, module, query, key, value, attention_mask, kwargs)

    return attention


@torch.compiler.disable(reason="attn_hooks edits this call on the host; see before_forward")
def _edited_outside_of_graph(*call: Any) -> tuple[Tensor, Tensor | None]:
    return _edited(*call)


def _edited(
    plan: LayerPlan,
    unedited: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    layer = plan.layer.index
    wants_weights = kwargs.get("output_attentions") or getattr(plan.own_config, "output_attentions", False)
    current = plan.tracker.in_flight.current
    repeated = None if current is None else current.of_decode.get((REPEATED, layer))
    if repeated is not None and current is not None and not wants_weights and not _is_measured(plan, current, query):
        again = repeated.run(current, plan.recorder, layer, query, key, value, attention_mask, kwargs)
        if again is not None:
            return again, None
    inputs, sequence, shared = _read_call(plan, module, query, key, value, attention_mask, kwargs)
    sequence.calls[layer] += 1
    heads = local_heads(module, query, plan.layer.num_heads, plan.model.model_class, layer)
    phase = _phase(sequence)
    prepared = _prepare(plan, inputs, sequence, shared, heads, phase)
    inputs = routed(inputs, prepared.attends_as)

    def plain() -> tuple[Tensor, Tensor | None]:
        by_head = any(part is not None and part.shape[1] > 1 for part in (inputs.mask, inputs.bias, inputs.sink_logits))
        if prepared.attends_as is not None and by_head:
            # The backend would add each head's own.
            return edited_attention(inputs, []).transpose(1, 2), None
        return unedited(module, inputs.query, inputs.key, value, attention_mask, **kwargs)

    result = compute(inputs, prepared, plain, wants_weights=bool(wants_weights))
    _record(plan, inputs, sequence, shared, prepared, heads, phase, result)
    if phase == "decode" and prepared.kept and sequence.calls[layer] == 1:
        sequence.of_decode[REPEATED, layer] = _repeated(inputs, prepared, result, attention_mask, kwargs)
    if sequence.preallocated and (layer not in sequence.static_step.layers or sequence.calls[layer] > 1):
        sequence.static_step.settle(layer, _settled_for_next(plan, inputs, sequence, heads))
    return result.output.transpose(1, 2).contiguous(), result.weights


def _repeated(
    inputs: AttentionInputs, prepared: Prepared, result: Result, mask: Tensor | None, kwargs: dict[str, Any]
) -> RepeatedStep | None:
    """What this decode step has in common with those to come, if that is all but its tensors."""
    lowered = prepared.lowered
    plain = prepared.attends_as is None and kwargs.get("position_bias") is None and kwargs.keys() <= KNOWN
    if result.path != "decode" or lowered is None or not plain or inputs.num_queries != 1:
        return None
    from attn_kernels.edited_attention.decode import DecodeCall

    call = DecodeCall(inputs, lowered)
    if inputs.padded and (mask is None or call.edits.orders):
        return None
    return RepeatedStep(
        call=call,
        shape=inputs.query.shape,
        dtype=inputs.query.dtype,
        mask_dtype=None if mask is None else mask.dtype,
        names=frozenset(kwargs),
        decisive={name: kwargs[name] for name in HONOURED & kwargs.keys()},
        acting=prepared.acting,
    )


def _settled_for_next(plan: LayerPlan, inputs: AttentionInputs, sequence: SequenceState, heads: range) -> Settled | str:
    """The layer's edits for all decode steps from the next one on, asked for now; or why they cannot be had.

    No step has been taken yet, so its query is unknown, and an edit that reads its weights has to wait for it.
    """
    batch, num_keys, device = inputs.query.shape[0], inputs.num_keys, inputs.query.device
    for _, edit in plan.edits:
        if not edit.fixed_in_decode:
            return f"{edit.method} is asked anew at every step"
    if sequence.calls[plan.layer.index] > 1:
        return f"layer {plan.layer.index} runs several times"
    if inputs.window is not None and num_keys >= inputs.window:
        return (
            f"the cache of layer {plan.layer.index} drops keys; give it fewer tokens than the window of {inputs.window}"
        )
    if sequence.length >= num_keys:
        return "the cache is full"
    token = TokenLayout(torch.full((batch, 1), TokenKind.TEXT, dtype=torch.uint8, device=device))
    past = sequence.length
    of_forward = sequence.of_forward.setdefault(("next",), {})
    # A copy of what the methods keep: a step that was not taken must leave no trace there.
    of_method = {place: dict(kept) for place, kept in sequence.of_method.items() if place[2] == plan.layer.index}
    layout = sequence.layout.extended(token, past)
    coming = replace(sequence, seen=layout, steps=[], past=past, new=1, of_forward=of_forward, of_method=of_method)
    if ("shared", num_keys, device) not in of_forward:
        of_forward["shared", num_keys, device] = share(layout, 1, num_keys, device)
    shared: SharedByLayers = of_forward["shared", num_keys, device]
    inputs = replace(
        inputs,
        query=torch.full_like(inputs.query[:, :, :1], float("nan")),
        query_index=shared.query_index,
        key_index=shared.key_index,
        query_position=shared.query_position,
        key_position=shared.key_position,
        key_valid=shared.key_valid,
        mask=None,
        bias=None,
        first_query=shared.first_query,
        padded=True,
    )
    try:
        prepared = _prepare(plan, inputs, coming, shared, heads, "decode", call_type=_ComingCall)
    except AttnHooksError as refusal:
        return str(refusal)
    if not prepared.is_settled:
        return f"tokens to come can still join a group of an edit in layer {plan.layer.index}"
    key_valid = functional.pad(layout.valid.to(device), (0, num_keys - layout.length), value=True)
    return settle(inputs, prepared, key_valid, shared.kinds >= TokenKind.IMAGE)


class _ComingCall(AttentionCall):
    """The first decode step, before it is taken."""

    def tap(self, kind: TapKind, keys: Tensor | None = None, heads: Tensor | None = None) -> Tensor:
        raise error(
            "static-step", model=self.model, reason="an edit reads the first step itself, which has to run in eager"
        )


def _without_host(
    plan: LayerPlan,
    step: StaticStep,
    unedited: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, None]:
    """A decode step under settled edits, while it is compiled or captured: nothing here reads a tensor's values."""
    settled = step.layers.get(plan.layer.index)
    wants_weights = kwargs.get("output_attentions") or getattr(plan.own_config, "output_attentions", False)
    refusal = None
    if settled is None or settled.key_valid.shape[1] != key.shape[2] or query.shape[2] != 1:
        refusal = f"layer {plan.layer.index} was called otherwise than in the forward before"
    elif attention_mask is None or attention_mask.ndim != 4:
        refusal = "it has no 4-D mask to tell how far the cache is filled"
    elif wants_weights or kwargs.get("dropout") or kwargs.get("position_bias") is not None:
        refusal = "it asks for attention weights, dropout or a position bias"
    elif not settled.by_kernel and is_captured(query):
        refusal = "no kernel computes its edits, and PyTorch waits for the device"
    if refusal is not None or settled is None or attention_mask is None:
        raise error("static-step", model=plan.model.model_class, reason=refusal)
    _refuse_unknown(plan, kwargs)
    plan.recorder.ran_without_host = True
    scaling = kwargs.get("scaling")
    output = run_settled(
        settled,
        query,
        key,
        value,
        attention_mask[..., : key.shape[2]],
        _sink_logits(kwargs),
        query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        kwargs.get("softcap"),
        plain=lambda: unedited(module, query, key, value, attention_mask, **kwargs),
    )
    return output, None


def _prepare(
    plan: LayerPlan,
    inputs: AttentionInputs,
    sequence: SequenceState,
    shared: SharedByLayers,
    heads: range,
    phase: Phase,
    call_type: type[AttentionCall] = AttentionCall,
) -> Prepared:
    """The layer's primitives: made anew, or those of an earlier call where all edits say that these serve."""
    edits = [edit for _, edit in plan.edits]
    kept: dict[Any, Any] | None = None
    # What serves steps that see every key need not serve one whose mask hides some.
    place: tuple[object, ...] = (plan.key, plan.layer.index, sequence.calls[plan.layer.index], inputs.padded)
    if torch.is_grad_enabled() or any(_is_trained(edit) for edit in edits):
        # What an earlier call made may lack this one's graph, or be of earlier values.
        return _collect(plan, inputs, sequence, shared, heads, phase, False, call_type)
    if all(edit.constant for edit in edits):
        kept, place = plan.prepared, (heads, inputs.query.device, inputs.value.shape[-1])
    elif phase == "decode" and shared.key_start == 0 and all(edit.fixed_in_decode for edit in edits):
        # A sliding cache that has dropped keys moves the groups from step to step.
        kept = sequence.of_decode
    if kept is not None and place in kept:
        known: Prepared = kept[place]
        return known
    of_layers = None
    if all(edit.same_in_layers and edit.heads_in(plan.model, plan.layer.index) is None for edit in edits):
        positions = tuple(position for position, _ in plan.edits)
        size = (inputs.num_queries, inputs.num_keys)
        of_layers = (plan.key, positions, heads, *size, inputs.sink_logits is None, inputs.query.device)
    prepared: Prepared | None = sequence.of_forward.get(of_layers) if of_layers is not None else None
    if prepared is None:
        for_later = kept is sequence.of_decode
        prepared = _collect(plan, inputs, sequence, shared, heads, phase, for_later, call_type)
        if of_layers is not None:
            sequence.of_forward[of_layers] = prepared
    if kept is not None and prepared.is_settled and prepared.takes_later_keys:
        prepared.kept = True
        kept[place] = prepared
    return prepared


def _is_trained(edit: Edit) -> bool:
    return any(isinstance(given, Tensor) and given.requires_grad for given in vars(edit).values())


def _record(
    plan: LayerPlan,
    inputs: AttentionInputs,
    sequence: SequenceState,
    shared: SharedByLayers,
    prepared: Prepared,
    heads: range,
    phase: Phase,
    result: Result,
) -> None:
    layer = plan.layer.index
    rows = shared.rows(inputs)
    for owner in prepared.acting:
        named = functools.partial(_heads_edited, plan, owner, heads)
        plan.recorder.record(owner, phase, layer, named, rows)
    if result.edited_weights and _is_measured(plan, sequence, inputs.query):
        moved = moved_mass(inputs, prepared.primitives, result.heads)
        for owner in prepared.acting:
            masses = [mass for whose, mass in zip(prepared.owners, moved, strict=True) if whose == owner]
            plan.recorder.record_moved(owner, [mass for mass in masses if mass is not None])
    plan.recorder.record_path(phase, layer, result.path, result.why)


def _is_measured(plan: LayerPlan, sequence: SequenceState, query: Tensor) -> bool:
    """Whether it is this layer's turn."""
    layers = LAYERS_PER_MEASURE_ON_GPU if query.is_cuda else LAYERS_PER_MEASURE
    if _phase(sequence) == "decode":
        return (plan.place + sequence.past) % layers["decode"] == 0
    return (plan.place + plan.tracker.prompts) % layers["prompt"] == 0


def _heads_edited(plan: LayerPlan, owner: int, heads: range) -> list[int]:
    """Global indices of the heads of this call that an edit names."""
    named = dict(plan.edits)[owner].heads_in(plan.model, plan.layer.index)
    return [head for head in heads if named is None or head in named]


def _collect(
    plan: LayerPlan,
    inputs: AttentionInputs,
    sequence: SequenceState,
    shared: SharedByLayers,
    heads: range,
    phase: Phase,
    for_later: bool,
    call_type: type[AttentionCall],
) -> Prepared:
    """The primitives of all edits of the layer; ``for_later`` asks them whether these serve later decode steps."""
    prepared = Prepared([], [])
    for position, edit in sorted(plan.edits, key=lambda pair: STAGES.index(pair[1].writes)):
        call = call_type(
            inputs=inputs,
            model=plan.model.model_class,
            layer=plan.layer.index,
            num_layers=plan.model.num_layers,
            heads=heads,
            phase=phase,
            layout=sequence.layout,
            image_token_id=plan.model.image_token_id,
            key_kinds=shared.kinds,
            key_start=shared.key_start,
            prompt_length=sequence.prompt_length,
            state=sequence.state_of((plan.key, position, plan.layer.index)),
            earlier=list(prepared.primitives),
            selections=plan.selections,
            vendor=prepared.vendor,
            of_forward=sequence.of_forward,
            companions=plan.tracker.in_flight.companions,
            info=plan.model,
            hidden_states=_hidden_states(plan, edit, inputs, sequence) if call_type is AttentionCall else None,
        )
        if edit.writes == "routing":
            prepared.attends_as, prepared.routed_by = edit.attends_as(call), position
            inputs = routed(inputs, prepared.attends_as)
            continue
        answered = _constant_primitives(plan, position, edit, call) if edit.constant else edit.primitives(call)
        prepared.primitives.extend(answered)
        prepared.owners.extend([position] * len(answered))
        prepared.is_settled = prepared.is_settled and (not for_later or edit.is_settled(call))
    return prepared


def _hidden_states(plan: LayerPlan, edit: Edit, inputs: AttentionInputs, sequence: SequenceState) -> Tensor | None:
    """``(B, N, E)`` for an edit that reads what enters the layer."""
    if "hidden" not in edit.reads:
        return None
    hidden = sequence.entered.get(plan.layer.decoder_layer or "")
    if hidden is None or hidden.shape[:2] != (inputs.query.shape[0], inputs.num_queries):
        raise error("no-layer-input", method=edit.method, layer=plan.layer.index, model=plan.model.model_class)
    return hidden


def _constant_primitives(plan: LayerPlan, position: int, edit: Edit, call: AttentionCall) -> list[Primitive]:
    """Made once, so that what the kernels make of their tensors is made once, too."""
    if torch.is_grad_enabled() or _is_trained(edit):
        return edit.primitives(call)
    place = (position, call.heads, call.device, call.inputs.value.shape[-1])
    if place not in plan.constant:
        plan.constant[place] = edit.primitives(call)
    return plan.constant[place]


def _read_call(
    plan: LayerPlan,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[AttentionInputs, SequenceState, SharedByLayers]:
    """The call as the engine takes it. Raises for whatever cannot be honoured exactly."""

    def about() -> dict[str, Any]:
        return {"model": plan.model.model_class, "methods": " + ".join(edit.method for _, edit in plan.edits)}

    def refuse(argument: str, detail: str) -> Exception:
        return _refused(plan, argument, detail)

    _refuse_unknown(plan, kwargs)
    if functional.scaled_dot_product_attention is not _sdpa_at_import:
        raise error("context-parallel", **about())
    sequence = plan.tracker.state_of_call(kwargs.get("position_ids"))
    if sequence is None or sequence.batch != query.shape[0]:
        raise refuse("query", "It was called outside the forward of its decoder, so its tokens are unknown.")
    num_queries, num_keys, total = query.shape[2], key.shape[2], sequence.length
    if num_queries > total or (attention_mask is None and num_keys < min(total, num_queries)):
        raise error("cross-attention", layer=plan.layer.index, detail=f"{num_keys} keys", **about())
    if num_keys > total and not sequence.preallocated:
        raise refuse("key", f"It has {num_keys} keys for {total} tokens, so positions cannot be told.")
    place = (num_queries, num_keys, query.device)
    shared: SharedByLayers | None = sequence.of_forward.get(place)
    if shared is None:
        shared = sequence.of_forward[place] = share(sequence.layout, *place)
    mask, bias = None, None
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 4:
        if attention_mask.shape[-1] > num_keys:
            attention_mask = attention_mask[..., :num_keys]
        mask, bias = (attention_mask, None) if attention_mask.dtype == torch.bool else (None, attention_mask)
    elif attention_mask is not None:
        raise refuse("attention_mask", "Only 4-D masks are read.")
    scaling = kwargs.get("scaling")
    is_causal = kwargs.get("is_causal")
    inputs = AttentionInputs(
        query=query,
        key=key,
        value=value,
        scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        query_index=shared.query_index,
        key_index=shared.key_index,
        query_position=shared.query_position,
        key_position=shared.key_position,
        key_valid=shared.key_valid,
        mask=mask,
        bias=bias,
        causal=bool(getattr(module, "is_causal", True) if is_causal is None else is_causal),
        window=kwargs.get("sliding_window"),
        softcap=kwargs.get("softcap"),
        sink_logits=_sink_logits(kwargs),
        dropout=float(kwargs.get("dropout") or 0.0),
        first_query=shared.first_query,
        # transformers gives no mask where no key is padding.
        padded=attention_mask is not None or shared.beyond > 0,
    )
    position_bias = kwargs.get("position_bias")
    if position_bias is not None:
        inputs = _with_position_bias(inputs, position_bias)
    return inputs, sequence, shared


def _refuse_unknown(plan: LayerPlan, kwargs: dict[str, Any]) -> None:
    for name, given in kwargs.items():
        if name not in KNOWN and given is not None and given is not False:
            raise _refused(plan, name, "The engine does not know what it means for the weights.")


def _refused(plan: LayerPlan, argument: str, detail: str) -> Exception:
    methods = " + ".join(edit.method for _, edit in plan.edits)
    model, layer = plan.model.model_class, plan.layer.index
    return error("argument", model=model, layer=layer, argument=argument, methods=methods, detail=detail)


def _sink_logits(kwargs: dict[str, Any]) -> Tensor | None:
    """``(1, H, 1)`` or ``(B|1, H, N|1)``."""
    sinks = kwargs.get("s_aux")
    sinks = kwargs.get("sinks") if sinks is None else sinks[None, :, None]
    return sinks.squeeze(-1) if isinstance(sinks, Tensor) and sinks.ndim == 4 else sinks


def _with_position_bias(inputs: AttentionInputs, position_bias: Tensor) -> AttentionInputs:
    """A learned bias ``(B|1, H|1, N, M)`` on the logits, folded with the mask into one additive mask."""
    visible = inputs.visible(slice(0, inputs.num_queries))
    bias = position_bias if inputs.bias is None else position_bias + inputs.bias
    return replace(inputs, mask=None, bias=torch.where(visible, bias, torch.finfo(bias.dtype).min))


def _phase(sequence: SequenceState) -> Phase:
    if sequence.past == 0:
        return "prefill"
    return "decode" if sequence.length - sequence.past == 1 else "chunk"
