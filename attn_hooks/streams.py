"""A second stream beside the main one: the same model on a changed prompt, and next-token logits made of both.

A method (``StreamEdit``) says what the second stream's prompt is and how the logits combine. The second stream has a cache of its
own and runs when its logits are needed: a step in which one token alone passes the method's cutoff is certain without it, and
its tokens wait until a later step asks (the exact skip of AGLA's sheet). From then on both streams take a step in one forward where
they can (``in_step.py``), which costs less than asking. The second follows beams with the main cache.

Everything happens in hooks around the model's own forward, so ``generate`` with any strategy, streaming, chats of several
turns and plain forward loops get the same logits.
"""

from __future__ import annotations

import math
import threading
import weakref
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from transformers import Cache, DynamicCache

from attn_hooks.edit import Edit
from attn_hooks.errors import AttnHooksError, error
from attn_hooks.in_step import InStep, can_join, for_both
from attn_hooks.layout import ImageSpan, TokenKind, TokenLayout
from attn_hooks.model_info import ModelInfo
from attn_hooks.recorder import Recorder
from attn_hooks.sequence import CLASS_ATTENTION, SequenceState, SequenceTracker, is_captured

STREAMS_ATTRIBUTE = "attn_hooks_streams"
# Of a forward's arguments, those with an entry for each new token, in the last dimension.
OF_EACH_TOKEN = ("input_ids", "position_ids", "token_type_ids", "mm_token_type_ids", "cache_position")


@dataclass(frozen=True)
class Prompt:
    """What a second stream is made of. ``given``: the arguments of the model's forward; ``embeddings`` ``(B, N, E)``: its
    tokens and images as the decoder got them; ``tokens`` ``(B, N)``, ``layout`` what each of them is. ``class_attention``: for
    methods that read ``vision``, what class_token.py read. ``of_forward``: what the edits of its attention left there."""

    given: Mapping[str, Any]
    embeddings: Tensor
    tokens: Tensor | None
    layout: TokenLayout
    model: ModelInfo
    class_attention: dict[str, list[Tensor]] | None = None
    of_forward: Mapping[Any, Any] = field(default_factory=dict)

    @property
    def image(self) -> Tensor:
        """Bool ``(B, N)``: the tokens of all images."""
        return (self.layout.kinds >= TokenKind.IMAGE).to(self.embeddings.device)

    @property
    def image_and_marks(self) -> Tensor:
        """Bool ``(B, N)``: the images and the tokens that open and close them."""
        return self.model.image_and_marks(self.tokens, self.layout).to(self.embeddings.device)


@dataclass(frozen=True)
class SecondStream:
    """The prompt of a second stream: the main one's with other ``arguments``, or only the tokens ``keep`` ``(B, N)`` of it."""

    arguments: Mapping[str, Any] = field(default_factory=dict)
    keep: Tensor | None = None


class StreamEdit(Edit):
    """Base of the methods that look at a second stream."""

    # Whether the other edits in force act in the second stream, too.
    edits_second_stream: ClassVar[bool] = True
    # Whether it changes pixels, which the model's forward must then be given.
    changes_pixels: ClassVar[bool] = False

    @property
    def has_stream(self) -> bool:
        """Whether these parameters need a second stream at all."""
        return True

    @property
    def in_step(self) -> bool:
        """Whether both streams, of the same tokens then, may take a decode step in one forward."""
        return False

    @property
    @abstractmethod
    def cutoff(self) -> float:
        """Tokens less likely than this share of the likeliest are out, 0 for none."""

    @abstractmethod
    def second_stream(self, prompt: Prompt) -> SecondStream:
        """Its prompt. Asked once for each prompt with an image."""

    @abstractmethod
    def combine(self, logits: Tensor, second: Tensor) -> Tensor:
        """Logits from those of both streams, ``(B, n, vocabulary)`` float32, before the cutoff."""

    def layers_in(self, model: ModelInfo) -> tuple[int, ...]:
        return ()

    def check(self, model: ModelInfo) -> None:
        if self.layers_in(model):
            super().check(model)
        model.require_image_keys(self.method)
        if self.has_stream and model.embeds_outside:
            raise error("stream-outside", method=self.method, model=model.model_class)


