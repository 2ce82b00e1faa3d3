"""POPE, object hallucination by polling (arXiv 2305.10355): is there a chair in the image?

The three splits ask the same 1500 questions whose answer is yes, and share some of the others. A question is asked once
and counts in every split that has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import Field, PositiveInt, field_validator

from attn_eval.errors import EvaluationError
from attn_eval.tasks.images import (
    ALL_PARTS,
    Figures,
    Judgement,
    Question,
    Reply,
    Totals,
    YesNoTask,
    gold_answer,
    need,
    read_records,
    share,
    to_lines,
)

SPLITS = ("random", "popular", "adversarial")
MISSPELT = "imange"


class PopeTask(YesNoTask):
    """Accuracy, precision, recall, F1 of yes, and the share of answers yes, for each split; ``all`` is their mean.

    Attributes:
        questions: the published files, split -> file, or a list of files whose names end in their split.
        dataset: ``lmms-lab/POPE``, or any with question, answer, category, question_id and image.
        ask_once: False asks a question anew for each split that has it, as the published script does.
    """

    version: ClassVar[int] = 1

    questions: dict[str, str] = Field(default_factory=dict)  # type: ignore[assignment]
    new_tokens: PositiveInt = 10
    ask_once: bool = True

    @field_validator("questions", mode="before")
    @classmethod
    def _splits_by_name(cls, files: Any) -> Any:
        if isinstance(files, Mapping):
            return files
        listed = [files] if isinstance(files, str) else files
        by_split: dict[str, str] = {}
        for file in listed:
            stem = Path(str(file)).stem
            split = next((name for name in SPLITS if stem.endswith(name)), stem)
            if split in by_split:
                raise ValueError(f"two files are of the split {split!r}: write questions: {{random: FILE, ...}}")
            by_split[split] = str(file)
        return by_split

    def asked(self, seed: int) -> list[Question]:
        published = self._published()
        chosen = set(self.sampled(list(dict.fromkeys(entry["image"] for _, entry in published)), seed))
        unique: dict[tuple[str, ...], list[tuple[str, dict[str, Any]]]] = {}
        for split, entry in published:
            if entry["image"] in chosen:
                key = entry["image"], entry["text"], *(() if self.ask_once else (split, entry["question_id"]))
                unique.setdefault(key, []).append((split, entry))
        return [self._question(number, entries) for number, entries in enumerate(unique.values(), start=1)]

    def judge(self, question: Question, reply: Reply) -> Judgement:
        return self.judge_yes_no(question, reply)[1]

    def figures(self, totals: Totals) -> Figures:
        found: Figures = {}
        for split, total in totals.items():
            found[split, "accuracy"] = share(total["right"], total["asked"])
            found[split, "precision"] = share(total["true_yes"], total["said_yes"])
            found[split, "recall"] = share(total["true_yes"], total["gold_yes"])
            found[split, "f1"] = share(2 * total["true_yes"], total["said_yes"] + total["gold_yes"])
            found[split, "yes_ratio"] = share(total["said_yes"], total["asked"])
            if "first_known" in total:
                found[split, "first_token_agrees"] = share(total["first_agrees"], total["first_known"])
        if len(totals) > 1:
            for name in dict.fromkeys(figure for _, figure in list(found)):
                found[ALL_PARTS, name] = np.mean([found[split, name] for split in totals], axis=0)
        return found

    def notes(self, questions: Sequence[Question]) -> list[str]:
        notes = []
        misspelt = sum(MISSPELT in question.question for question in questions)
        if misspelt:
            notes.append(f"{self.name}: {misspelt} questions say {MISSPELT!r}; the original files have none")
        places = sum(len(question.places) for question in questions)
        if places > len(questions):
            notes.append(f"{self.name}: {len(questions)} questions asked once stand for {places} of the splits")
        return notes

    def answered(self, files: Sequence[Path]) -> list[tuple[Question, Reply]]:
        """One file a split in the order of its questions, as the published script reads them, or one file for all
        whose entries have image and question."""
        records = {file: read_records(file, "the answers", ["answer"]) for file in files}
        everything = [record for listed in records.values() for record in listed]
        if all("image" in record and "question" in record for record in everything):
            answers = {(record["image"], record["question"]): str(record["answer"]) for record in everything}
            if len(answers) == len({(r["image"], r["question"], str(r["answer"])) for r in everything}):
                return self._by_question(answers)
        return self._by_order(list(records.values()))

    def answer_files(self, answers: Sequence[tuple[Question, str]]) -> dict[str, str]:
        lines: dict[str, list[dict[str, str]]] = {}
        for question, answer in answers:
            for split, number in question.places:
                entry = {"question_id": number, "image": question.image, "question": question.question}
                lines.setdefault(f"{split}.jsonl", []).append({**entry, "answer": answer})
        order = {(split, str(entry["question_id"])): place for place, (split, entry) in enumerate(self._published())}
        for name, entries in lines.items():
            split = name.removesuffix(".jsonl")
            entries.sort(key=lambda entry, split=split: order[split, entry["question_id"]])  # type: ignore[misc]
        return {name: to_lines(entries) for name, entries in lines.items()}

    def _question(self, number: int, entries: Sequence[tuple[str, dict[str, Any]]]) -> Question:
        (split, first) = entries[0]
        labels = {gold_answer(entry["label"], f"{self.name}: {entry['text']!r}") for _, entry in entries}
        if len(labels) > 1:
            raise EvaluationError(
                f"{self.name}: the splits don't agree on the answer to {first['text']!r} of {first['image']}: they are "
                "not of one data set"
            )
        return Question(
            id=f"{self.name}-{number}" if self.ask_once else f"{self.name}-{split}-{first['question_id']}",
            task=self.task,
            question=first["text"],
            prompt=first["text"] + self.suffix,
            image=first["image"],
            truth=tuple(labels),
            places=tuple((split, str(entry["question_id"])) for split, entry in entries),
            new_tokens=self.tokens_to_write(),
        )

    def _published(self) -> list[tuple[str, dict[str, Any]]]:
        """(split, entry) of every published question, in order."""
        if self.dataset is not None:
            split_column = self.column("category", "split")
            text_column, label_column = self.column("question", "text"), self.column("answer", "label")
            rows: dict[str, str] = {}
            source = (
                self.rows().column_names.index("image_source") if "image_source" in self.rows().column_names else None
            )
            entries = []
            for number, row in enumerate(self.text_rows()):
                # Six questions share an image: its first row stands for it.
                image = row["image_source"] if source is not None else str(number)
                entry = {"question_id": row["question_id"], "text": row[text_column], "label": row[label_column]}
                entries.append((str(row[split_column]), {**entry, "image": rows.setdefault(image, f"#{number}")}))
            return entries
        files = need(
            self.questions, self, "questions", "the published files of the splits (coco_pope_random.json, ...)"
        )
        return [
            (split, record)
            for split, file in files.items()
            for record in read_records(file, f"the questions of {self.name}", ["question_id", "image", "text", "label"])
        ]

    def _by_question(self, answers: Mapping[tuple[str, str], str]) -> list[tuple[Question, Reply]]:
        questions = self.asked(0)
        lacking = [question for question in questions if (question.image, question.question) not in answers]
        if lacking:
            raise EvaluationError(
                f"{self.name}: {len(lacking)} of {len(questions)} questions have no answer, the first one "
                f"{lacking[0].question!r} of {lacking[0].image}"
            )
        return [(question, Reply(answers[question.image, question.question])) for question in questions]

    def _by_order(self, answers: Sequence[Sequence[dict[str, Any]]]) -> list[tuple[Question, Reply]]:
        questions = self.model_copy(update={"ask_once": False}).asked(0)
        splits: dict[str, list[Question]] = {}
        for question in questions:
            splits.setdefault(question.parts[0], []).append(question)
        if [len(listed) for listed in answers] != [len(listed) for listed in splits.values()]:
            raise EvaluationError(
                f"{self.name}: answers without image and question go by order: one file a split ({', '.join(splits)}), with "
                f"{', '.join(str(len(listed)) for listed in splits.values())} answers; given were "
                f"{', '.join(str(len(listed)) for listed in answers)}"
            )
        pairs = []
        for asked, given in zip(splits.values(), answers, strict=True):
            for number, (question, record) in enumerate(zip(asked, given, strict=True), start=1):
                told = record.get("question", question.question)
                if str(told).lower() != question.question.lower():
                    raise EvaluationError(
                        f"{self.name}: answer {number} of {question.parts[0]} is to {told!r}, the question there is "
                        f"{question.question!r}: the files are not in one order"
                    )
                pairs.append((question, Reply(str(record["answer"]))))
        return pairs
