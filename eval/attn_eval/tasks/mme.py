"""MME (arXiv 2306.13394): two questions an image, one with the answer yes and one with no.

By default the four categories that papers call its hallucination subset.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
from pydantic import PositiveInt

from attn_eval.errors import EvaluationError
from attn_eval.tasks.images import (
    ALL_PARTS,
    Figures,
    Judgement,
    Question,
    Reader,
    Reply,
    Totals,
    YesNoTask,
    gold_answer,
    share,
)

PUBLISHED_SUFFIX = " Please answer yes or no."
LINES_AN_IMAGE = 2
HALLUCINATION = ("existence", "count", "position", "color")


class Entry(NamedTuple):
    """A published question; ``name`` is its image's in files of answers."""

    category: str
    image: str
    name: str
    question: str
    gold: str


class MmeTask(YesNoTask):
    """Accuracy, accuracy+ (images with both answers right) and the score of each category, which is the sum of both in
    percent, at most 200; ``all`` has the sum of the scores.

    Attributes:
        images: the published folder, with a folder for each category that holds images and, for each, a text of the
            same name (or images and texts in ``images`` and ``questions_answers_YN``).
        dataset: ``lmms-lab/MME``, or any with question, answer, category, question_id and image.
        categories: which of them.
        suffix: put in the place of the published `` Please answer yes or no.``; None leaves that there.
    """

    version: ClassVar[int] = 1
    plain_figures: ClassVar[frozenset[str]] = frozenset({"mme_score"})

    reader: Reader = "mme"
    categories: tuple[str, ...] = HALLUCINATION
    suffix: str | None = None  # type: ignore[assignment]
    new_tokens: PositiveInt = 16

    def asked(self, seed: int) -> list[Question]:
        entries = list(self._published())
        by_image: dict[tuple[str, str], list[Entry]] = {}
        for entry in entries:
            by_image.setdefault((entry.category, entry.image), []).append(entry)
        for (category, image), pair in by_image.items():
            if len(pair) != LINES_AN_IMAGE:
                raise EvaluationError(
                    f"{self.name}: {category}/{image} has {len(pair)} questions; MME asks two an image"
                )
        chosen = set(self.sampled([f"{category}/{image}" for category, image in by_image], seed))
        return [
            self._question(number, entry)
            for number, entry in enumerate(entries, start=1)
            if f"{entry.category}/{entry.image}" in chosen
        ]

    def judge(self, question: Question, reply: Reply) -> Judgement:
        return self.judge_yes_no(question, reply)[1]

    def image_counts(self, sums: Mapping[str, float]) -> dict[str, float]:
        """An image is right where both its answers are."""
        return {"images": 1.0, "both": float(sums["right"] == sums["asked"])}

    def stratum(self, question: Question) -> str:
        return question.parts[0]

    def figures(self, totals: Totals) -> Figures:
        found: Figures = {}
        for category, total in totals.items():
            found[category, "accuracy"] = share(total["right"], total["asked"])
            found[category, "accuracy_plus"] = share(total["both"], total["images"])
            found[category, "mme_score"] = 100 * (found[category, "accuracy"] + found[category, "accuracy_plus"])
            if "first_known" in total:
                found[category, "first_token_agrees"] = share(total["first_agrees"], total["first_known"])
        found[ALL_PARTS, "mme_score"] = np.sum([found[category, "mme_score"] for category in totals], axis=0)
        return found

    def answered(self, files: Sequence[Path]) -> list[tuple[Question, Reply]]:
        """A file a category, named after it, with a line ``image, question, gold, answer`` each, tabs between them."""
        answers: dict[tuple[str, str, str], str] = {}
        for file in files:
            try:
                lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
            except (OSError, UnicodeDecodeError) as error:
                raise EvaluationError(f"the answers {file} can't be read: {error}") from error
            for number, line in enumerate(lines, start=1):
                columns = line.split("\t")
                if len(columns) != 4:
                    raise EvaluationError(
                        f"the answers {file}, line {number}: it has {len(columns)} columns, not image, question, gold and "
                        "answer with tabs between them"
                    )
                answers[file.stem, columns[0], columns[1]] = columns[3]
        pairs = []
        for question in self.asked(0):
            key = (*question.places[0], question.question)
            if key not in answers:
                raise EvaluationError(
                    f"{self.name}: no answer to {question.question!r} of {key[0]}/{key[1]} in the files"
                )
            pairs.append((question, Reply(answers[key])))
        return pairs

    def answer_files(self, answers: Sequence[tuple[Question, str]]) -> dict[str, str]:
        lines: dict[str, list[str]] = {}
        for question, answer in answers:
            columns = question.places[0][1], question.question, question.truth[0].capitalize(), answer
            # The script splits at tabs and lines.
            line = "\t".join(" ".join(column.split()) for column in columns)
            lines.setdefault(f"{question.parts[0]}.txt", []).append(line + "\n")
        return {name: "".join(written) for name, written in lines.items()}

    def _question(self, number: int, entry: Entry) -> Question:
        bare = entry.question.removesuffix(PUBLISHED_SUFFIX)
        return Question(
            id=f"{self.name}-{entry.category}-{number}",
            task=self.task,
            question=entry.question,
            prompt=entry.question if self.suffix is None else bare + self.suffix,
            image=entry.image,
            truth=(entry.gold,),
            places=((entry.category, entry.name),),
            new_tokens=self.tokens_to_write(),
        )

    def _published(self) -> Iterator[Entry]:
        if self.dataset is not None:
            for name in ("category", "question", "answer", "question_id"):
                self.column(name)
            first: dict[tuple[str, str], str] = {}
            for number, row in enumerate(self.text_rows()):
                if row["category"] in self.categories:
                    image = first.setdefault((row["category"], row["question_id"]), f"#{number}")
                    gold = gold_answer(row["answer"], f"{self.name}: row {number}")
                    name = str(row["question_id"]).rsplit("/", 1)[-1]
                    yield Entry(row["category"], image, name, row["question"], gold)
            return
        if self.questions or self.images is None:
            raise EvaluationError(
                f"{self.name}: it reads the published folder, questions and images together: give it as 'images', and "
                "no 'questions'"
            )
        for category in self.categories:
            yield from self._category(Path(self.images).expanduser(), category)

    def _category(self, root: Path, category: str) -> Iterator[Entry]:
        folder = root / category
        apart = (folder / "questions_answers_YN").is_dir()
        texts = sorted((folder / "questions_answers_YN" if apart else folder).glob("*.txt"))
        if not texts:
            raise EvaluationError(f"{self.name}: no questions of the category {category!r} in {folder}")
        for text in texts:
            where = folder / "images" if apart else folder
            images = [path for path in sorted(where.glob(f"{text.stem}.*")) if path.suffix != ".txt"]
            if not images:
                raise EvaluationError(f"{self.name}: no image beside {text}")
            for line in text.read_text(encoding="utf-8").splitlines():
                if line.strip():
                    question, _, gold = line.rpartition("\t")
                    image = images[0].relative_to(root)
                    yield Entry(category, str(image), image.name, question.strip(), gold_answer(gold, str(text)))