class TextGuidance(StreamEdit):
    """Guidance against the same text without its image, as PAI and others that build on it have it.

    With the log-probabilities p of the prompt and p0 of its text alone, on the model without edits: gamma (p - p0) + p0 for
    tokens with p >= max p + log(plausibility), minus infinity for all others. The text is the prompt without the image's tokens and
    those that open and close it. The identity is gamma 1, which needs no second stream and has no cutoff.
    """

    edits_second_stream: ClassVar[bool] = False

    gamma: float = Field(default=1.1, ge=0.0, description="guidance against the text without its image; 1: none")
    plausibility: float = Field(
        default=0.1, ge=0.0, le=1.0, description="of the guidance: cutoff, as a share of the likeliest token"
    )

    @property
    def has_stream(self) -> bool:
        return self.gamma != 1.0

    @property
    def cutoff(self) -> float:
        return self.plausibility

    def second_stream(self, prompt: Prompt) -> SecondStream:
        return SecondStream(keep=~prompt.image_and_marks)

    def combine(self, logits: Tensor, second: Tensor) -> Tensor:
        log_p, log_p0 = logits.log_softmax(-1), second.log_softmax(-1)
        return self.gamma * (log_p - log_p0) + log_p0


@dataclass
class StreamState:
    """The second stream of one batch. ``waiting``: arguments of the main stream's steps that it has not taken yet."""

    arguments: dict[str, Any]  # of the forward over its prompt
    same_tokens: bool
    has_image: Tensor  # (B,) bool
    prompt_mask: Tensor | None  # (B, tokens of its own prompt)
    prompt_length: int  # of the main stream
    positions_dims: int  # of the main stream's position_ids
    cache: DynamicCache | None = None
    in_step: InStep | None = None
    waiting: list[dict[str, Any]] = field(default_factory=list)
    # (B, positions of the main prompt) where in its own prompt the text up to there ends; -1 where its image is not over.
    places: Tensor | None = None

    def part(self) -> None:
        """Ends a forward over both streams that was interrupted, also one of the cache that this one's is a copy of."""
        if self.in_step is not None:
            self.in_step.part()

    def select_rows(self, rows: Tensor) -> None:
        """As beams go on from others of their sample, which share its prompt."""
        if self.cache is not None:
            self.cache.reorder_cache(rows)
        self.waiting = [
            {
                name: value.index_select(-2, rows)
                if name in OF_EACH_TOKEN and isinstance(value, Tensor) and value.ndim > 1
                else value
                for name, value in step.items()
            }
            for step in self.waiting
        ]


