"""What is known of the sequences in flight: built by a hook on the decoder, kept on their cache."""

from __future__ import annotations

import inspect
import threading
from collections import Counter
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import Cache

from attn_hooks.errors import error
from attn_hooks.layout import TokenKind, TokenLayout
from attn_hooks.model_info import ModelInfo
from attn_hooks.settled import Settled
from attn_kernels import AttentionInputs

STATES_ATTRIBUTE = "attn_hooks_states"
CLASS_ATTENTION = "class attention"


@dataclass
class StaticStep:
    """What decode steps take that run without the host: compiled in one graph, or replayed from a CUDA graph.

    The forwards before them, with a preallocated cache, settle the edits of each layer. ``refusals`` say why one could not be
    settled. ``length`` () long is how many tokens the cache held then. One object serves a cache for good: what the next
    sequence settles goes where ``earlier`` has it, since a captured graph reads it there.
    """

    layers: dict[int, Settled] = field(default_factory=dict)
    refusals: dict[int, str] = field(default_factory=dict)
    batch: int = 0
    length: Tensor | None = None
    earlier: dict[int, Settled] = field(default_factory=dict)
    # By id: graphs read their tensors for as long as the cache lives, whatever is settled later.
    captured: dict[int, Settled] = field(default_factory=dict)

    def begin(self, batch: int, length: int, device: torch.device) -> None:
        """Another sequence, or tokens that the edits settled so far may not fit."""
        self.earlier |= self.layers
        self.layers, self.refusals, self.batch = {}, {}, batch
        with torch.inference_mode(False):
            if self.length is None or self.length.device != device:
                self.length = torch.zeros((), dtype=torch.long, device=device)
        self.length.fill_(length)

    def settle(self, layer: int, settled: Settled | str) -> None:
        """The edits of a layer, or why they cannot be settled."""
        before = self.earlier.pop(layer, None)
        if isinstance(settled, str):
            self.refusals[layer] = settled
            self.layers.pop(layer, None)
            if before is not None:
                before.spoil()
        else:
            self.refusals.pop(layer, None)
            self.layers[layer] = before if before is not None and before.take_over(settled) else settled

    def end(self) -> None:
        """The sequence is gone, and graphs that were captured with it must not go on unnoticed."""
        for settled in self.layers.values():
            settled.spoil()
        self.layers = {}

    def refuses(self, batch: int) -> str | None:
        """Why the next step cannot run without the host."""
        for refusal in self.refusals.values():
            return refusal
        if not self.layers:
            return "no prompt with this static cache has run in eager under these edits"
        if batch != self.batch:
            return f"the cache holds {self.batch} sequences and this call has {batch}"
        if torch.is_grad_enabled():
            return "it would need gradients; use torch.no_grad() or torch.inference_mode()"
        return None


