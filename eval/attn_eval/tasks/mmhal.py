"""MMHal-Bench (arXiv 2309.14525): open questions whose answers GPT-4 judges; here they are written for that judge."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from attn_eval.tasks.images import (
    ALL_PARTS,
    Figures,
    ImageTask,
    Judgement,
    Question,
    Reply,
    Totals,
    need,
    read_records,
    share,
    to_list,
)


class MmhalTask(ImageTask):
    """Writes ``responses.json``, the published template with ``model_answer`` filled, and measures the answers' length;
    the benchmark's score needs its judge.

    Attributes:
        questions: the published ``response_template.json``.
        images: the folder of the images, each named as its ``image_src`` ends.
    """

    version: ClassVar[int] = 1
    plain_figures: ClassVar[frozenset[str]] = frozenset({"length"})
    reads_datasets: ClassVar[bool] = False

    def asked(self, seed: int) -> list[Question]:
        entries = self._template()
        chosen = set(self.sampled(list(dict.fromkeys(_file_of(entry) for entry in entries)), seed))
        return [
            Question(
                id=f"{self.name}-{number}",
                task=self.task,
                question=entry["question"],
                prompt=entry["question"] + self.suffix,
                image=_file_of(entry),
                truth=(str(entry.get("gt_answer", "")),),
                places=((ALL_PARTS, str(number)),),
                new_tokens=self.new_tokens,
            )
            for number, entry in enumerate(entries)
            if _file_of(entry) in chosen
        ]

    def judge(self, question: Question, reply: Reply) -> Judgement:
        counts = {"answers": 1.0, "words": float(len(reply.text.split()))}
        if reply.capped is not None:
            counts |= {"capped": float(reply.capped), "cap_known": 1.0}
        return Judgement(float(bool(reply.text.strip())), counts)

    def figures(self, totals: Totals) -> Figures:
        total = totals[ALL_PARTS]
        figures = {(ALL_PARTS, "length"): share(total["words"], total["answers"])}
        if "cap_known" in total:
            figures[ALL_PARTS, "at_token_cap"] = share(total["capped"], total["cap_known"])
        return figures

    def notes(self, questions: Sequence[Question]) -> list[str]:
        return [f"{self.name}: score and hallucination rate need the benchmark's judge; its input is responses.json"]

    def answered(self, files: Sequence[Path]) -> list[tuple[Question, Reply]]:
        """The template with ``model_answer`` filled, in its order."""
        questions = {question.places[0][1]: question for question in self.asked(0)}
        records = [record for file in files for record in read_records(file, "the answers", ["model_answer"])]
        return [
            (questions[str(number)], Reply(str(record["model_answer"])))
            for number, record in enumerate(records)
            if str(number) in questions
        ]

    def answer_files(self, answers: Sequence[tuple[Question, str]]) -> dict[str, str]:
        entries = self._template()
        filled = [entries[int(question.places[0][1])] | {"model_answer": answer} for question, answer in answers]
        return {"responses.json": to_list(filled)}

    def _template(self) -> list[dict[str, Any]]:
        files = need(self.questions, self, "questions", "the published response_template.json")
        return [record for file in files for record in read_records(file, "the template", ["question", "image_src"])]


def _file_of(entry: dict[str, Any]) -> str:
    return str(entry["image_src"]).rsplit("/", 1)[-1]
