"""Negative log-likelihood of held-out text over the position in a long window.

Three measurements go by the name of perplexity and an edit can differ in them, so the mode is part of the task:
``prefill`` scores a window in one forward pass, ``decode`` gives the window's first tokens as a prompt and then feeds
one true token at a time through the cache. An edit that acts in decode alone changes nothing in ``prefill``.
The mean is over tokens, never over windows' perplexities.
"""

from __future__ import annotations

import functools
import json
import math
import random
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from attn_eval.errors import EvaluationError
from attn_eval.haystack import HELD_OUT, Haystack, get_haystack
from attn_eval.prompting import PromptEncoder
from attn_eval.tasks.base import LengthTask

POSITIONS_PER_CHUNK = 1024
FIRST_BUCKET = 1024


@dataclass(frozen=True)
class Window:
    """A stretch of text as token ids.

    Attributes:
        id: unique in a run: ``label-length-index``.
        task: the registry's name.
        length_target: tokens in the window, BOS included.
        token_ids: the tokens.
        scored_from: index of the first token whose likelihood counts, at least 1.
        scored_bytes: UTF-8 bytes of the text of the scored tokens, so that bits a byte need no tokenizer.
    """

    id: str
    task: str
    length_target: int
    token_ids: tuple[int, ...]
    scored_from: int
    scored_bytes: int

    def to_json(self) -> str:
        """One line of JSON with sorted keys: the form that is hashed."""
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(frozen=True)
class WindowScore:
    """What a model makes of a window.

    Attributes:
        nll: summed negative log-likelihood of the scored tokens, nats.
        tokens: how many tokens were scored.
        scored_bytes: UTF-8 bytes of their text.
        buckets: position bucket (``0-1024``, ``1024-2048``, ``2048-4096``...) -> (summed nll, tokens).
    """

    nll: float
    tokens: int
    scored_bytes: int
    buckets: dict[str, tuple[float, int]]


class PerplexityTask(LengthTask):
    """Windows of a held-out text: anywhere in it without overlap, or one after the other with a stride.

    Attributes:
        samples: windows at each length.
        source: which text, see `attn_eval.haystack.get_haystack`.
        stride: None cuts the text into windows that do not overlap and takes them in an order drawn from the seed.
            A number takes windows from the text's beginning, each that many tokens behind the one before, and
            scores only the tokens that the one before did not have.
        add_bos: begin every window with the tokenizer's BOS token, if it has one. With it, the first token of text
            is scored too; without it, scoring begins at the second.
        mode: ``prefill`` or ``decode``, see above.
        prompt_tokens: tokens given at once before one-token decoding begins; they are not scored. Decode only.
    """

    version: ClassVar[int] = 1

    samples: PositiveInt = 8
    source: str = HELD_OUT
    stride: PositiveInt | None = None
    add_bos: bool = True
    mode: Literal["prefill", "decode"] = "prefill"
    prompt_tokens: Annotated[int, Field(ge=1)] = 1

    @model_validator(mode="after")
    def _lengths_leave_something(self) -> Self:
        if self.mode == "prefill" and "prompt_tokens" in self.model_fields_set:
            raise ValueError("prompt_tokens is for mode: decode only")
        if min(self.lengths) <= max(self.prompt_tokens, 1):
            raise ValueError(f"a length of {min(self.lengths)} leaves no token to score")
        if self.stride is not None and self.stride > min(self.lengths):
            raise ValueError(f"stride ({self.stride}) can't be more than the shortest length ({min(self.lengths)})")
        return self

    def haystack_used(self) -> Haystack | None:
        return get_haystack(self.source)

    def items_of(self, encoder: PromptEncoder, length: int, seed: int) -> list[Any]:
        return self.windows(encoder.tokenizer, length, self.samples, seed)

    def windows(self, tokenizer: Any, length: int, samples: int, seed: int) -> list[Window]:
        """``samples`` windows of ``length`` tokens; window i is the same for any number of them.

        Raises:
            EvaluationError: the text is too short for that many; the message says how many it has.
        """
        text = get_haystack(self.source)
        ids, byte_ends = _tokenized(tokenizer, self.source)
        bos = tokenizer.bos_token_id if self.add_bos else None
        head = () if bos is None else (bos,)
        span = length - len(head)
        stride = min(self.stride or span, span)
        available = 0 if len(ids) < span else (len(ids) - span) // stride + 1
        if available < samples:
            raise EvaluationError(
                f"{self.name}: the text {text.name!r} has {available} windows of {length} tokens at stride {stride} "
                f"({len(ids)} tokens in all), {samples} were asked for: lower samples, length or stride"
            )
        order = list(range(available))
        if self.stride is None:
            random.Random(f"{seed}/{self.task}/{length}").shuffle(order)
        windows = []
        for index, place in enumerate(order[:samples]):
            start = place * stride
            overlap = span - stride if index else 0
            scored_from = max(self.prompt_tokens if self.mode == "decode" else 1, len(head) + overlap)
            first_scored = start + scored_from - len(head)
            windows.append(
                Window(
                    id=f"{self.name}-{length}-{index}",
                    task=self.task,
                    length_target=length,
                    token_ids=head + ids[start : start + span],
                    scored_from=scored_from,
                    scored_bytes=byte_ends[start + span - 1] - (byte_ends[first_scored - 1] if first_scored else 0),
                )
            )
        return windows

    def measure(self, model: Any, window: Window) -> WindowScore:
        """The likelihood of the window's scored tokens under the model as it stands, edits included."""
        import torch

        ids = torch.tensor([window.token_ids], device=model.device)
        nll = prefill_nll(model, ids) if self.mode == "prefill" else decode_nll(model, ids, self.prompt_tokens)
        scored = nll[-(ids.shape[1] - window.scored_from) :]
        buckets: dict[str, tuple[float, int]] = {}
        for start, stop in _bucket_edges(ids.shape[1]):
            inside = scored[max(start - window.scored_from, 0) : max(stop - window.scored_from, 0)]
            if len(inside):
                buckets[f"{start}-{stop}"] = (float(inside.sum()), len(inside))
        return WindowScore(float(scored.sum()), len(scored), window.scored_bytes, buckets)