@dataclass
class SequenceState:
    """The memory of one batch of sequences, from its first forward on.

    ``seen`` is the layout without the ``steps`` of one token that came since, ``(B, 1)`` each or None where tokens are
    unknown: in decode hardly anybody asks for them. ``mask`` is the newest of these steps' attention masks. ``prompt_length``
    is the padded length of the first forward, None if that ran unwrapped. ``preallocated`` caches are longer than the tokens
    in them. ``calls`` counts each layer's calls in the current forward. What methods keep comes from the prompt, which beams
    of one sample share, so reordering beams leaves it as it is. ``of_forward`` holds what the layers of one forward share;
    ``of_decode`` what the decode steps after one another share, ``static_step`` what those share that run without the host.
    """

    seen: TokenLayout
    prompt_length: int | None
    bos_token_id: int | None = None
    steps: list[Tensor | None] = field(default_factory=list)
    mask: Any = None
    past: int = 0
    new: int = 0
    preallocated: bool = False
    calls: Counter[int] = field(default_factory=Counter)
    of_method: dict[tuple[object, ...], dict[str, Any]] = field(default_factory=dict)
    of_forward: dict[tuple[object, ...], Any] = field(default_factory=dict)
    of_decode: dict[tuple[object, ...], Any] = field(default_factory=dict)
    static_step: StaticStep = field(default_factory=StaticStep)
    # By name of the decoder layer, of the one that runs; of all where a checkpoint may run them again without their hooks.
    entered: dict[str, Tensor] = field(default_factory=dict)

    @property
    def layout(self) -> TokenLayout:
        """Of all tokens up to the newest."""
        if self.steps:
            steps, self.steps = self.steps, []
            known = [tokens for tokens in steps if tokens is not None]
            tokens = torch.cat(known, dim=1) if len(known) == len(steps) else None
            kinds = self.seen.kinds
            real = kinds.new_ones(kinds.shape[0], len(steps), dtype=torch.bool)
            layout = self.seen.extended(TokenLayout.of_tokens(tokens, real, self.bos_token_id), self.seen.length)
            valid = valid_tokens(self.mask, kinds.shape[0], layout.length, kinds.device)
            self.seen = layout if valid is None else layout.padded_as(valid)
        return self.seen

    @layout.setter
    def layout(self, layout: TokenLayout) -> None:
        self.seen, self.steps = layout, []

    @property
    def batch(self) -> int:
        return self.seen.kinds.shape[0]

    @property
    def length(self) -> int:
        """How many tokens the layout has."""
        return self.seen.length + len(self.steps)

    def take_step(self, tokens: Tensor | None, mask: Any) -> None:
        """The token after the newest one, ``(B, 1)``."""
        self.steps.append(tokens)
        self.mask = mask

    def keep_rows(self, rows: int) -> None:
        """The first ``rows`` sequences alone go on, of twice as many. ``of_forward`` stays until the next one: a second stream asks
        what was read there, by the number of a sample."""

        def kept(value: Any) -> Any:
            return value[:rows] if isinstance(value, Tensor) and value.ndim and len(value) == 2 * rows else value

        self.layout = self.layout.first_rows(rows)
        for state in self.of_method.values():
            state.update({name: kept(value) for name, value in state.items()})

    def state_of(self, owner: tuple[str, int, int]) -> dict[str, Any]:
        """The memory of one edit in one layer: ``(plan, edit, layer)``. A layer that runs several times a forward (recurrent
        depth, differential attention) has one for each time."""
        return self.of_method.setdefault((*owner, self.calls[owner[2]]), {})


@dataclass(frozen=True)
class SharedByLayers:
    """What the layers of one forward have in common whose calls have as many queries and keys: see ``AttentionInputs``."""

    query_index: Tensor
    key_index: Tensor
    query_position: Tensor
    key_position: Tensor
    key_valid: Tensor
    kinds: Tensor  # (B, M) uint8
    key_start: int
    first_query: int
    beyond: int  # keys of a preallocated cache that are still empty

    @cached_property
    def real_rows(self) -> Tensor:
        """How many queries are real tokens, ``()``."""
        return self.key_valid[:, self.first_query : self.first_query + len(self.query_index)].sum()

    def rows(self, inputs: AttentionInputs) -> Tensor | int:
        """How many queries are real tokens; on the device where only the device knows."""
        if inputs.padded or not inputs.query.is_cuda:
            return self.real_rows
        return inputs.query.shape[0] * inputs.num_queries


def share(layout: TokenLayout, num_queries: int, num_keys: int, device: torch.device) -> SharedByLayers:
    """For a call whose queries are the last tokens of ``layout``."""
    total = layout.length
    start = max(total - num_keys, 0)
    position = layout.position.to(device)
    kinds = layout.kinds[:, start : start + num_keys].to(device)
    beyond = num_keys - kinds.shape[1]
    valid = layout.valid[:, start : start + num_keys].to(device)
    return SharedByLayers(
        query_index=total - num_queries + torch.arange(num_queries, device=device),
        key_index=start + torch.arange(num_keys, device=device),
        query_position=position[:, total - num_queries :],
        key_position=functional.pad(position[:, start : start + num_keys], (0, beyond), value=total),
        key_valid=functional.pad(valid, (0, beyond)),
        kinds=functional.pad(kinds, (0, beyond)),
        key_start=start,
        first_query=total - num_queries - start,
        beyond=beyond,
    )


