"""What every task is: validated parameters and its samples; and tasks of a given length, whose answers are scored."""

from __future__ import annotations

import random
from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from attn_eval.haystack import Haystack
from attn_eval.prompting import PromptEncoder, largest_fitting
from attn_eval.rows import Row
from attn_eval.scoring import string_match_all

Lengths = Annotated[tuple[PositiveInt, ...], Field(min_length=1)]


class TaskSettings(BaseModel):
    """The parameters that all tasks share.

    Attributes:
        task: the registry's name, e.g. ``niah_single_1``.
        label: how the task is called in results; the registry's name unless given. Two uses of a task in one
            recipe need two labels.
        samples: how many; of what is the task's to say. None: all that there are.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: ClassVar[int]
    task: str
    label: str = Field(default="", pattern=r"^[A-Za-z0-9_.-]*$")
    samples: PositiveInt | None = None

    @property
    def name(self) -> str:
        """The label, or the registry's name where none was given."""
        return self.label or self.task

    @abstractmethod
    def items(self, encoder: PromptEncoder, seed: int) -> list[Any]:
        """All samples: rows, windows of text or questions about images."""

    def limited(self, limit: int) -> Self:
        """The task with at most ``limit`` samples; sample i stays the same."""
        return self.model_copy(update={"samples": min(self.samples or limit, limit)})

    def haystack_used(self) -> Haystack | None:
        """The text that the task reads, or None where it makes up its own."""
        return None


class LengthTask(TaskSettings):
    """A task that is asked at lengths of one's choice.

    Attributes:
        lengths: tokens, each one the whole sequence: prompt, answer prefix and new tokens.
        samples: questions at each length (and, for a grid, at each depth).
    """

    lengths: Lengths
    samples: PositiveInt = 20

    @abstractmethod
    def items_of(self, encoder: PromptEncoder, length: int, seed: int) -> list[Any]:
        """All rows (or windows of text) of one length."""

    def items(self, encoder: PromptEncoder, seed: int) -> list[Any]:
        return [item for length in self.lengths for item in self.items_of(encoder, length, seed)]


@dataclass(frozen=True)
class Cell:
    """Where in the grid a question stands: its length in tokens, its depth in percent, and who counts the tokens."""

    encoder: PromptEncoder
    length: int
    depth: float | None = None


@dataclass(frozen=True)
class Draft:
    """A question at one size, before its tokens are counted.

    Attributes:
        input: the prompt without the answer prefix.
        answer_prefix: what the answer begins with.
        outputs: the reference answers.
        answer_starts: character indices in ``input`` at which the answers stand.
        depth: place of the first answer, percent of the context.
    """

    input: str
    answer_prefix: str
    outputs: tuple[str, ...]
    answer_starts: tuple[int, ...] = ()
    depth: float | None = None


class GenerationTask(LengthTask):
    """A task whose answer the model writes.

    A subclass draws one question at a given size; this class finds the size that fills the length. Every sample has
    a random generator of its own, seeded by (seed, task, length, cell, index), so sample i is the same whatever
    number of samples, lengths or processes is asked for.

    Attributes:
        new_tokens: how many tokens the model may write; part of the length.
    """

    new_tokens: PositiveInt = 128

    smallest_size: ClassVar[int] = 1

    @abstractmethod
    def draw(self, rng: random.Random, size: int, cell: Cell) -> Draft:
        """One question of ``size`` units (lines, sentences, words...); the same for the same generator state."""

    def largest_size(self) -> int | None:
        """The size at which the task's material ends, or None if it has no end."""
        return None

    def minimum_size(self) -> int:
        """The smallest size that still holds the question."""
        return self.smallest_size

    def depths_used(self) -> tuple[float | None, ...]:
        """The cells of a grid over the depth; a single None for a task that draws its own places."""
        return (None,)

    def items_of(self, encoder: PromptEncoder, length: int, seed: int) -> list[Any]:
        return self.generate(encoder.tokenizer, length, self.samples, seed, chat_template=encoder.chat_template)

    def generate(
        self, tokenizer: Any, length: int, samples: int, seed: int, *, chat_template: bool = False
    ) -> list[Row]:
        """``samples`` questions (at every depth, for a grid) that fill ``length`` tokens of this tokenizer.

        Raises:
            LengthError: the length can't hold the task; the message names the shortest that can.
        """
        encoder = PromptEncoder(tokenizer, chat_template)
        return [
            self._row(Cell(encoder, length, depth), index, seed)
            for depth in self.depths_used()
            for index in range(samples)
        ]

    def score(self, row: Row, prediction: str) -> float:
        """0.0 to 1.0: the share of the reference answers that the prediction holds (RULER's string_match_all)."""
        return string_match_all(prediction, row.outputs)

    def _row(self, cell: Cell, index: int, seed: int) -> Row:
        encoder = cell.encoder
        place_name = "" if cell.depth is None else f"-{cell.depth:g}"

        def draft_at(size: int) -> Draft:
            rng = random.Random(f"{seed}/{self.task}/{cell.length}{place_name}/{index}")
            return self.draw(rng, size, cell)

        def tokens_at(size: int) -> int:
            draft = draft_at(size)
            return encoder.count(draft.input, draft.answer_prefix)

        size = largest_fitting(
            tokens_at,
            budget=cell.length - self.new_tokens,
            smallest=self.minimum_size(),
            largest=self.largest_size(),
            new_tokens=self.new_tokens,
            what=self.name,
        )
        draft = draft_at(size)
        return Row(
            id=f"{self.name}-{cell.length}{place_name}-{index}",
            task=self.task,
            length_target=cell.length,
            length_actual=encoder.count(draft.input, draft.answer_prefix) + self.new_tokens,
            depth=draft.depth,
            answer_positions=encoder.token_positions(draft.input, draft.answer_prefix, draft.answer_starts),
            input=draft.input,
            answer_prefix=draft.answer_prefix,
            outputs=draft.outputs,
            new_tokens=self.new_tokens,
        )


def place(lines: list[str], inserts: list[str], positions: list[int]) -> list[str]:
    """``lines`` with ``inserts[i]`` put before line ``positions[i]``; positions count in the original lines."""
    placed = list(lines)
    for position, insert in sorted(zip(positions, inserts, strict=True), key=lambda pair: pair[0], reverse=True):
        placed.insert(position, insert)
    return placed