class _Following:
    """In place of a main cache's ``reorder_cache``: the second stream does as the main one. The cache holds this object, which
    holds it weakly, so that its memory is free as soon as nobody else has it."""

    def __init__(self, cache: Cache, state: StreamState) -> None:
        self.cache, self.state = weakref.ref(cache), state

    def __call__(self, rows: Tensor) -> None:
        cache = self.cache()
        assert cache is not None
        self.state.part()
        type(cache).reorder_cache(cache, rows)
        self.state.select_rows(rows)

    def __getstate__(self) -> dict[str, Any]:
        """A copied cache's has that cache."""
        return {"cache": self.cache(), "state": self.state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.cache, self.state = weakref.ref(state["cache"]), state["state"]


@dataclass(frozen=True)
class _Refusing:
    """In place of a main cache's method that the second stream cannot follow."""

    name: str
    method: str
    model: str

    def __call__(self, *_given: Any, **_named: Any) -> Any:
        raise error("stream-cache", method=self.method, model=self.model, name=self.name)


@dataclass(frozen=True)
class PixelsToForward:
    """In place of a model's ``_supports_mm_encoder_outputs``: generate() would otherwise encode images before the forward, which
    then gets features and no pixels."""

    def __call__(self) -> bool:
        return False


# What a forward takes of images, and of videos; beside it the name of the grids where it may lie patch by patch.
OF_IMAGES = {"pixel_values": "image_grid_thw", "image_grid_thw": None, "image_sizes": None}
OF_VIDEOS = {"pixel_values_videos": "video_grid_thw", "video_grid_thw": None, "second_per_grid_ts": None}


@dataclass(frozen=True)
class PixelsOfPrompts:
    """In place of the ``_expand_inputs_for_generation`` of a model whose pixels come to its forward, for beams and several
    sequences a prompt. transformers repeats them entry by entry there; this repeats all that a prompt shows, prompt by prompt."""

    model: Any
    info: ModelInfo
    method: str

    def __call__(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **given: Any,
    ) -> Any:
        plain = type(self.model)._expand_inputs_for_generation
        repeated: dict[str, Tensor] = {}
        # Idefics has the images of a prompt in one entry.
        if expand_size > 1 and input_ids is not None and "pixel_attention_mask" not in given:
            spans = sorted(self.info.images_in(input_ids, given), key=lambda span: (span.sample, span.start))
            for names, of_video in ((OF_IMAGES, False), (OF_VIDEOS, True)):
                shown = [span for span in spans if span.video == of_video]
                for name, grids in names.items():
                    if isinstance(given.get(name), Tensor):
                        entries = _entries_of(given[name], shown, given.get(grids) if grids else None)
                        if entries is None:
                            raise error("stream-beams", method=self.method, model=self.info.model_class, argument=name)
                        blocks = list(zip(shown, given[name].split(entries), strict=True))
                        repeated[name] = torch.cat(
                            [
                                block
                                for sample in range(len(input_ids))
                                for _ in range(expand_size)
                                for span, block in blocks
                                if span.sample == sample
                            ]
                        )
            given |= dict.fromkeys(repeated)
        tokens, expanded = plain(self.model, expand_size, is_encoder_decoder, input_ids, **given)
        return tokens, expanded | repeated


def _entries_of(tensor: Tensor, shown: Sequence[ImageSpan], grids: Tensor | None) -> list[int] | None:
    """How many entries of ``tensor`` each image has: one, its patches, or its tiles; None if that is none of them."""
    if len(tensor) == len(shown):
        return [1] * len(shown)
    if grids is not None:
        patches = [int(number) for number in grids.prod(-1).tolist()]
        return patches if len(patches) == len(shown) and sum(patches) == len(tensor) else None
    # Tiles have equally many tokens.
    tokens = sum(span.tokens for span in shown)
    if tokens == 0 or any(span.tokens * len(tensor) % tokens for span in shown):
        return None
    return [span.tokens * len(tensor) // tokens for span in shown]


class _InFlight(threading.local):
    given: dict[str, Any] | None = None
    embeddings: Tensor | None = None
    past: int = 0
    is_second: bool = False
    # Of the second stream's newest forward.
    second: SequenceState | None = None
    # While both streams are in one forward.
    in_step: InStep | None = None


class StreamRunner:
    """Runs the second stream of the one edit that has one, in hooks of the model and of its decoder.

    ``alone``: no other edit is in force, whose memory would need rows for the second stream where both are in one forward.
    """

    def __init__(
        self, edit: StreamEdit, place: int, model: ModelInfo, tracker: SequenceTracker, recorder: Recorder, alone: bool
    ) -> None:
        self.edit, self.place, self.model, self.tracker, self.recorder = edit, place, model, tracker, recorder
        self.alone = alone
        self.in_flight = _InFlight()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"in_flight": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, in_flight=_InFlight())

    @torch.compiler.disable(reason="attn_hooks runs a second stream on the host")
    def before_forward(
        self, outer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Forward pre-hook of the whole model."""
        if self.in_flight.is_second:
            return None
        # What interrupts a forward passes its hooks by.
        self.part()
        given = dict(zip(self.tracker.outer_parameters, args, strict=False)) | kwargs
        if given.get("labels") is not None:
            raise error("stream-training", method=self.edit.method, model=self.model.model_class)
        if isinstance(given.get("logits_to_keep"), Tensor):
            raise error("stream-positions", method=self.edit.method, model=self.model.model_class)
        cache = given.get("past_key_values")
        self.in_flight.given, self.in_flight.embeddings = given, None
        self.in_flight.past = int(cache.get_seq_length()) if isinstance(cache, Cache) else 0
        state = getattr(cache, STREAMS_ATTRIBUTE, {}).get(self.tracker.key) if self.in_flight.past else None
        if state is None:
            return None
        state.part()
        return self._join(outer, state, given, cache)

    def _join(
        self, outer: nn.Module, state: StreamState, given: dict[str, Any], cache: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Makes this forward one over both streams' next tokens; None where each has to take them by itself."""
        is_for_both = self.edit.in_step and self.alone and not torch.is_grad_enabled()
        if not is_for_both or state.waiting or not can_join(cache, state.cache):
            return None
        # The model would count positions itself, and knows those of the second stream's prompt by now.
        counts_itself = any(getattr(module, "rope_deltas", None) is not None for module in (outer, outer.base_model))
        both = for_both(given, len(state.has_image))
        if both is None or (counts_itself and not isinstance(given.get("position_ids"), Tensor)):
            return None
        if state.in_step is None:
            state.in_step = InStep(state.cache, len(state.has_image))
        state.in_step.join(cache)
        flight, self.in_flight.in_step = self.tracker.in_flight, state.in_step
        flight.beside, flight.without_edits = state.in_step.batch, True
        # The unedited model's plans are of half as many rows.
        _plans.refuse()
        return (), both

    def part(self) -> InStep | None:
        """Ends the forward over both streams, if one was begun: each cache has its own rows again."""
        in_step, self.in_flight.in_step = self.in_flight.in_step, None
        if in_step is not None:
            self.tracker.in_flight.beside, self.tracker.in_flight.without_edits = 0, False
            _plans.allow()
            in_step.part()
        return in_step

    def before_decoder(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the decoder: a prompt's tokens and images, embedded."""
        if self.in_flight.is_second or self.in_flight.past:
            return
        embeddings = (dict(zip(self.tracker.parameters, args, strict=False)) | kwargs).get("inputs_embeds")
        if embeddings is not None:
            self.in_flight.embeddings = embeddings[: len(embeddings) - self.tracker.in_flight.companions]

    @torch.compiler.disable(reason="attn_hooks runs a second stream on the host")
    def after_forward(self, outer: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook of the whole model, also where that failed: the logits of both streams."""
        if self.in_flight.is_second or self.in_flight.given is None:
            return None
        in_step, second = self.part(), None
        if output is None:
            return None
        if in_step is not None:
            output, second = in_step.outputs(output)
        given, self.in_flight.given = self.in_flight.given, None
        logits = output.logits if hasattr(output, "logits") else output[0]
        if is_captured(logits):
            raise error("stream-captured", method=self.edit.method, model=self.model.model_class)
        returned = (output.get("past_key_values"),) if hasattr(output, "logits") else output
        candidates = (*returned, given.get("past_key_values"))
        cache = next((candidate for candidate in candidates if isinstance(candidate, Cache)), None)
        if cache is not None and cache.is_compileable:
            given = given | self._plain_mask(given, cache)
        if self.in_flight.past == 0:
            state = self._begin(outer, given)
            self._keep(cache, state)
        else:
            state = getattr(cache, STREAMS_ATTRIBUTE, {}).get(self.tracker.key)
            if state is None and self.tracker.key not in getattr(cache, STREAMS_ATTRIBUTE, {}):
                raise error("stream-no-prompt", method=self.edit.method, model=self.model.model_class)
            sequence = self.tracker.in_flight.current
            images = () if sequence is None or sequence.new == 1 else sequence.layout.images
            if any(image.start >= self.in_flight.past for image in images):
                raise error("stream-later-image", method=self.edit.method, model=self.model.model_class)
            if state is not None and second is None:
                # The main cache holds this state.
                state.waiting.append({name: value for name, value in given.items() if name != "past_key_values"})
        self.in_flight.embeddings = None
        if state is None:
            return None
        combined = self._combined(outer, state, logits, second)
        if hasattr(output, "logits"):
            output.logits = combined
            return output
        return (combined, *output[1:])

    def _plain_mask(self, given: dict[str, Any], cache: Cache) -> dict[str, Tensor]:
        """With a static cache generate() hands over finished masks as long as that, which the second stream's is not."""
        sequence = self.tracker.in_flight.current
        if (
            sequence is None
            or given.get("attention_mask") is None
            or two_dimensional(given["attention_mask"]) is not None
        ):
            return {}
        valid = sequence.layout.valid
        # Compiled steps are not followed one by one.
        missing = int(cache.get_seq_length()) - valid.shape[1]
        return {"attention_mask": functional.pad(valid, (0, max(0, missing)), value=True).long()}

    def _begin(self, outer: Any, given: dict[str, Any]) -> StreamState | None:
        """The second stream of a prompt; None if it has no image."""
        sequence, embeddings = self.tracker.in_flight.current, self.in_flight.embeddings
        if given.get("input_ids") is None:
            raise error("stream-no-tokens", method=self.edit.method, model=self.model.model_class)
        if sequence is None or not sequence.layout.images:
            return None
        if embeddings is None:
            embeddings = outer.get_input_embeddings()(given["input_ids"])
        tokens = given.get("input_ids")
        seen = sequence.of_forward.get((CLASS_ATTENTION,))
        prompt = Prompt(given, embeddings, tokens, sequence.layout, self.model, seen, sequence.of_forward)
        second = self.edit.second_stream(prompt)
        positions = given.get("position_ids")
        state = StreamState(
            arguments={},
            same_tokens=second.keep is None,
            has_image=prompt.image.any(1),
            prompt_mask=None,
            prompt_length=embeddings.shape[1],
            positions_dims=positions.ndim if isinstance(positions, Tensor) else 2,
        )
        unchanged = {name: value for name, value in given.items() if name not in ("past_key_values", "logits_to_keep")}
        if second.keep is None:
            return replace(state, arguments={**unchanged, **second.arguments})
        mask = two_dimensional(given.get("attention_mask"))
        keep = second.keep if mask is None else second.keep & mask.bool()
        tokens_kept = keep.sum(1)
        if not bool(tokens_kept[state.has_image].all()):
            raise error("stream-no-text", method=self.edit.method, model=self.model.model_class)
        # To the right, in order; what is left out becomes padding on the left.
        length = int(tokens_kept.max())
        order = torch.sort(keep.to(torch.uint8), dim=1, stable=True).indices[:, -length:]
        own_mask = keep.gather(1, order).long()
        kept = embeddings.gather(1, order[..., None].expand(-1, -1, embeddings.shape[-1]))
        arguments = {
            "inputs_embeds": kept,
            "attention_mask": own_mask,
            "position_ids": _positions(own_mask, 0, state.positions_dims),
            "use_cache": True,
        }
        position = torch.arange(keep.shape[1], device=keep.device)
        last_of_image = torch.where(prompt.image, position, -1).amax(1, keepdim=True)
        places = length - tokens_kept[:, None] + keep.cumsum(1) - 1
        has_text = (keep.cumsum(1) > 0) & (position >= last_of_image) & state.has_image[:, None]
        return replace(state, arguments=arguments, prompt_mask=own_mask, places=places.where(has_text, -1))

    def _keep(self, cache: Cache | None, state: StreamState | None) -> None:
        """On the main cache, whose changes of rows the second stream has to follow."""
        if cache is None:
            return
        streams = getattr(cache, STREAMS_ATTRIBUTE, None)
        if streams is None:
            streams = {}
            setattr(cache, STREAMS_ATTRIBUTE, streams)
        streams[self.tracker.key] = state
        if state is None:
            return
        method, model = self.edit.method, self.model.model_class
        cache.reorder_cache = _Following(cache, state)
        for name in ("crop", "batch_repeat_interleave", "batch_select_indices"):
            if hasattr(type(cache), name):
                setattr(cache, name, _Refusing(name, method, model))

    def _combined(self, outer: nn.Module, state: StreamState, logits: Tensor, second: Tensor | None) -> Tensor:
        """``second``: the second stream's logits where it was in the same forward."""
        main, cutoff = logits.float(), self.edit.cutoff
        record = self.recorder.records[self.place]
        record.calls["decode" if state.waiting or second is not None else "prefill"] += 1
        steps = own_steps = logits.shape[1]
        has_image = state.has_image.to(main.device)[:, None, None]
        places, acts = None, has_image
        if not state.waiting and state.places is not None and state.prompt_mask is not None:
            # The second stream's prompt is another, and row by row.
            own_length = state.prompt_mask.shape[1]
            places = state.places[:, -steps:, None].to(main.device)
            acts = places >= 0
            own_steps = own_length - int(places.where(acts, own_length - 1).min())
        plausible = main >= main.amax(-1, keepdim=True) + (math.log(cutoff) if cutoff > 0 else -math.inf)
        record.steps += 1
        if second is None and steps == 1 and self._is_certain(plausible[:, -1], has_image[:, 0]):
            record.skipped += 1
            combined = main
        else:
            second = (self._advance(outer, state, own_steps) if second is None else second).to(main)
            if places is not None:
                of_main = (places - own_length + own_steps).clamp(min=0)
                second = second.gather(1, of_main.expand(-1, -1, second.shape[-1]))
            combined = torch.where(acts, self.edit.combine(main, second), main)
        out = torch.finfo(logits.dtype).min if logits.dtype == torch.float16 else -math.inf
        return combined.masked_fill(acts & ~plausible, out).to(logits.dtype)

    def _is_certain(self, plausible: Tensor, has_image: Tensor) -> bool:
        """Whether in each row with an image one token alone is ``plausible`` ``(B, vocabulary)``."""
        return bool((plausible.sum(-1, keepdim=True) == 1).logical_or(~has_image).all())

    def _advance(self, outer: nn.Module, state: StreamState, steps: int) -> Tensor:
        """Logits ``(B, steps, vocabulary)`` of the second stream, which takes all that waits."""
        logits = None
        if state.cache is None:
            state.cache = DynamicCache(config=self.model.text_config)
            wanted = 1 if state.waiting else steps
            try:
                logits = self._run(outer, {**state.arguments, "past_key_values": state.cache}, wanted)
            except AttnHooksError as refusal:
                if state.same_tokens or refusal.code != "no-image-in-prompt":
                    raise
                reason = "its second stream sees a few embeddings of the image, among which the other finds no image"
                other = refusal.details["method"]
                raise error("cannot-compose", first=self.edit.method, second=other, reason=reason) from refusal
            state.arguments = {}
        if state.waiting:
            with _without_plans():
                logits = self._run(outer, {**self._waiting(state), "past_key_values": state.cache}, steps)
            state.waiting = []
        assert logits is not None
        return logits[:, -steps:]

    def _waiting(self, state: StreamState) -> dict[str, Any]:
        """The arguments of one forward over all tokens that wait."""
        newest, steps = state.waiting[-1], state.waiting
        joined = {
            name: torch.cat([step[name] for step in steps], dim=-1)
            for name in OF_EACH_TOKEN
            if isinstance(newest.get(name), Tensor)
        }
        if state.same_tokens:
            finished = [step.get("attention_mask") for step in steps]
            if all(isinstance(mask, Tensor) and mask.ndim == 4 for mask in finished):
                joined["attention_mask"] = _rows_below(finished)
            return {name: value for name, value in newest.items() if name != "logits_to_keep"} | joined
        tokens = joined["input_ids"]
        assert state.cache is not None
        assert state.prompt_mask is not None
        mask = two_dimensional(newest.get("attention_mask"))
        since = state.cache.get_seq_length() - state.prompt_mask.shape[1] + tokens.shape[1]
        generated = (
            state.prompt_mask.new_ones(tokens.shape[0], since) if mask is None else mask[:, state.prompt_length :]
        )
        mask = torch.cat([state.prompt_mask, generated.to(state.prompt_mask)], dim=1)
        positions = _positions(mask, mask.shape[1] - tokens.shape[1], state.positions_dims)
        return {"input_ids": tokens, "attention_mask": mask, "position_ids": positions, "use_cache": True}

    def _run(self, outer: nn.Module, arguments: dict[str, Any], steps: int) -> Tensor:
        """Logits of the model without this hook, and without other edits if the method says so."""
        if "logits_to_keep" in self.tracker.outer_parameters:
            arguments["logits_to_keep"] = steps
        # The main stream's sequence is the one that whoever asks later means.
        current, flight = self.tracker.in_flight.current, self.tracker.in_flight
        self.in_flight.is_second, flight.without_edits = True, not self.edit.edits_second_stream
        flight.in_second_stream = True
        try:
            output = outer(**{**arguments, "use_cache": True, "return_dict": True})
        finally:
            self.in_flight.is_second, flight.without_edits, flight.in_second_stream = False, False, False
            self.in_flight.second, flight.current = flight.current, current
        found: Tensor = output.logits
        return found


@contextmanager
def _without_plans() -> Iterator[None]:
    """cuDNN makes a plan for every new number of queries and keys, which takes longer than the step that it is for. Here both
    numbers change from step to step."""
    _plans.refuse()
    try:
        yield
    finally:
        _plans.allow()


class _Plans:
    """cuDNN's switch is the whole process': the first of several threads turns it off, and the last one back."""

    def __init__(self) -> None:
        self.lock, self.refusing, self.before = threading.Lock(), 0, True

    def refuse(self) -> None:
        with self.lock:
            if self.refusing == 0:
                self.before = torch.backends.cuda.cudnn_sdp_enabled()
                torch.backends.cuda.enable_cudnn_sdp(False)
            self.refusing += 1

    def allow(self) -> None:
        with self.lock:
            self.refusing -= 1
            if self.refusing == 0:
                torch.backends.cuda.enable_cudnn_sdp(self.before)


_plans = _Plans()


def _rows_below(masks: Sequence[Tensor]) -> Tensor:
    """One mask ``(B, h, n, M)`` of masks of steps after one another, each with its queries and the keys that were there."""
    hidden = False if masks[0].dtype == torch.bool else torch.finfo(masks[0].dtype).min
    length = masks[-1].shape[-1]
    return torch.cat([functional.pad(mask, (0, length - mask.shape[-1]), value=hidden) for mask in masks], dim=2)


def two_dimensional(mask: Any) -> Tensor | None:
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _positions(mask: Tensor, first: int, dims: int) -> Tensor:
    """Positions of the tokens from place ``first`` on, counted over real ones; for multimodal RoPE three times the same."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, first:]
    return positions if dims == 2 else positions[None].expand(3, -1, -1)
