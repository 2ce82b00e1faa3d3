"""Forwards of the likeliest next tokens, all as one, beside the main stream: what OPERA asks before a token is chosen.

The runner has a cache of its own, which takes each token after the main stream, and then the candidates: as many tokens, at one
position, each of which sees all before and itself. What the edit reads of their attention makes a penalty; the cache drops them.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from attn_hooks.errors import error
from attn_hooks.model_info import ModelInfo
from attn_hooks.streams import Prompt, SecondStream, StreamEdit, StreamRunner, StreamState, two_dimensional

WEIGHTS = "weights of the newest rows"


@dataclass
class Response:
    """What is known of the response so far. ``of_columns`` ``(B, columns)``: kept by the edit, a number for each token."""

    start: int  # place of its first token in the cache
    image: Tensor  # (B, keys of the prompt) bool
    of_columns: Tensor | None = None

    def select_rows(self, rows: Tensor) -> None:
        if self.of_columns is not None:
            self.of_columns = self.of_columns[rows]


class CandidateEdit(StreamEdit):
    """Base of methods that look at each candidate for the next token before it is chosen."""

    candidates: int

    def check(self, model: ModelInfo) -> None:
        super().check(model)
        reasons = {
            "multimodal RoPE gives a token three positions": "mrope_section"
            in (getattr(model.text_config, "rope_parameters", None) or {}),
            "layers with a sliding window drop keys": any(layer.sliding_window for layer in model.layers),
        }
        for reason, holds in reasons.items():
            if holds:
                raise error("candidates", method=self.method, model=model.model_class, reason=reason)

    @property
    def cutoff(self) -> float:
        return 0.0

    def second_stream(self, prompt: Prompt) -> SecondStream:
        """The prompt as it is."""
        return SecondStream()

    def combine(self, logits: Tensor, second: Tensor) -> Tensor:
        """As they are: the penalties act."""
        return logits

    @abstractmethod
    def take(self, response: Response, weights: Tensor) -> None:
        """A token was chosen, with weights ``(B, M)`` on all keys up to its own."""

    @abstractmethod
    def penalties(self, response: Response, weights: Tensor, own: Tensor) -> Tensor:
        """``(B, N)`` of candidates with weights ``(B, N, M)`` on the keys before and ``(B, N)`` on their own."""


@dataclass
class _CandidateState(StreamState):
    response: Response | None = None

    def select_rows(self, rows: Tensor) -> None:
        super().select_rows(rows)
        if self.response is not None:
            self.response.select_rows(rows)


class CandidateRunner(StreamRunner):
    """Runs the candidates of the one edit that asks for them."""

    edit: CandidateEdit

    def _begin(self, outer: Any, given: dict[str, Any]) -> StreamState | None:
        state = super()._begin(outer, given)
        return None if state is None else _CandidateState(**vars(state))

    def _combined(self, outer: nn.Module, state: StreamState, logits: Tensor, second: Tensor | None) -> Tensor:
        assert isinstance(state, _CandidateState)
        assert second is None, "candidates run by themselves"
        record = self.recorder.records[self.place]
        record.calls["decode" if state.waiting else "prefill"] += 1
        main = logits.float()
        last = main[:, -1]
        newest = state.waiting[-1] if state.waiting else state.arguments
        self._catch_up(outer, state)
        tokens = last.topk(min(self.edit.candidates, last.shape[-1]), dim=-1).indices
        weights, own = self._try(outer, state, tokens, two_dimensional(newest.get("attention_mask")))
        assert state.response is not None
        penalty = self.edit.penalties(state.response, weights, own)
        # The same for all candidates changes nothing among them.
        chosen = last.gather(1, tokens) - (penalty - penalty.amin(1, keepdim=True)).to(last)
        out = torch.finfo(logits.dtype).min if logits.dtype == torch.float16 else -torch.inf
        penalised = torch.full_like(last, out).scatter(1, tokens, chosen)
        result = main.clone()
        result[:, -1] = torch.where(state.has_image.to(main.device)[:, None], penalised, last)
        return result.to(logits.dtype)

    def _catch_up(self, outer: Any, state: _CandidateState) -> None:
        """The prompt, or what came since; several tokens at once are a new turn, whose response begins behind them."""
        if state.cache is None:
            state.cache = DynamicCache(config=self.model.text_config)
            self._run(outer, {**state.arguments, "past_key_values": state.cache}, 1)
            state.arguments = {}
            sequence = self.tracker.in_flight.current
            assert sequence is not None
            state.response = Response(state.cache.get_seq_length(), sequence.layout.is_image.to(state.has_image.device))
        if state.waiting:
            before = state.cache.get_seq_length()
            weights = self._weights(outer, state, self._waiting(state))
            state.waiting = []
            assert state.response is not None
            if weights.shape[1] > 1:
                state.response = Response(state.cache.get_seq_length(), state.response.image)
            else:
                self.edit.take(state.response, weights[:, 0, : before + 1])

    def _try(self, outer: Any, state: _CandidateState, tokens: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weights of the candidates on the keys before ``(B, N, M)`` and on themselves ``(B, N)``; the cache stays as it was."""
        cache = state.cache
        assert cache is not None
        (batch, number), past = tokens.shape, cache.get_seq_length()
        valid = torch.ones(batch, past, dtype=torch.bool, device=tokens.device) if real is None else real.bool()
        alone = torch.eye(number, dtype=torch.bool, device=tokens.device).expand(batch, 1, number, number)
        visible = torch.cat([valid[:, None, None].expand(batch, 1, number, past), alone], dim=-1)
        # Eager attention adds its mask.
        mask = torch.zeros(visible.shape, dtype=outer.dtype, device=tokens.device)
        given = {
            "input_ids": tokens,
            "attention_mask": mask.masked_fill_(~visible, torch.finfo(outer.dtype).min),
            "position_ids": valid.sum(1, keepdim=True).expand(batch, number),
        }
        weights = self._weights(outer, state, given)
        cache.crop(-number)
        return weights[..., :past], weights[..., past:].diagonal(dim1=1, dim2=2)

    def _weights(self, outer: Any, state: _CandidateState, given: dict[str, Any]) -> Tensor:
        """What the edit read in a forward, ``(B, N, M)``."""
        self._run(outer, {**given, "past_key_values": state.cache}, 1)
        second = self.in_flight.second
        assert second is not None
        found: Tensor = second.of_forward[WEIGHTS,]
        return found
