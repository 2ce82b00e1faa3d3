"""RULER's eight needle-in-a-haystack tasks (arXiv 2404.06654, appendix B), as presets of one family."""

from __future__ import annotations

import random
from typing import ClassVar, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from attn_eval.haystack import HELD_OUT, Haystack, get_haystack
from attn_eval.tasks.base import Cell, Draft, GenerationTask, place
from attn_eval.templates import (
    NEEDLE,
    NIAH_ANSWER_MANY,
    NIAH_ANSWER_ONE,
    NIAH_INTRO,
    NIAH_QUESTION,
    PASSKEY_NOISE,
    join_query,
)
from attn_eval.words import distinct, seven_digits, uuid4, word_key

# RULER's forty places: whole percents, evenly spaced, both ends included.
DEPTHS = tuple(round(100 * step / 39) for step in range(40))


class NeedleTask(GenerationTask):
    """Needles ``One of the special magic numbers for KEY is: VALUE.`` in a haystack, and a question for some of them.

    Attributes:
        haystack: ``noise`` (one repeated line), ``text`` (sentences of ``source``; RULER's "essay") or ``needles``
            (further needles with other keys).
        source: which text, see `attn_eval.haystack.get_haystack`; read for ``haystack: text`` only.
        start: the text's first sentence, as in RULER, or a sentence drawn anew for each sample, which makes the
            samples less alike.
        key: ``word`` (adjective-noun) or ``uuid``.
        value: ``number`` (7 digits) or ``uuid``.
        keys: keys hidden. One question asks for ``queries`` of them.
        values: values of each key, each in a needle of its own; all are asked for.
        queries: keys asked for, at most ``keys``.
    """

    version: ClassVar[int] = 1

    haystack: Literal["noise", "text", "needles"]
    source: str = HELD_OUT
    start: Literal["beginning", "random"] = "beginning"
    key: Literal["word", "uuid"] = "word"
    value: Literal["number", "uuid"] = "number"
    keys: PositiveInt = 1
    values: PositiveInt = 1
    queries: PositiveInt = Field(default=1)

    @model_validator(mode="after")
    def _needles_fit(self) -> Self:
        if self.queries > self.keys:
            raise ValueError(f"queries ({self.queries}) can't be more than keys ({self.keys})")
        if self.haystack == "text" and self.keys * self.values > len(DEPTHS):
            raise ValueError(f"keys x values ({self.keys * self.values}) can't be more than {len(DEPTHS)} in a text")
        return self

    def haystack_used(self) -> Haystack | None:
        return get_haystack(self.source) if self.haystack == "text" else None

    def minimum_size(self) -> int:
        return self.keys * self.values

    def draw(self, rng: random.Random, size: int, cell: Cell) -> Draft:
        """``size`` counts the haystack's lines, sentences or distracting needles."""
        draw_key = (lambda: word_key(rng)) if self.key == "word" else (lambda: uuid4(rng))
        draw_value = (lambda: seven_digits(rng)) if self.value == "number" else (lambda: uuid4(rng))
        plural = "numbers" if self.value == "number" else "uuids"

        keys = distinct(draw_key, self.keys)
        values = distinct(draw_value, self.keys * self.values)
        answers = {key: values[index * self.values : (index + 1) * self.values] for index, key in enumerate(keys)}
        queried = rng.sample(keys, self.queries)
        needles = [(NEEDLE.format(type=plural, key=key, value=value), value) for key in keys for value in answers[key]]
        rng.shuffle(needles)
        needle_lines = [line for line, _ in needles]

        if self.haystack == "text":
            lines = get_haystack(self.source).sentences_from(rng if self.start == "random" else None, size)
            positions = [len(lines) * place_percent // 100 for place_percent in rng.sample(DEPTHS, len(needles))]
            context = " ".join(place(lines, needle_lines, positions))
        else:
            lines = [PASSKEY_NOISE] * size
            if self.haystack == "needles":
                other_keys = distinct(draw_key, size, taken=frozenset(keys))
                other_values = distinct(draw_value, size, taken=frozenset(values))
                lines = [
                    NEEDLE.format(type=plural, key=other_key, value=other_value)
                    for other_key, other_value in zip(other_keys, other_values, strict=True)
                ]
            context = "\n".join(place(lines, needle_lines, rng.sample(range(size), len(needles))))

        outputs = tuple(value for key in queried for value in answers[key])
        single = len(outputs) == 1
        question_type = plural[:-1] if single else plural
        query = join_query(queried)
        intro = NIAH_INTRO.format(type=plural)
        prefix = NIAH_ANSWER_ONE if single else NIAH_ANSWER_MANY
        line_of_value = {value: line for line, value in needles}
        starts = tuple(
            len(intro) + context.index(line_of_value[value]) + line_of_value[value].rindex(value) for value in outputs
        )
        return Draft(
            input=intro + context + NIAH_QUESTION.format(type=question_type, query=query),
            answer_prefix=prefix.format(type=question_type, query=query),
            outputs=outputs,
            answer_starts=starts,
            depth=100 * (starts[0] - len(intro)) / len(context),
        )
