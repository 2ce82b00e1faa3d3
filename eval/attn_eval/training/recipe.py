"""A recipe of LoFiT: the YAML file that says which model, which data, how heads are selected and how they are tuned."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from attn_eval.recipe import PublishedFigure
from attn_eval.training import kinship, truthfulqa, two_hop
from attn_eval.training.examples import (
    Completion,
    DataSplits,
    Preference,
    completions_of,
    drawn,
    preferences_of,
    read_rows_of,
)

SEED_OF_PUBLISHED_FOLDS = 42


class TrainingData(BaseModel):
    """Where examples come from.

    Attributes:
        version: rises when a generator, a reader or a prompt changes what the model sees.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    version: ClassVar[int] = 1
    set: str

    @abstractmethod
    def splits(self, seed: int) -> DataSplits:
        """The examples.

        Raises:
            EvaluationError: a file can't be read, is empty, or lacks a column.
        """


class KinshipData(TrainingData):
    """Generated kinship in two hops (`kinship.generate_kinship`): so many stories of each split."""

    set: Literal["kinship"]
    train: PositiveInt = 300
    validation: NonNegativeInt = 450
    test: PositiveInt = 450
    prompt: str = kinship.PROMPT

    def splits(self, seed: int) -> DataSplits:
        train, validation, test = (
            kinship.kinship_examples(kinship.generate_kinship(count, split, seed), "generated", self.prompt)
            if count
            else []
            for split, count in (("train", self.train), ("validation", self.validation), ("test", self.test))
        )
        source = f"generated kinship {kinship.GENERATOR_VERSION}, seed {seed}"
        return DataSplits(train, validation, test, source, kinship.STOP)


class ClutrrData(TrainingData):
    """CLUTRR's 2-hop stories as LoFiT published them: ``train.json``, ``val.json`` and ``test.json`` in ``folder``.

    Attributes:
        train: how many of the training stories are drawn with the seed; None: all 3151 in their order.
    """

    set: Literal["clutrr"]
    folder: str
    train: PositiveInt | None = 300
    prompt: str = kinship.PROMPT

    def splits(self, seed: int) -> DataSplits:
        train, validation, test = (
            kinship.kinship_examples(read_rows_of(path), path, self.prompt) for path in _files(self.folder, "json")
        )
        return DataSplits(drawn(train, self.train, seed), validation, test, self.folder, kinship.STOP)


class TwoHopData(TrainingData):
    """Generated two-hop questions (`two_hop.generate_two_hop`), the facts in the prompt."""

    set: Literal["two_hop"]
    train: PositiveInt = 134
    validation: NonNegativeInt = 95
    test: PositiveInt = 450
    distractors: NonNegativeInt = 2
    prompt: str = two_hop.CONTEXT_PROMPT

    def splits(self, seed: int) -> DataSplits:
        def made(split: str, count: int) -> list[Completion]:
            records = two_hop.generate_two_hop(count, split, seed, self.distractors)
            return two_hop.two_hop_examples(records, "generated", self.prompt) if count else []

        train, validation = made("train", self.train), made("validation", self.validation)
        source = f"generated two-hop {two_hop.GENERATOR_VERSION}, seed {seed}"
        return DataSplits(train, validation, made("test", self.test), source, two_hop.STOP)


class MquakeData(TrainingData):
    """MQuAKE as LoFiT published it: ``train.jsonl``, ``val.jsonl`` and ``test.jsonl`` in ``folder``.

    Attributes:
        train: how many training questions are drawn with the seed; None: all 134 in their order, as published.
    """

    set: Literal["mquake"]
    folder: str
    train: PositiveInt | None = None
    prompt: str = two_hop.PROMPT

    def splits(self, seed: int) -> DataSplits:
        train, validation, test = (
            two_hop.two_hop_examples(read_rows_of(path), path, self.prompt) for path in _files(self.folder, "jsonl")
        )
        return DataSplits(drawn(train, self.train, seed), validation, test, self.folder, two_hop.STOP)


class TruthfulqaData(TrainingData):
    """One fold of TruthfulQA; trained on pairs by DPO, measured by MC1 and MC2.

    Attributes:
        fold: 0 or 1.
        source: TruthfulQA.csv, or a data set of its columns (the hub's by default) with ``config`` and ``split``.
        folder: in place of it LoFiT's files of folds.
        split_seed: of training and validation questions.
        instruction: the sentence before the primer when choices are scored, as in ITI's code.
    """

    set: Literal["truthfulqa"]
    fold: Literal[0, 1] = 0
    source: str | None = None
    config: str | None = "multiple_choice"
    split: str = "validation"
    folder: str | None = None
    split_seed: int = SEED_OF_PUBLISHED_FOLDS
    instruction: bool = True

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if self.source is not None and self.folder is not None:
            raise ValueError("data: give a source or a folder of folds, not both")
        return self

    def splits(self, seed: int) -> DataSplits:
        if self.folder is not None:
            return truthfulqa.read_fold(Path(self.folder).expanduser(), self.fold, self.split_seed)
        source = self.source or "truthfulqa/truthful_qa"
        questions = truthfulqa.read_questions(source, self.split, self.config)
        return truthfulqa.truthfulqa_splits(questions, self.fold, self.split_seed, f"{source}, fold {self.fold}")


class OwnData(TrainingData):
    """Files of one's own, or data sets of the hub as ``NAME:SPLIT``.

    Attributes:
        train, validation, test: files; without a validation file nothing is measured while training.
        size: how many training examples are drawn with the seed; None: all in their order.
    """

    train: str
    validation: str | None = None
    test: str
    size: PositiveInt | None = None

    def _rows(self, source: str) -> list[dict[str, Any]]:
        name, separator, split = source.rpartition(":")
        if not separator or Path(source).expanduser().exists():
            return read_rows_of(source)
        return read_rows_of(name, split)


