"""RULER's variable tracking (arXiv 2404.06654, section 3.2): follow a chain of assignments through noise."""

from __future__ import annotations

import itertools
import random
import string
from typing import ClassVar

from pydantic import NonNegativeInt, PositiveInt

from attn_eval.prompting import largest_fitting
from attn_eval.tasks.base import Cell, Draft, GenerationTask, place
from attn_eval.templates import (
    PASSKEY_NOISE,
    TRACKING_ANSWER,
    TRACKING_FIRST,
    TRACKING_HOP,
    TRACKING_INTRO,
    TRACKING_QUESTION,
)
from attn_eval.words import distinct, letters

NAME_LETTERS = 5
EXAMPLE_NAME_LETTERS = 3


class VariableTrackingTask(GenerationTask):
    """``VAR A = 12345``, then ``VAR B = VAR A`` and so on, in order, among lines of noise; name all the variables.

    Attributes:
        hops: assignments from variable to variable; the answer has hops + 1 names. RULER: 4.
        example_tokens: an example with its answer, of at most so many tokens, stands before the question and counts
            in the length. RULER: 500. 0 leaves it out.
    """

    version: ClassVar[int] = 1

    new_tokens: PositiveInt = 30
    hops: PositiveInt = 4
    example_tokens: NonNegativeInt = 500

    def minimum_size(self) -> int:
        return self.hops + 1

    def draw(self, rng: random.Random, size: int, cell: Cell) -> Draft:
        """``size`` counts the lines of noise."""
        example = self._example(rng, cell)
        question = self._question(rng, size, NAME_LETTERS)
        return Draft(
            input=example + question.input,
            answer_prefix=question.answer_prefix,
            outputs=question.outputs,
            answer_starts=tuple(len(example) + start for start in question.answer_starts),
            depth=question.depth,
        )

    def _example(self, rng: random.Random, cell: Cell) -> str:
        """A small question with its answer and a blank line, its names and value new for every sample."""
        if not self.example_tokens:
            return ""
        state = rng.getstate()

        def example_at(size: int) -> str:
            rng.setstate(state)
            shown = self._question(rng, size, EXAMPLE_NAME_LETTERS)
            return f"{shown.input}{shown.answer_prefix} {' '.join(shown.outputs)}\n\n"

        size = largest_fitting(
            lambda lines: cell.encoder.token_count(example_at(lines)),
            budget=self.example_tokens,
            smallest=self.minimum_size(),
            largest=None,
            new_tokens=0,
            what=f"{self.name}, example_tokens",
        )
        return example_at(size)

    def _question(self, rng: random.Random, size: int, name_letters: int) -> Draft:
        names = distinct(lambda: letters(rng, name_letters, string.ascii_uppercase), self.hops + 1)
        value = str(rng.randint(10_000, 99_998))
        chain = [TRACKING_FIRST.format(name=names[0], value=value)]
        chain += [TRACKING_HOP.format(name=name, source=source) for source, name in itertools.pairwise(names)]
        positions = sorted(rng.sample(range(size), len(chain)))
        context = "\n".join(place([PASSKEY_NOISE] * size, chain, positions))
        starts = tuple(
            len(TRACKING_INTRO) + context.index(line) + line.index(name)
            for line, name in zip(chain, names, strict=True)
        )
        return Draft(
            input=TRACKING_INTRO + context + TRACKING_QUESTION.format(value=value),
            answer_prefix=TRACKING_ANSWER.format(count=len(names), value=value),
            outputs=tuple(names),
            answer_starts=starts,
            depth=100 * (starts[0] - len(TRACKING_INTRO)) / len(context),
        )
