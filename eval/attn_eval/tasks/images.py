"""Questions about images: read from the published files or a data set of the hub, asked once, scored apart."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import random
import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import PositiveInt, field_validator, model_validator

from attn_eval.errors import EvaluationError
from attn_eval.prompting import PromptEncoder
from attn_eval.tasks.base import TaskSettings
from attn_eval.yes_no import NO, YES, read_answer, readings

Totals = Mapping[str, Mapping[str, np.ndarray]]
Figures = dict[tuple[str, str], np.ndarray]
Reader = Literal["pope", "negation", "substring", "exact", "cased", "mme", "first_word"]
ALL_PARTS = "all"


@dataclass(frozen=True)
class Picture:
    """The image of a question, so that two runs on one data hash saw the same pixels."""

    sha256: str
    width: int
    height: int


@dataclass(frozen=True)
class Question:
    """One question about one image.

    Attributes:
        id: unique in a run: ``label-number``, or ``label-part-number``.
        task: the registry's name of the task.
        question: the published text.
        prompt: what the model is asked: the question with the suffix of the protocol.
        image: its file's name in the folder of images, or ``#row`` of the data set.
        truth: the gold answer, or the objects that are there.
        places: the parts that it counts in and its id in each, as published.
        new_tokens: how many tokens the model may write.
        traps: objects that a model is tempted to name (AMBER).
        picture: None as long as nobody has looked at the image.
    """

    id: str
    task: str
    question: str
    prompt: str
    image: str
    truth: tuple[str, ...]
    places: tuple[tuple[str, str], ...]
    new_tokens: int
    traps: tuple[str, ...] = ()
    picture: Picture | None = None

    @property
    def parts(self) -> list[str]:
        """The parts that it counts in; one that it stands in twice comes twice."""
        return [part for part, _ in self.places]

    def to_json(self) -> str:
        """One line of JSON with sorted keys: the form that is hashed."""
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(frozen=True)
class Reply:
    """What a model wrote to a question.

    Attributes:
        text: the answer.
        capped: whether it was cut at the token limit; None where only the text is known.
        first_token: log-probability of yes and of no as the first token; None where that is not known.
    """

    text: str
    capped: bool | None = None
    first_token: tuple[float, float] | None = None


@dataclass(frozen=True)
class Judgement:
    """How an answer counts.

    Attributes:
        score: 1.0 right (or without a hallucinated object), else 0.0.
        counts: what is added up over answers; every figure is a function of such sums.
        read: what was read in the answer, for the log.
    """

    score: float
    counts: dict[str, float]
    read: dict[str, Any] = field(default_factory=dict)


class ImageTask(TaskSettings):
    """A benchmark of questions about images.

    Attributes:
        samples: images, drawn by the seed; all questions about them are asked. None: every image.
        questions: the published question file or files.
        images: the folder of the images; needed to run, not to score.
        dataset: in place of the files a data set of the hub, or a folder that ``datasets.load_dataset`` reads.
        dataset_config, dataset_split: which part of it.
        suffix: put behind every question.
        new_tokens: how many tokens the model may write.
    """

    questions: tuple[str, ...] = ()
    images: str | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    dataset_split: str = "test"
    suffix: str = ""
    new_tokens: PositiveInt = 128

    plain_figures: ClassVar[frozenset[str]] = frozenset()
    """Figures that are no share of something, e.g. a number of words."""
    flip_figures: ClassVar[frozenset[str]] = frozenset()
    """Figures that are the mean of the answers' scores, so that answers lost and won explain them."""
    reads_datasets: ClassVar[bool] = True
    wants_first_token: ClassVar[bool] = False

    @field_validator("questions", mode="before")
    @classmethod
    def _one_file_is_a_list_of_one(cls, files: Any) -> Any:
        return [files] if isinstance(files, str) else files

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.dataset is None and (self.dataset_config is not None or self.dataset_split != "test"):
            raise ValueError("dataset_config and dataset_split say which part of a 'dataset', and none is given")
        if self.dataset is not None and not self.reads_datasets:
            raise ValueError(f"{self.task} reads its published files only: give 'questions', not 'dataset'")
        if self.dataset is not None and (self.questions or self.images):
            raise ValueError("give a 'dataset' or files ('questions', 'images'), not both")
        return self

    @abstractmethod
    def asked(self, seed: int) -> list[Question]:
        """Every question, none of them looked at.

        Raises:
            EvaluationError: a file is missing or is not what was published.
        """

    @abstractmethod
    def judge(self, question: Question, reply: Reply) -> Judgement:
        """How an answer counts."""

    @abstractmethod
    def figures(self, totals: Totals) -> Figures:
        """The benchmark's figures from sums of counts.

        Args:
            totals: part -> count -> sums, any number of them side by side (one a resample).

        Returns:
            (part, figure) -> values, nan where a figure is not defined. Shares as 0.0 to 1.0.
        """

    @abstractmethod
    def answered(self, files: Sequence[Path]) -> list[tuple[Question, Reply]]:
        """Questions and the answers that files in the published format hold.

        Raises:
            EvaluationError: the answers don't fit the questions.
        """

    @abstractmethod
    def answer_files(self, answers: Sequence[tuple[Question, str]]) -> dict[str, str]:
        """File name -> content: the answers in the format that the benchmark's own script reads."""

    def image_counts(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Further counts of an image in a part, from the sums over its questions there."""
        return {}

    def stratum(self, question: Question) -> str:
        """Images are resampled within a stratum, for figures that weigh parts alike."""
        return ""

    def notes(self, questions: Sequence[Question]) -> list[str]:
        """What a reader of the results must know of the data."""
        return []

    def items(self, encoder: PromptEncoder, seed: int) -> list[Any]:
        questions = self.asked(seed)
        pictures = {question.image: question for question in questions}
        looked_at = {image: self._look_at(question) for image, question in pictures.items()}
        return [replace(question, picture=looked_at[question.image]) for question in questions]

    def image_bytes(self, question: Question) -> bytes:
        """The image file of a question.

        Raises:
            EvaluationError: there is none.
        """
        if self.dataset is not None:
            image = self.rows()[int(question.image.removeprefix("#"))]["image"]
            return bytes(image["bytes"]) if image["bytes"] is not None else Path(image["path"]).read_bytes()
        if self.images is None:
            raise EvaluationError(f"{self.name}: to ask a model it needs 'images', the folder that holds them")
        path = Path(self.images).expanduser() / question.image
        try:
            return path.read_bytes()
        except OSError as error:
            raise EvaluationError(
                f"{self.name}: no image {question.image!r} in the folder {self.images} ({error.strerror})"
            ) from error

    def rows(self) -> Any:
        """The rows of the data set, images undecoded."""
        assert self.dataset is not None
        return read_dataset(self.dataset, self.dataset_config, self.dataset_split)

    def column(self, *names: str) -> str:
        """The first of these columns that the data set has.

        Raises:
            EvaluationError: it has none of them.
        """
        found = [name for name in names if name in self.rows().column_names]
        if not found:
            raise EvaluationError(
                f"{self.name}: the data set {self.dataset} has no column {' or '.join(names)}; it has "
                f"{', '.join(self.rows().column_names)}"
            )
        return found[0]

    def text_rows(self) -> Iterator[dict[str, Any]]:
        """The rows without their images."""
        return iter(self.rows().remove_columns([self.column("image")]))

    def sampled(self, images: Sequence[str], seed: int) -> list[str]:
        """``samples`` of the images (all, if None), drawn from the seed, in their order; fewer are the first drawn."""
        if self.samples is None or self.samples >= len(images):
            return list(images)
        drawn = sorted(images)
        random.Random(f"{seed}/{self.task}").shuffle(drawn)
        chosen = set(drawn[: self.samples])
        return [image for image in images if image in chosen]

    def _look_at(self, question: Question) -> Picture:
        content = self.image_bytes(question)
        return _picture(content, f"{self.name}: {question.image}")


class YesNoTask(ImageTask):
    """Questions whose answer is yes or no.

    Attributes:
        reader: how yes and no are read in an answer, see `attn_eval.yes_no`. Whatever other readers make of it is
            logged.
        mode: ``generate`` reads the text that the model writes and notes beside it which of yes and no was likelier as
            the first token; ``first_token`` takes that as the answer and writes one token.
    """

    suffix: str = "\nAnswer the question using a single word or phrase."
    reader: Reader = "pope"
    mode: Literal["generate", "first_token"] = "generate"

    wants_first_token: ClassVar[bool] = True
    flip_figures: ClassVar[frozenset[str]] = frozenset({"accuracy"})

    def said(self, question: Question, reply: Reply) -> str | None:
        """``yes``, ``no`` or neither."""
        if self.mode == "generate":
            return read_answer(self.reader, reply.text, question.truth[0])
        if reply.first_token is None:
            raise EvaluationError(f"{self.name}: mode first_token needs the model, not a file of answers")
        return first_answer(reply.first_token)

    def tokens_to_write(self) -> int:
        """One where the first token is the answer."""
        return 1 if self.mode == "first_token" else self.new_tokens

    def readings_of(self, question: Question, reply: Reply) -> dict[str, str | None]:
        """What every reader makes of the answer, the first token among them."""
        read = readings(self.reader, reply.text, question.truth[0])
        if reply.first_token is not None:
            read["first_token"] = first_answer(reply.first_token)
        return read

    def judge_yes_no(self, question: Question, reply: Reply) -> tuple[str | None, Judgement]:
        """The answer and its counts: right, asked, answers of each kind, and whether the first token says the same."""
        said, gold = self.said(question, reply), question.truth[0]
        counts = {
            "asked": 1.0,
            "right": float(said == gold),
            "said_yes": float(said == YES),
            "said_no": float(said == NO),
            "gold_yes": float(gold == YES),
            "gold_no": float(gold == NO),
            "true_yes": float(said == gold == YES),
            "true_no": float(said == gold == NO),
        }
        read = self.readings_of(question, reply)
        if self.mode == "generate" and "first_token" in read:
            counts |= {"first_known": 1.0, "first_agrees": float(read["first_token"] == said)}
        disagree = len(set(read.values())) > 1
        return said, Judgement(counts["right"], counts, {"said": said, "readings": read if disagree else {}})


def first_answer(log_probabilities: Sequence[float]) -> str:
    """The likelier of yes and no."""
    return YES if log_probabilities[0] > log_probabilities[1] else NO


def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """``part / whole``, nan where the whole is 0."""
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=np.asarray(whole) > 0)


def gold_answer(value: Any, where: str) -> str:
    """A label as ``yes`` or ``no``.

    Raises:
        EvaluationError: it is neither.
    """
    label = str(value).strip().lower()
    if label not in (YES, NO):
        raise EvaluationError(f"{where}: the gold answer {value!r} is neither yes nor no")
    return label


def read_json(path: str | Path, what: str) -> Any:
    """A JSON file.

    Raises:
        EvaluationError: it is missing, or no JSON.
    """
    try:
        return json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{what} {path} can't be read: {error}") from error


def read_records(path: str | Path, what: str, keys: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The objects of a file that holds one a line, or a JSON list of them.

    Raises:
        EvaluationError: it can't be read, or an object lacks one of ``keys``; the message names its number.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
        whole = text.lstrip().startswith("[")
        records = json.loads(text) if whole else [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{what} {path} can't be read as JSON lines: {error}") from error
    for number, record in enumerate(records, start=1):
        lacking = [key for key in keys if not isinstance(record, dict) or key not in record]
        if lacking:
            raise EvaluationError(f"{what} {path}, entry {number}, has no {' and no '.join(map(repr, lacking))}")
    return list(records)


def need(value: Any, task: ImageTask, key: str, what: str) -> Any:
    """The value of a task's key, or a line that says that it is needed."""
    if not value:
        raise EvaluationError(f"{task.name}: it needs '{key}', {what}")
    return value


def to_lines(records: Sequence[Mapping[str, Any]]) -> str:
    """JSON lines."""
    return "".join(json.dumps(record) + "\n" for record in records)


def to_list(records: Sequence[Mapping[str, Any]]) -> str:
    """A JSON list, for scripts that read one."""
    return json.dumps(list(records), indent=1) + "\n"


def number_in(name: str) -> int:
    """The image id in a file name such as ``COCO_val2014_000000310196.jpg``.

    Raises:
        EvaluationError: there is no number in it.
    """
    found = re.search(r"(\d+)(?:\.\w+)?$", name)
    if found is None:
        raise EvaluationError(
            f"no image id in {name!r}: it should end in a number, as COCO_val2014_000000310196.jpg does"
        )
    return int(found[1])


def decode(content: bytes, where: str) -> Any:
    """The image as RGB.

    Raises:
        EvaluationError: no image, or Pillow is not installed.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise EvaluationError("reading an image needs Pillow: pip install 'attn-hooks[eval]'") from error
    try:
        with Image.open(io.BytesIO(content)) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise EvaluationError(f"{where} is no image that can be read: {error}") from error


def _picture(content: bytes, where: str) -> Picture:
    image = decode(content, where)
    return Picture(hashlib.sha256(content).hexdigest(), image.width, image.height)


@functools.lru_cache(maxsize=8)
def read_dataset(name: str, config: str | None, split: str) -> Any:
    """One split of a data set of the hub, or of a folder; images stay encoded.

    Raises:
        EvaluationError: it can't be loaded.
    """
    import datasets

    try:
        rows = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError) as error:
        raise EvaluationError(
            f"the data set {name} ({config or 'default'}, {split}) can't be loaded: {' '.join(str(error).split())[:300]}"
        ) from error
    return rows.cast_column("image", datasets.Image(decode=False)) if "image" in rows.column_names else rows
