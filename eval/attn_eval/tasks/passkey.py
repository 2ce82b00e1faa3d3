"""Passkey retrieval (Landmark Attention, arXiv 2305.16300; LongLoRA and YaRN use the same text)."""

from __future__ import annotations

import random
from typing import ClassVar

from pydantic import PositiveInt

from attn_eval.rows import Row
from attn_eval.scoring import first_integer_match
from attn_eval.tasks.base import Cell, Draft, GenerationTask
from attn_eval.templates import PASSKEY_ANSWER, PASSKEY_INTRO, PASSKEY_LINE, PASSKEY_NOISE, PASSKEY_QUESTION

CHARACTERS_PER_STEP = 32


class PasskeyTask(GenerationTask):
    """A number from 1 to 50000 on a line of its own, at an even random place in repeated noise sentences.

    As in Landmark's: n characters of noise, the first part of random length, the noise begun anew behind the key.
    Scored by the first whole number in the answer.
    """

    version: ClassVar[int] = 1
    smallest_size: ClassVar[int] = 0

    new_tokens: PositiveInt = 10

    def draw(self, rng: random.Random, size: int, cell: Cell) -> Draft:
        """``size`` counts steps of 32 characters of noise."""
        characters = size * CHARACTERS_PER_STEP
        value = str(rng.randint(1, 50_000))
        share_before = rng.random()
        before = round(share_before * characters)
        noise = (PASSKEY_NOISE + " ") * (characters // len(PASSKEY_NOISE) + 1)
        line = PASSKEY_LINE.format(value=value)
        context = f"{noise[:before]}\n{line}\n{noise[: characters - before]}"
        return Draft(
            input=PASSKEY_INTRO + context + PASSKEY_QUESTION,
            answer_prefix=PASSKEY_ANSWER,
            outputs=(value,),
            answer_starts=(len(PASSKEY_INTRO) + before + 1 + line.index(value),),
            depth=100 * share_before,
        )

    def score(self, row: Row, prediction: str) -> float:
        """1.0 if the first whole number in the prediction is the key, else 0.0."""
        return first_integer_match(prediction, row.outputs[0])
