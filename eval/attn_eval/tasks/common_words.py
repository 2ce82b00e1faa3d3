"""RULER's common words extraction (arXiv 2404.06654, section 3.3): which words of a long list are the most common."""

from __future__ import annotations

import random
from typing import ClassVar, NamedTuple

from pydantic import PositiveInt

from attn_eval.tasks.base import Cell, Draft, GenerationTask
from attn_eval.templates import COMMON_WORDS_ANSWER, COMMON_WORDS_INTRO, COMMON_WORDS_QUESTION
from attn_eval.words import all_words

SHORT = 4096
COMMON_WORDS = 10


class _Counts(NamedTuple):
    common: int
    other: int


class _Example(NamedTuple):
    words: int
    counts: _Counts


class CommonWordsTask(GenerationTask):
    """A numbered list in which 10 words stand 30 times and all the others 3 times; name the 10.

    Below 4096 tokens RULER lowers the counts to 6 and 1. One example with its answer comes first: 40 words, 10 times
    and 3 times (20 words, 3 times and once below 4096); its tokens count in the length.

    Attributes:
        example: put the example first, as RULER does.
    """

    version: ClassVar[int] = 1

    new_tokens: PositiveInt = 120
    example: bool = True

    def minimum_size(self) -> int:
        return COMMON_WORDS + 1

    def largest_size(self) -> int | None:
        return len(all_words())

    def draw(self, rng: random.Random, size: int, cell: Cell) -> Draft:
        """``size`` counts the distinct words of the list."""
        short = cell.length < SHORT
        question, answer = self._question(rng, size, _Counts(6, 1) if short else _Counts(30, 3))
        prefix = COMMON_WORDS_ANSWER.format(count=COMMON_WORDS)
        example = ""
        if self.example:
            shown = _Example(20, _Counts(3, 1)) if short else _Example(40, _Counts(10, 3))
            shown_question, shown_answer = self._question(rng, shown.words, shown.counts)
            example = f"{shown_question}{prefix} {_numbered(shown_answer)}\n\n"
        return Draft(input=example + question, answer_prefix=prefix, outputs=tuple(answer))

    def _question(self, rng: random.Random, size: int, counts: _Counts) -> tuple[str, list[str]]:
        words = rng.sample(all_words(), size)
        common, others = words[:COMMON_WORDS], words[COMMON_WORDS:]
        listed = common * counts.common + others * counts.other
        rng.shuffle(listed)
        question = COMMON_WORDS_INTRO + _numbered(listed) + COMMON_WORDS_QUESTION.format(count=COMMON_WORDS)
        return question, common


def _numbered(words: list[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))
