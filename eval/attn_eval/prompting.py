"""Prompts as tokens: with or without a chat template, counted, and fitted to a length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from attn_eval.errors import EvaluationError

MAX_PROBES = 32


class LengthError(EvaluationError):
    """A task can't be made at the length asked for; the message names the shortest (or longest) that can."""


@dataclass(frozen=True)
class PromptEncoder:
    """Turns a task's text into the tokens that the model sees.

    Attributes:
        tokenizer: a Hugging Face tokenizer.
        chat_template: put the text into the tokenizer's chat template as the user's turn, and the answer prefix
            behind the opening of the assistant's turn. Off: the bare text, with the special tokens (BOS) that the
            tokenizer adds by itself.
    """

    tokenizer: Any
    chat_template: bool = False

    def __post_init__(self) -> None:
        if self.chat_template and not getattr(self.tokenizer, "chat_template", None):
            raise EvaluationError(
                "generation.chat_template is on but this model's tokenizer has no chat template: "
                "set generation.chat_template=false"
            )

    def text(self, prompt: str, answer_prefix: str = "") -> str:
        """The whole text, up to where the model begins to write."""
        if not self.chat_template:
            return prompt + answer_prefix
        opened = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        return str(opened) + answer_prefix.lstrip()

    def encode(self, prompt: str, answer_prefix: str = "") -> list[int]:
        """The token ids of the whole text. A chat template writes its own special tokens, so none are added to it."""
        return list(self._tokenize(self.text(prompt, answer_prefix))["input_ids"])

    def count(self, prompt: str, answer_prefix: str = "") -> int:
        """How many tokens the model is given."""
        return len(self.encode(prompt, answer_prefix))

    def token_positions(self, prompt: str, answer_prefix: str, starts: Sequence[int]) -> tuple[int, ...]:
        """The token indices that hold the characters ``prompt[start]``.

        Exact for a fast tokenizer, by its offsets; for a slow one, the number of tokens before the character, which
        can be off by one where a token spans it.
        """
        if not starts:
            return ()
        text = self.text(prompt, answer_prefix)
        shift = text.find(prompt)
        if shift < 0:
            raise EvaluationError("this tokenizer's chat template rewrites the user's text: answers can't be located")
        characters = [shift + start for start in starts]
        if not getattr(self.tokenizer, "is_fast", False):
            return tuple(len(self._tokenize(text[:character])["input_ids"]) for character in characters)
        encoded = self._tokenize(text, return_offsets_mapping=True)
        ends = [(index, end) for index, (_, end) in enumerate(encoded["offset_mapping"]) if end]
        return tuple(next(index for index, end in ends if end > character) for character in characters)

    def character_at_share(self, text: str, share: float) -> int:
        """The character of ``text`` behind that share (0.0 to 1.0) of its tokens, special tokens not counted."""
        if not getattr(self.tokenizer, "is_fast", False):
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            return len(self.tokenizer.decode(ids[: int(len(ids) * share)], clean_up_tokenization_spaces=False))
        encoded = self.tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
        starts = [start for start, _ in encoded["offset_mapping"]]
        index = int(len(starts) * share)
        return starts[index] if index < len(starts) else len(text)

    def token_count(self, text: str) -> int:
        """Tokens of a bare text, special tokens not counted."""
        return len(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _tokenize(self, text: str, **options: Any) -> Any:
        return self.tokenizer(text, add_special_tokens=not self.chat_template, verbose=False, **options)


def largest_fitting(
    count: Callable[[int], int], budget: int, smallest: int, largest: int | None, new_tokens: int, what: str
) -> int:
    """The largest size whose prompt holds at most ``budget`` tokens, found by interpolation.

    Growing a text by one unit adds nearly the same number of tokens each time, so a few probes are enough; the
    number of probes is bounded, and the size returned was counted and does fit.

    Args:
        count: tokens of the prompt at a size; rising, but for noise.
        budget: tokens that the prompt may have.
        smallest: the smallest size that makes sense for the task.
        largest: the largest size that the task's material allows, or None.
        new_tokens: tokens kept free for the answer, for the message.
        what: the task's name, for the message.

    Raises:
        LengthError: not even the smallest fits, or the largest still leaves room for another tenth of the budget.
    """
    low, low_tokens = smallest, count(smallest)
    if low_tokens > budget:
        raise LengthError(
            f"{what}: length {budget + new_tokens} is too short; with this tokenizer and {new_tokens} new tokens the "
            f"shortest feasible length is {low_tokens + new_tokens}"
        )
    too_large = None if largest is None else largest + 1
    guess = 2 * smallest + 8
    for _ in range(MAX_PROBES):
        if too_large is not None:
            if too_large - low <= 1:
                break
            guess = min(guess, too_large - 1)
        size = max(guess, low + 1)
        tokens = count(size)
        tokens_per_unit = max((tokens - low_tokens) / (size - low), 0.01)
        if tokens <= budget:
            low, low_tokens = size, tokens
        else:
            too_large = size
        if budget - low_tokens < tokens_per_unit:
            break
        guess = low + int((budget - low_tokens) / tokens_per_unit)
    if largest is not None and low == largest and low_tokens < 0.9 * budget:
        raise LengthError(
            f"{what}: length {budget + new_tokens} is too long; the material of this task ends at a length of "
            f"{low_tokens + new_tokens} with this tokenizer"
        )
    return low
