"""Key-value retrieval (Lost in the Middle, arXiv 2307.03172; InfiniteBench's KV, arXiv 2402.13718)."""

from __future__ import annotations

import random
from typing import ClassVar, Literal

from pydantic import PositiveInt

from attn_eval.tasks.base import Cell, Draft, GenerationTask
from attn_eval.templates import KEY_VALUE_ANSWER, KEY_VALUE_INTRO, KEY_VALUE_LINE, KEY_VALUE_QUESTION
from attn_eval.words import distinct, seven_digits, uuid4, word_key


class KeyValueTask(GenerationTask):
    """A table ``key: value`` with as many lines as fit, and a question for the value of one key.

    Attributes:
        key: ``uuid``, as in the papers, or ``word`` (adjective-noun).
        value: ``uuid``, as in the papers, or ``number`` (7 digits).
    """

    version: ClassVar[int] = 1

    new_tokens: PositiveInt = 50
    key: Literal["word", "uuid"] = "uuid"
    value: Literal["number", "uuid"] = "uuid"

    def draw(self, rng: random.Random, size: int, cell: Cell) -> Draft:
        """``size`` counts the lines of the table."""
        keys = distinct((lambda: word_key(rng)) if self.key == "word" else (lambda: uuid4(rng)), size)
        values = distinct((lambda: seven_digits(rng)) if self.value == "number" else (lambda: uuid4(rng)), size)
        lines = [KEY_VALUE_LINE.format(key=key, value=value) for key, value in zip(keys, values, strict=True)]
        asked = rng.randrange(size)
        context = "\n".join(lines)
        start = sum(len(line) + 1 for line in lines[:asked]) + lines[asked].rindex(values[asked])
        return Draft(
            input=KEY_VALUE_INTRO + context + KEY_VALUE_QUESTION.format(key=keys[asked]),
            answer_prefix=KEY_VALUE_ANSWER.format(key=keys[asked]),
            outputs=(values[asked],),
            answer_starts=(len(KEY_VALUE_INTRO) + start,),
            depth=100 * start / len(context),
        )