class _InFlight(threading.local):
    """What belongs to the forward that this thread is in."""

    current: SequenceState | None = None
    outer_tokens: Tensor | None = None
    outer_given: dict[str, Any] | None = None
    # What class_token.py read of the vision tower since the last forward: by layer, one tensor a run.
    class_attention: dict[str, list[Tensor]] | None = None
    # In a second stream that runs as the model does unwrapped.
    without_edits: bool = False
    # In any second stream that is a forward of its own.
    in_second_stream: bool = False
    # Of the call before: its position_ids and its sequence.
    positions: tuple[int, int] | None = None
    # Rows below the prompts that lockstep.py has added.
    companions: int = 0
    # Rows below the sequences that are a second stream's and not followed here (in_step.py).
    beside: int = 0


class SequenceTracker:
    """Follows a decoder's forwards, so that each attention call knows its tokens, padding and phase."""

    def __init__(self, decoder: nn.Module, outer: nn.Module, model: ModelInfo) -> None:
        self.model = model
        self.key = uuid4().hex
        # Counted from minus one, so that the first is number 0.
        self.prompts = -1
        self.parameters = list(inspect.signature(decoder.forward).parameters)
        self.outer_parameters = list(inspect.signature(outer.forward).parameters)
        self.in_flight = _InFlight()
        # Set while a forward runs without the host: its calls must not ask what is in flight. Not by thread, since compiled
        # code cannot read what is.
        self.static_step: StaticStep | None = None
        self.of_positions: MutableMapping[Tensor, SequenceState] = WeakTensorKeyDictionary()
        # MusicGen's decoder takes its codebooks as rows of input_ids; they are one sequence.
        embeddings = getattr(decoder, "embed_tokens", None)
        self.rows_per_sequence = len(embeddings) if isinstance(embeddings, nn.ModuleList) else 1

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles start without a sequence in flight."""
        return vars(self) | {"in_flight": None, "of_positions": None, "static_step": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, in_flight=_InFlight(), of_positions=WeakTensorKeyDictionary())

    def state_of_call(self, position_ids: Tensor | None) -> SequenceState | None:
        """The state of the forward that a call belongs to.

        Gradient checkpointing runs a layer again inside backward, when another forward may have come since; its
        position_ids are still the very tensor of the first run.
        """
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward:
            return None if position_ids is None else self.of_positions.get(position_ids)
        current = self.in_flight.current
        # Each layer of a forward brings the same tensor.
        if (
            position_ids is not None
            and current is not None
            and self.in_flight.positions != (id(position_ids), id(current))
        ):
            self.of_positions[position_ids] = current
            self.in_flight.positions = id(position_ids), id(current)
        return current

    def before_outer_forward(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the whole model: a vision-language model gives its decoder embeddings, not tokens."""
        given = dict(zip(self.outer_parameters, args, strict=False)) | kwargs
        tokens = given.get("input_ids")
        self.in_flight.outer_tokens = tokens if isinstance(tokens, Tensor) else None
        self.in_flight.outer_given = given if self.model.vision is not None else None
        if given.get("pixel_values") is not None:
            # The tower is about to run.
            self.in_flight.class_attention = None

    def before_embedding(self, _embedding: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of the token embedding, for families whose generate() passes the model's own forward by."""
        if self.in_flight.outer_tokens is None:
            self.in_flight.outer_tokens = args[0]

    def before_forward(self, _decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the decoder."""
        given = dict(zip(self.parameters, args, strict=False)) | kwargs
        self.static_step = self._without_host(given)
        if self.static_step is None:
            self._follow(given)
        self.in_flight.outer_given = None

    def _without_host(self, given: dict[str, Any]) -> StaticStep | None:
        """What a decode step takes that is being compiled or captured; None where the host follows the forward.

        Where it cannot be had, compiled code breaks off here and goes on with the host, or fails if it must be one graph.
        """
        cache = given.get("past_key_values")
        new = given.get("input_ids")
        new = new if new is not None else given.get("inputs_embeds")
        compiling = torch.compiler.is_compiling()
        if new is None or not (compiling or is_captured(new)):
            return None
        if compiling and (new.shape[1] != 1 or not isinstance(cache, Cache) or not cache.is_compileable):
            return None
        states = getattr(cache, STATES_ATTRIBUTE, {})
        step: StaticStep = states[self.key].static_step if self.key in states else StaticStep()
        refusal = step.refuses(new.shape[0] // self.rows_per_sequence)
        if new.shape[1] != 1:
            refusal = "it has several tokens"
        if refusal is None and isinstance(cache, Cache):
            # The cache may have been emptied since.
            message = "attn_hooks: the cache holds another sequence than the one whose edits were settled"
            torch._assert_async(cache.get_seq_length() >= step.length, message)
            self.in_flight.outer_tokens = None
            if not compiling:
                step.captured |= {id(settled): settled for settled in step.layers.values()}
            return step
        if not compiling:
            raise error("static-step", model=self.model.model_class, reason=refusal)
        torch._dynamo.graph_break(msg=_static_step_refused(self.model.model_class, refusal))
        return None

    def before_layer(self, name: str, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of a decoder layer, ``name``, where an edit reads what enters it."""
        if self.static_step is None:
            enter = self._enter_outside_of_graph if torch.compiler.is_compiling() else self._enter
            enter(name, args[0] if args else kwargs.get("hidden_states"))

    @torch.compiler.disable(reason="attn_hooks hands the layer's input to an edit on the host")
    def _enter_outside_of_graph(self, name: str, hidden: Any) -> None:
        self._enter(name, hidden)

    def _enter(self, name: str, hidden: Any) -> None:
        sequence = self.in_flight.current
        if sequence is not None and isinstance(hidden, Tensor):
            if not torch.is_grad_enabled():
                sequence.entered.clear()
            sequence.entered[name] = hidden.detach() if hidden.requires_grad else hidden

    @torch.compiler.disable(
        reason="attn_hooks follows a prompt on the host; only decode steps with a static cache compile in one graph"
    )
    def _follow(self, given: dict[str, Any]) -> None:
        cache = given.get("past_key_values")
        past = _past_length(cache)
        tokens = given.get("input_ids")
        new = tokens if tokens is not None else given.get("inputs_embeds")
        if new is None:
            self.in_flight.current = None
            return
        if tokens is not None and self.rows_per_sequence > 1:
            tokens = new = tokens[:: self.rows_per_sequence]
        batch, length = len(new) - self.in_flight.beside, new.shape[1]
        tokens = tokens[:batch] if tokens is not None else self._outer_tokens(batch, length)
        self.in_flight.outer_tokens = None
        self._refuse_packed(given, past)
        mask = given.get("attention_mask")
        if self.in_flight.beside:
            # Gemma 3 hands over one for each kind of layer.
            mask = {kind: _first(batch, of_kind) for kind, of_kind in mask.items()} if isinstance(mask, dict) else mask
            mask = _first(batch, mask)
        states: dict[str, SequenceState] = getattr(cache, STATES_ATTRIBUTE, {})
        known = states.get(self.key) if past else None
        if known is not None and known.batch != batch:
            raise error("batch-changed", model=self.model.model_class, cached=known.batch, given=batch)
        if known is not None and length == 1 and past == known.past + known.new == known.length:
            state = known
            state.take_step(tokens, mask)
        else:
            new_valid = torch.ones(batch, length, dtype=torch.bool, device=new.device)
            # A generated token is no image, whatever its id.
            images = () if past and length == 1 else self.model.images_in(tokens, self.in_flight.outer_given or given)
            layout = TokenLayout.of_tokens(tokens, new_valid, self.model.bos_token_id, images)
            state = self._begun(layout, past, states) if known is None else known
            if known is not None:
                state.layout = state.layout.filled_to(past).extended(layout, past)
            valid = valid_tokens(mask, batch, past + length, new.device)
            if valid is not None:
                state.layout = state.layout.padded_as(valid)
            # Not the token after the last one: what was made for those steps may not fit.
            state.of_decode.clear()
            state.static_step.begin(batch, past + length, new.device)
        state.past, state.new = past, length
        state.of_forward.clear()
        state.of_forward[CLASS_ATTENTION,] = self.in_flight.class_attention
        self.in_flight.class_attention = None
        state.entered.clear()
        state.preallocated = isinstance(cache, Cache) and cache.is_compileable
        state.calls.clear()
        self.in_flight.current, self.in_flight.positions = state, None
        self._remember(cache)

    def _begun(self, layout: TokenLayout, past: int, states: Mapping[str, SequenceState]) -> SequenceState:
        """The state of sequences that were not followed so far, of which a cache holds ``past`` tokens already."""
        self.prompts += 1
        batch, length = layout.kinds.shape
        kinds = torch.full((batch, past), TokenKind.TEXT, dtype=torch.uint8, device=layout.kinds.device)
        earlier = TokenLayout(kinds).extended(layout, past)
        state = SequenceState(earlier, None if past else length, self.model.bos_token_id)
        if self.key in states:
            state.static_step = states[self.key].static_step
        for key, other in states.items():
            # Of edits that were in force on this cache before, and may be again.
            if key != self.key and not past:
                other.static_step.end()
        return state

    def _outer_tokens(self, batch: int, length: int) -> Tensor | None:
        """The tokens ``(B, N)`` that the whole model was given, if they are those of this forward."""
        tokens = self.in_flight.outer_tokens
        if tokens is None or tokens.ndim != 2 or tokens.shape[1] != length:
            return None
        if self.model.embeds_outside and batch % len(tokens) == 0:
            # Embedded before generate() repeated each prompt for its beams.
            return tokens.repeat_interleave(batch // len(tokens), dim=0)
        return tokens if len(tokens) == batch else None

    def after_forward(self, _decoder: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the decoder: the cache may have been made inside."""
        # The decoder embedded tokens of its own, which before_embedding saw.
        self.in_flight.outer_tokens = None
        if self.static_step is not None:
            self.static_step = None
            return
        if self.in_flight.current is not None and not torch.is_grad_enabled():
            self.in_flight.current.entered.clear()
        candidates = output if isinstance(output, tuple) else (getattr(output, "past_key_values", None),)
        for candidate in candidates:
            if isinstance(candidate, Cache):
                self._remember(candidate)

    def _remember(self, cache: Any) -> None:
        if isinstance(cache, Cache) and self.in_flight.current is not None:
            states = getattr(cache, STATES_ATTRIBUTE, None)
            if states is None:
                states = {}
                setattr(cache, STATES_ATTRIBUTE, states)
            states[self.key] = self.in_flight.current

    def _refuse_packed(self, given: dict[str, Any], past: int) -> None:
        positions = given.get("position_ids")
        if past or given.get("attention_mask") is not None or not isinstance(positions, Tensor) or positions.ndim != 2:
            return
        if bool((positions.diff(dim=-1) < 0).any()):
            raise error("packed-sequences", model=self.model.model_class)


def is_captured(tensor: Tensor) -> bool:
    """Whether what is computed from ``tensor`` is being captured in a CUDA graph by hand, and not by a compiler."""
    return not torch.compiler.is_compiling() and tensor.is_cuda and torch.cuda.is_current_stream_capturing()


@torch._dynamo.assume_constant_result
def _static_step_refused(model: str, reason: str) -> str:
    return str(error("static-step", model=model, reason=reason))


def _first(rows: int, mask: Any) -> Any:
    return mask[:rows] if isinstance(mask, Tensor) else mask


def _past_length(cache: Any) -> int:
    return int(cache.get_seq_length()) if isinstance(cache, Cache) else 0


def valid_tokens(mask: Any, batch: int, length: int, device: torch.device) -> Tensor | None:
    """``(B, length)`` bool from whatever mask the decoder was given; None if it says nothing of padding.

    generate() with a static cache hands over finished 4-D masks, one for each kind of layer; a token is real iff any
    query may see it.
    """
    if isinstance(mask, dict):
        masks = [entry for entry in mask.values() if isinstance(entry, Tensor)]
        mask = max(masks, key=lambda entry: entry.shape[-1]) if masks else None
    if not isinstance(mask, Tensor):
        return None
    mask = mask.to(device)
    if mask.ndim == 2:
        seen = mask.bool()
    elif mask.ndim == 4 and mask.shape[2] > 1:
        allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        seen = allowed.any(1).any(1).expand(batch, -1)
    else:
        return None
    if seen.shape[1] < length:
        seen = functional.pad(seen, (0, length - seen.shape[1]))
    return seen[:, :length]
