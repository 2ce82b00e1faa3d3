"""The needle-in-a-haystack grid over length and depth (Kamradt, LLMTest_NeedleInAHaystack), scored by exact number.

As MInference reports it: a key with a 7-digit number in place of the San Francisco fact, and "the digits occur in
the answer" in place of a judge.
"""

from __future__ import annotations

import random
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt

from attn_eval.haystack import HELD_OUT, Haystack, get_haystack
from attn_eval.tasks.base import Cell, Draft, GenerationTask
from attn_eval.templates import NEEDLE, NIAH_ANSWER_ONE, NIAH_INTRO, NIAH_QUESTION
from attn_eval.words import seven_digits, word_key

Percent = Annotated[float, Field(ge=0, le=100)]
FULL_STOPS = (".", "!", "?")


class NeedleGridTask(GenerationTask):
    """One needle at a given depth of a text that fills the length, for every length and depth of a grid.

    The needle goes in behind that share of the context's tokens, moved back to the end of a sentence; depth 100 puts
    it at the very end, depth 0 at the very beginning.

    Attributes:
        depths: percent of the context, 0 to 100. Kamradt's own grid has 35; ten or eleven are usual.
        source: which text, see `attn_eval.haystack.get_haystack`.
        start: the text's first sentence, as in Kamradt's, or a sentence drawn anew for each sample.
    """

    version: ClassVar[int] = 1

    new_tokens: PositiveInt = 32
    depths: Annotated[tuple[Percent, ...], Field(min_length=1)] = (0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100)
    source: str = HELD_OUT
    start: Literal["beginning", "random"] = "beginning"

    def haystack_used(self) -> Haystack | None:
        return get_haystack(self.source)

    def depths_used(self) -> tuple[float | None, ...]:
        return self.depths

    def draw(self, rng: random.Random, size: int, cell: Cell) -> Draft:
        """``size`` counts the haystack's words."""
        key, value = word_key(rng), seven_digits(rng)
        depth = cell.depth or 0.0
        needle = NEEDLE.format(type="numbers", key=key, value=value)
        text = get_haystack(self.source).words_from(rng if self.start == "random" else None, size)
        behind = cell.encoder.character_at_share(text, depth / 100)
        position = behind if depth >= 100 else sentence_end_before(text, behind)
        parts = [text[:position].strip(), needle, text[position:].strip()]
        context = " ".join(part for part in parts if part)
        intro = NIAH_INTRO.format(type="numbers")
        return Draft(
            input=intro + context + NIAH_QUESTION.format(type="number", query=key),
            answer_prefix=NIAH_ANSWER_ONE.format(type="number", query=key),
            outputs=(value,),
            answer_starts=(len(intro) + context.index(needle) + needle.rindex(value),),
            depth=depth,
        )


def sentence_end_before(text: str, position: int) -> int:
    """The last character index, at most ``position``, that stands behind a sentence's end; 0 if there is none.

    Only a full stop with white space behind it ends a sentence, so that ``3.14`` is not torn.
    """
    while position > 0 and not (text[position - 1] in FULL_STOPS and text[position : position + 1].isspace()):
        position -= 1
    return position