class CompletionData(OwnData):
    """Prompts with completions, measured by exact match without case and outer spaces.

    Attributes:
        columns: what stands for ``prompt`` and ``completion``; ``answers`` names a list of all right answers.
        stop: where an answer ends.
    """

    set: Literal["completion"]
    columns: dict[Literal["prompt", "completion", "answers"], str] = Field(default_factory=dict)
    stop: str = "\n"

    def splits(self, seed: int) -> DataSplits:
        names = {str(key): column for key, column in self.columns.items()}
        parts: list[list[Completion]] = [
            completions_of(self._rows(source), source, names) if source else []
            for source in (self.train, self.validation, self.test)
        ]
        return DataSplits(drawn(parts[0], self.size, seed), parts[1], parts[2], self.train, self.stop)


class PreferenceData(OwnData):
    """Prompts with a chosen and a rejected continuation, trained by DPO; measured by how often the chosen is likelier.

    Attributes:
        columns: what stands for ``prompt``, ``chosen`` and ``rejected``.
    """

    set: Literal["preference"]
    columns: dict[Literal["prompt", "chosen", "rejected"], str] = Field(default_factory=dict)

    def splits(self, seed: int) -> DataSplits:
        names = {str(key): column for key, column in self.columns.items()}
        parts: list[list[Preference]] = [
            preferences_of(self._rows(source), source, names) if source else []
            for source in (self.train, self.validation, self.test)
        ]
        return DataSplits(drawn(parts[0], self.size, seed), parts[1], parts[2], self.train)


AnyData = Annotated[
    KinshipData | ClutrrData | TwoHopData | MquakeData | TruthfulqaData | CompletionData | PreferenceData,
    Field(discriminator="set"),
]


class Stage(BaseModel):
    """How vectors are trained; the rest is the paper's: AdamW without weight decay, linear decay, gradients clipped to 1.

    Attributes:
        learning_rate: at the first step.
        epochs: passes over the training examples.
        batch_size: examples a step, over ``accumulation`` batches.
        accumulation: batches a step.
        early_stopping: epochs without a better validation loss after which training ends, the best epoch kept. None,
            as in the paper: the last epoch counts.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    learning_rate: PositiveFloat
    epochs: PositiveInt = 5
    batch_size: PositiveInt = 8
    accumulation: PositiveInt = 1
    early_stopping: PositiveInt | None = None

    @model_validator(mode="after")
    def _accumulation_divides_the_batch(self) -> Self:
        if self.batch_size % self.accumulation:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of accumulation {self.accumulation}")
        return self


class Selection(Stage):
    """Stage 1: which heads.

    Attributes:
        method: ``scale`` trains A of all heads under an L1 penalty and ranks by its norm, the paper's; ``offset`` does
            it with v; ``probes`` ranks by how well ITI's probes tell right answers from wrong ones, ``random`` draws a
            ranking with the seed; these two train nothing.
        l1: lambda, the weight of the penalty.
    """

    method: Literal["scale", "offset", "probes", "random"] = "scale"
    l1: NonNegativeFloat = 5e-4


class LofitRecipe(BaseModel):
    """A whole fine-tuning.

    Attributes:
        name: of the results; letters, digits, ``-``, ``_``, ``.`` and ``/``.
        description: what it shows.
        model: a folder, a model id of the Hugging Face hub, or ``testbed-lm`` (shipped).
        dtype: of the base weights; the trained vectors are float32.
        device: ``auto`` takes a GPU if there is one.
        data: ``{set: NAME, ...}``.
        selection: stage 1.
        tuning: stage 2.
        num_heads: how many of the ranking are tuned; None: 3 % of all.
        heads: in place of the ranking of ``select``: pairs ``[layer, head]``, or a file with a ranking: the heads.json of
            another run, or a top_heads .npy file of the paper's code. ``num_heads`` of a file are taken.
        dpo_beta: beta of DPO, for data with preferences.
        new_tokens: how many tokens an answer may have.
        eval_batch_size: examples at a time when no gradient is needed.
        gradient_checkpointing: recompute activations in the backward pass.
        seed: of the drawn data, the start values, the order of the examples and the bootstrap.
        published: figures of papers, or ``none``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*$")]
    description: str = ""
    model: Annotated[str, Field(min_length=1)]
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    data: AnyData
    selection: Selection
    tuning: Stage
    num_heads: PositiveInt | None = None
    heads: Annotated[tuple[tuple[NonNegativeInt, NonNegativeInt], ...], Field(min_length=1)] | str | None = None
    dpo_beta: PositiveFloat = 0.5
    new_tokens: PositiveInt = 16
    eval_batch_size: PositiveInt = 32
    gradient_checkpointing: bool = False
    seed: int = 42
    published: Literal["none"] | tuple[PublishedFigure, ...] = "none"

    def fingerprint_of_selection(self) -> str:
        """The sha256 of everything that can change the ranking."""
        return self._sha256_without("tuning", "num_heads", "heads", "new_tokens")

    def fingerprint(self) -> str:
        """The sha256 of everything that can change a result."""
        return self._sha256_without()

    def _sha256_without(self, *keys: str) -> str:
        relevant = self.model_dump(mode="json", exclude={"name", "description", "published", *keys})
        relevant["data_version"] = self.data.version
        return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()


def _files(folder: str, ending: str) -> Sequence[str]:
    return [str(Path(folder).expanduser() / f"{split}.{ending}") for split in ("train", "val", "test")]
