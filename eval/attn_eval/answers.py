"""Files of answers scored without a model: the same figures as a run, from answers that anything wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from attn_eval.errors import EvaluationError
from attn_eval.figures import Metric, Scored, figures_of
from attn_eval.recipe import explain_faults
from attn_eval.results import BASELINE, EDITED, disagreement_notes
from attn_eval.tasks import build_task, task_class
from attn_eval.tasks.images import ImageTask, Judgement, Question


def image_task(name: str, settings: Mapping[str, Any]) -> ImageTask:
    """The benchmark of that name.

    Raises:
        EvaluationError: no such task, one without images, or a key or value that it doesn't have.
    """
    loaded = task_class(name)
    if not issubclass(loaded, ImageTask):
        raise EvaluationError(
            f"the task {name!r} makes up its questions as it runs, so its answers are scored by 'run'"
        )
    try:
        task = build_task({"task": name, **settings})
    except ValidationError as error:
        raise EvaluationError(explain_faults(error, loaded, f"task {name!r}")) from error
    assert isinstance(task, ImageTask)
    return task


def score_answers(
    task: ImageTask, answers: Sequence[Path], edited: Sequence[Path] = (), seed: int = 42
) -> tuple[list[Metric], list[str]]:
    """The figures of files of answers, and notes for their reader.

    Args:
        task: with its question files; images are not needed.
        answers: in the benchmark's published format.
        edited: another run's answers to the same questions, compared pair by pair.
        seed: of the bootstrap.

    Raises:
        EvaluationError: a file can't be read or doesn't fit the questions, or the two runs answer different ones.
    """
    files = {BASELINE: answers, EDITED: edited} if edited else {BASELINE: answers}
    pairs = {
        run: {question.id: (question, reply) for question, reply in task.answered(of_run)}
        for run, of_run in files.items()
    }
    asked = {run: set(answered) for run, answered in pairs.items()}
    if edited and asked[BASELINE] != asked[EDITED]:
        only = [len(asked[BASELINE] - asked[EDITED]), len(asked[EDITED] - asked[BASELINE])]
        raise EvaluationError(
            f"{task.name}: the two runs don't answer the same questions: {only[0]} are only in the first, {only[1]} only "
            "in the edited one"
        )
    judged: dict[str, dict[str, Judgement]] = {
        run: {name: task.judge(*pair) for name, pair in answered.items()} for run, answered in pairs.items()
    }
    questions: list[Question] = [question for question, _ in pairs[BASELINE].values()]
    if not questions:
        raise EvaluationError(f"{task.name}: {', '.join(map(str, answers))} holds no answer")
    samples = [
        Scored(
            question.image,
            task.stratum(question),
            question.parts,
            {run: verdicts[question.id].score for run, verdicts in judged.items()},
            {run: verdicts[question.id].counts for run, verdicts in judged.items()},
        )
        for question in questions
    ]
    notes = task.notes(questions)
    for run, verdicts in judged.items():
        notes += disagreement_notes(task, run, [verdict.read for verdict in verdicts.values()])
    return figures_of(task, samples, list(files), seed), notes