@functools.lru_cache(maxsize=4)
def _tokenized(tokenizer: Any, source: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The text's token ids and, for each, the number of UTF-8 bytes of the text up to its end."""
    text = get_haystack(source).text
    if not getattr(tokenizer, "is_fast", False):
        raise EvaluationError("perplexity needs a fast tokenizer (one with offsets), to count the bytes it scores")
    encoded = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    bytes_before = [0]
    for character in text:
        bytes_before.append(bytes_before[-1] + len(character.encode("utf-8")))
    return tuple(encoded["input_ids"]), tuple(bytes_before[end] for _, end in encoded["offset_mapping"])


def _bucket_edges(length: int) -> list[tuple[int, int]]:
    edges = [(0, FIRST_BUCKET)]
    while edges[-1][1] < length:
        edges.append((edges[-1][1], 2 * edges[-1][1]))
    return edges


def prefill_nll(model: Any, ids: Any) -> Any:
    """Negative log-likelihood, nats, of tokens 1 to N - 1 given all before, from one forward pass.

    The logits are made from the last hidden states 1024 positions at a time: at 128 k tokens and a vocabulary of
    128 k, all at once would take 67 GB in fp32.

    Args:
        model: a causal language model of transformers.
        ids: (1, N) token ids on the model's device, N >= 2.

    Returns:
        (N - 1,) fp32.

    Raises:
        EvaluationError: the model makes its logits from the hidden states in a way that we don't know; seen by
            comparing the last position's logits with the model's own.
    """
    import torch

    captured: list[Any] = []

    def keep_hidden_states(module: Any, arguments: Any, output: Any) -> None:
        captured.append(output[0])

    handle = model.base_model.register_forward_hook(keep_hidden_states)
    try:
        with torch.no_grad():
            own_logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1].float()
    finally:
        handle.remove()
    hidden = captured[-1][0]
    with torch.no_grad():
        ours = _logits(model, hidden[-1:])[0]
        if not torch.allclose(ours, own_logits, rtol=1e-2, atol=1e-2 * float(own_logits.abs().max())):
            raise EvaluationError(
                f"{type(model).__name__} makes its logits in a way that perplexity doesn't know "
                "(neither plain, scaled nor soft-capped): leave the perplexity task out for this model"
            )
        pieces = []
        for start in range(0, ids.shape[1] - 1, POSITIONS_PER_CHUNK):
            stop = min(start + POSITIONS_PER_CHUNK, ids.shape[1] - 1)
            logits = _logits(model, hidden[start:stop])
            pieces.append(torch.nn.functional.cross_entropy(logits, ids[0, start + 1 : stop + 1], reduction="none"))
    return torch.cat(pieces)


def decode_nll(model: Any, ids: Any, prompt_tokens: int) -> Any:
    """Negative log-likelihood, nats, of tokens prompt_tokens to N - 1, each fed alone through the cache.

    Returns:
        (N - prompt_tokens,) fp32.
    """
    import torch

    pieces = []
    with torch.no_grad():
        output = model(input_ids=ids[:, :prompt_tokens], use_cache=True, logits_to_keep=1)
        for position in range(prompt_tokens, ids.shape[1]):
            logits = output.logits[0, -1:].float()
            pieces.append(torch.nn.functional.cross_entropy(logits, ids[0, position : position + 1], reduction="none"))
            if position + 1 < ids.shape[1]:
                output = model(
                    input_ids=ids[:, position : position + 1], past_key_values=output.past_key_values, use_cache=True
                )
    return torch.cat(pieces)


def _logits(model: Any, hidden: Any) -> Any:
    """Logits in fp32 from last hidden states (N, hidden size), with the families' own scaling and soft cap."""
    config = model.config.get_text_config()
    logits = model.get_output_embeddings()(hidden).float()
    if getattr(config, "logits_scaling", None):
        logits = logits / config.logits_scaling
    if getattr(config, "logit_scale", None):
        logits = logits * config.logit_scale
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if not cap else cap * (logits / cap).tanh()


def summarise(scores: list[WindowScore]) -> dict[str, Any]:
    """Windows together: nats a token, perplexity, bits a byte, and nats a token by position."""
    nll, tokens = sum(score.nll for score in scores), sum(score.tokens for score in scores)
    buckets: dict[str, tuple[float, int]] = {}
    for score in scores:
        for name, (bucket_nll, bucket_tokens) in score.buckets.items():
            before = buckets.get(name, (0.0, 0))
            buckets[name] = (before[0] + bucket_nll, before[1] + bucket_tokens)
    return {
        "nats_per_token": nll / tokens,
        "perplexity": math.exp(nll / tokens),
        "bits_per_byte": nll / math.log(2) / sum(score.scored_bytes for score in scores),
        "nats_per_token_by_position": {name: total / count for name, (total, count) in buckets.items()},
        "tokens": tokens,
    }
