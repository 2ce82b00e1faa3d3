"""RULER's frequent words extraction (arXiv 2404.06654, section 3.3): coded words whose counts follow a Zipf law."""

from __future__ import annotations

import functools
import math
import random
from typing import Annotated, ClassVar

from pydantic import Field, PositiveInt

from attn_eval.tasks.base import Cell, Draft, GenerationTask
from attn_eval.templates import FREQUENT_WORDS_ANSWER, FREQUENT_WORDS_INTRO, FREQUENT_WORDS_QUESTION
from attn_eval.words import distinct, letters

WORD_LETTERS = 6
TOKENS_PER_VOCABULARY_WORD = 50
ASKED = 3
NOISE = "..."
ZETA_TERMS = 100_000


class FrequentWordsTask(GenerationTask):
    """Random six-letter words, rank r standing in proportion to r ** -alpha; the commonest is written as dots, the
    next three are the answer.

    The vocabulary has a fiftieth of the length in words. The fourth rank always stands less often than the third of
    the answer: a tie would leave the question without a right answer (RULER doesn't check it).

    Attributes:
        alpha: the exponent of the Zipf law, above 1. RULER: 2.0.
    """

    version: ClassVar[int] = 1

    new_tokens: PositiveInt = 50
    alpha: Annotated[float, Field(gt=1.0)] = 2.0

    def minimum_size(self) -> int:
        """Words in all, enough that ranks 2 to 5 have falling counts, the last of the answer at least 1."""
        size = 1
        while not self._untied(self._counts(size, ASKED + 2)):
            size += 1
        return size

    def draw(self, rng: random.Random, size: int, cell: Cell) -> Draft:
        """``size`` is the number of words that the Zipf law hands out."""
        ranks = max(cell.length // TOKENS_PER_VOCABULARY_WORD, ASKED + 2)
        vocabulary = distinct(lambda: letters(rng, WORD_LETTERS), ranks)
        counts = self._counts(self._without_tie(size), ranks)
        listed = [word for word, count in zip(vocabulary, counts, strict=True) for _ in range(count)]
        listed = [NOISE if word == vocabulary[0] else word for word in listed]
        rng.shuffle(listed)
        return Draft(
            input=FREQUENT_WORDS_INTRO + " ".join(listed) + FREQUENT_WORDS_QUESTION,
            answer_prefix=FREQUENT_WORDS_ANSWER,
            outputs=tuple(vocabulary[1 : ASKED + 1]),
        )

    def _without_tie(self, size: int) -> int:
        """The nearest size, at most ``size``, whose third and fourth words differ in count."""
        while not self._untied(self._counts(size, ASKED + 2)):
            size -= 1
        return size

    @staticmethod
    def _untied(counts: list[int]) -> bool:
        return counts[ASKED] > counts[ASKED + 1]

    def _counts(self, size: int, ranks: int) -> list[int]:
        total = zeta(self.alpha)
        return [math.floor(size * rank**-self.alpha / total) for rank in range(1, ranks + 1)]


@functools.cache
def zeta(exponent: float) -> float:
    """Riemann's zeta function for an exponent above 1: a partial sum and the Euler-Maclaurin tail; pi ** 2 / 6 at 2."""
    partial = sum(term**-exponent for term in range(1, ZETA_TERMS))
    tail = ZETA_TERMS ** (1 - exponent) / (exponent - 1) + 0.5 * ZETA_TERMS**-exponent
    return partial + tail
