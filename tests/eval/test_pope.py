"""POPE on two images and five questions, counted by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from attn_eval.answers import image_task, score_answers
from attn_eval.errors import EvaluationError
from attn_eval.tasks.images import Reply
from tests.eval.benchmarks import draw, pope_files, write_lines

DOG, CAT, BUS, OVEN, SINK = (f"Is there a {thing} in the image?" for thing in ("dog", "cat", "bus", "oven", "sink"))


def pope(folder: Path, **settings: Any) -> Any:
    return image_task("pope", {"questions": pope_files(folder), **settings})


def by_order(folder: Path, name: str, answers: dict[str, list[str]]) -> list[Path]:
    return [
        write_lines(folder / f"{name}_{split}.json", [{"answer": text} for text in texts])
        for split, texts in answers.items()
    ]


def values(metrics: list[dict[str, Any]], run: str = "baseline") -> dict[tuple[str, str], Any]:
    return {(metric["length"], metric["metric"]): metric[run] for metric in metrics}


def test_a_question_is_asked_once_and_counts_in_every_split_that_has_it(tmp_path: Path) -> None:
    questions = pope(tmp_path).asked(0)
    assert [question.question for question in questions] == [DOG, CAT, BUS, OVEN, SINK]
    assert [question.parts for question in questions] == [["random", "adversarial"]] * 3 + [["random"], ["adversarial"]]
    assert questions[0].prompt == DOG + "\nAnswer the question using a single word or phrase."
    assert pope(tmp_path).notes(questions) == ["pope: 5 questions asked once stand for 8 of the splits"]
    assert len(pope(tmp_path, ask_once=False).asked(0)) == 8


def test_figures_counted_by_hand(tmp_path: Path) -> None:
    # random: dog right, cat missed, bus a false yes, oven right. adversarial: the same but the last a false yes.
    answers = {"random": ["Yes.", "There is no cat.", "Not sure", "no"], "adversarial": ["yes", "No", "", "Sure"]}
    metrics, notes = score_answers(pope(tmp_path), by_order(tmp_path, "answers", answers))
    found = values(metrics)
    assert {name: found["random", name] for name in ("accuracy", "precision", "recall", "f1", "yes_ratio")} == {
        "accuracy": 2 / 4,
        "precision": 1 / 2,
        "recall": 1 / 2,
        "f1": 1 / 2,
        "yes_ratio": 2 / 4,
    }
    assert found["adversarial", "accuracy"] == 1 / 4
    assert found["adversarial", "precision"] == 1 / 3
    assert found["adversarial", "f1"] == pytest.approx(2 / 5)
    assert found["adversarial", "yes_ratio"] == 3 / 4
    assert found["all", "f1"] == pytest.approx((1 / 2 + 2 / 5) / 2)
    assert ("all", "first_token_agrees") not in found
    assert "pope, baseline: 5 of 8 answers are read differently by others" in notes[-1]


def test_undefined_figures_are_left_empty(tmp_path: Path) -> None:
    always_no = by_order(tmp_path, "no", {"random": ["no"] * 4, "adversarial": ["no"] * 4})
    found = values(score_answers(pope(tmp_path), always_no)[0])
    assert found["random", "precision"] is None
    assert (found["random", "recall"], found["random", "f1"], found["all", "yes_ratio"]) == (0.0, 0.0, 0.0)


def test_two_runs_are_paired_by_question(tmp_path: Path) -> None:
    first = by_order(tmp_path, "first", {"random": ["yes"] * 4, "adversarial": ["yes"] * 4})
    second = by_order(tmp_path, "second", {"random": ["yes", "yes", "no", "no"], "adversarial": ["no"] * 4})
    metrics, _ = score_answers(pope(tmp_path), first, second)
    found = {(metric["length"], metric["metric"]): metric for metric in metrics}
    random = found["random", "accuracy"]
    assert (random["baseline"], random["edited"], random["difference"]) == (0.5, 1.0, 0.5)
    assert (random["right_to_wrong"], random["wrong_to_right"], random["mcnemar_p"]) == (0, 2, 0.5)
    flips = found["adversarial", "accuracy"]
    assert (flips["right_to_wrong"], flips["wrong_to_right"]) == (2, 2)
    assert "right_to_wrong" not in found["random", "f1"]
    low, high = random["interval"]
    assert low <= 0.5 <= high


def test_questions_of_one_image_are_no_independent_evidence(tmp_path: Path) -> None:
    """Six questions about one image turn right, two about another stay. Of the four equally likely draws of two images one has no
    change, (other, other), so p is 2 / 4, where McNemar's test on six flips says 2 / 64."""
    things = ["dog", "cat", "bus", "oven", "sink", "cup"]
    asked = [("1.png", thing, "yes") for thing in things] + [("2.png", thing, "yes") for thing in things[:2]]
    records = [
        {"question_id": number, "image": image, "text": f"Is there a {thing} in the image?", "label": label}
        for number, (image, thing, label) in enumerate(asked)
    ]
    task = image_task("pope", {"questions": str(write_lines(tmp_path / "random.json", records))})
    first = by_order(tmp_path, "first", {"random": ["no"] * 6 + ["yes"] * 2})
    second = by_order(tmp_path, "second", {"random": ["yes"] * 8})
    found = {(metric["length"], metric["metric"]): metric for metric in score_answers(task, first, second)[0]}
    accuracy = found["random", "accuracy"]
    assert (accuracy["right_to_wrong"], accuracy["wrong_to_right"], accuracy["mcnemar_p"]) == (0, 6, 2 / 64)
    assert accuracy["bootstrap_p"] == pytest.approx(2 / 4, abs=0.02)
    # The other way it is the same, and one image alone says nothing of others.
    back = {(m["length"], m["metric"]): m for m in score_answers(task, second, first)[0]}["random", "accuracy"]
    assert back["bootstrap_p"] == pytest.approx(2 / 4, abs=0.02)
    assert "bootstrap_p" not in found["random", "f1"]
    only = image_task("pope", {"questions": str(write_lines(tmp_path / "popular.json", records[:6]))})
    files = [by_order(tmp_path, name, {"popular": [answer] * 6}) for name, answer in (("no", "no"), ("yes", "yes"))]
    assert score_answers(only, *files)[0][0]["bootstrap_p"] is None


def test_answers_of_a_run_are_read_back(tmp_path: Path) -> None:
    task = pope(tmp_path)
    said = dict(zip([DOG, CAT, BUS, OVEN, SINK], ["yes", "no", "yes", "no", "no"], strict=True))
    written = task.answer_files([(question, said[question.question]) for question in task.asked(0)])
    assert [json.loads(line)["question_id"] for line in written["adversarial.jsonl"].splitlines()] == list("1234")
    files = []
    for name, content in written.items():
        files.append(tmp_path / name)
        files[-1].write_text(content, encoding="utf-8")
    pairs = task.answered(files)
    assert {question.question: reply.text for question, reply in pairs} == said
    assert values(score_answers(task, files)[0])["random", "accuracy"] == 2 / 4


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([[{"answer": "yes"}] * 4, [{"answer": "yes"}] * 3], "with 4, 4 answers; given were 4, 3"),
        ([[{"answer": "yes", "question": "Is there a cow?"}] * 4] * 2, "the files are not in one order"),
        ([[{"text": "yes"}] * 4] * 2, "entry 1, has no 'answer'"),
        ([[{"answer": "yes", "image": "1.png", "question": DOG}]], "4 of 5 questions have no answer"),
    ],
)
def test_answers_that_do_not_fit_are_one_line(records: list[Any], message: str, tmp_path: Path) -> None:
    files = [write_lines(tmp_path / f"{number}.json", lines) for number, lines in enumerate(records)]
    with pytest.raises(EvaluationError, match=message):
        score_answers(pope(tmp_path), files)


def test_the_misspelt_copy_is_told(tmp_path: Path) -> None:
    record = {"question_id": 1, "image": "1.png", "text": "Is there a dog in the imange?", "label": "yes"}
    file = str(write_lines(tmp_path / "adversarial.json", [record, record | {"label": "no", "image": "2.png"}]))
    task = image_task("pope", {"questions": file})
    assert task.notes(task.asked(0)) == ["pope: 2 questions say 'imange'; the original files have none"]


def test_files_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    record = {"question_id": 1, "image": "1.png", "text": DOG, "label": "yes"}
    random = str(write_lines(tmp_path / "random.json", [record]))
    popular = str(write_lines(tmp_path / "popular.json", [record | {"label": "no"}]))
    with pytest.raises(EvaluationError, match="don't agree on the answer"):
        image_task("pope", {"questions": [random, popular]}).asked(0)
    bad = str(write_lines(tmp_path / "popular.json", [record | {"label": "maybe"}]))
    with pytest.raises(EvaluationError, match="neither yes nor no"):
        image_task("pope", {"questions": bad}).asked(0)
    with pytest.raises(EvaluationError, match="two files are of the split 'random'"):
        image_task("pope", {"questions": [random, str(tmp_path / "coco_random.json")]})
    with pytest.raises(EvaluationError, match="it needs 'questions'"):
        image_task("pope", {}).asked(0)


def test_samples_are_images_and_stay_the_same(tmp_path: Path) -> None:
    one = {question.image for question in pope(tmp_path, samples=1).asked(7)}
    assert len(one) == 1
    assert one <= {question.image for question in pope(tmp_path, samples=2).asked(7)} == {"1.png", "2.png"}
    assert {question.image for seed in range(9) for question in pope(tmp_path, samples=1).asked(seed)} == {
        "1.png",
        "2.png",
    }


def test_the_first_token_is_compared_with_the_text_or_taken_for_it(tmp_path: Path) -> None:
    task = pope(tmp_path)
    dog = task.asked(0)[0]
    agrees = task.judge(dog, Reply("Yes", False, (-0.1, -3.0)))
    differs = task.judge(dog, Reply("Yes", False, (-3.0, -0.1)))
    assert (agrees.counts["first_agrees"], differs.counts["first_agrees"]) == (1.0, 0.0)
    assert agrees.read["readings"] == {}
    assert differs.read["readings"]["first_token"] == "no"
    first = pope(tmp_path, mode="first_token")
    assert first.asked(0)[0].new_tokens == 1
    assert first.judge(dog, Reply("Yes", True, (-3.0, -0.1))).score == 0.0
    with pytest.raises(EvaluationError, match="needs the model, not a file"):
        first.judge(dog, Reply("Yes"))


def test_a_data_set_of_the_hub_holds_the_same_questions(tmp_path: Path) -> None:
    """A folder of Parquet, with lmms-lab/POPE's columns, as the hub's data sets are."""
    pictures = draw(tmp_path / "images", ["1.png", "2.png"])
    rows = []
    for split, file in zip(("random", "adversarial"), pope_files(tmp_path), strict=True):
        for line in Path(file).read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            rows.append(
                {
                    "question_id": str(record["question_id"]),
                    "question": record["text"],
                    "answer": record["label"],
                    "image_source": record["image"].removesuffix(".png"),
                    "image": Image.open(f"{pictures}/{record['image']}"),
                    "category": split,
                }
            )
    (tmp_path / "hub" / "data").mkdir(parents=True)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "hub" / "data" / "test-00000-of-00001.parquet")
    task = image_task("pope", {"dataset": str(tmp_path / "hub")})
    questions = task.items(None, 0)
    published = pope(tmp_path, images=pictures).items(None, 0)
    assert [(q.question, q.truth, q.places) for q in questions] == [(q.question, q.truth, q.places) for q in published]
    assert {(q.picture.width, q.picture.height) for q in questions} == {(20, 20), (24, 20)}
    assert len({q.image for q in questions}) == 2
    with pytest.raises(EvaluationError, match="has no column category or split"):
        rows_without = datasets.Dataset.from_list([{"question": "?"}])
        (tmp_path / "other").mkdir()
        rows_without.to_parquet(tmp_path / "other" / "test.parquet")
        image_task("pope", {"dataset": str(tmp_path / "other")}).asked(0)


def test_an_image_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"no image '1\.png' in the folder"):
        pope(tmp_path, images=str(tmp_path / "nowhere")).items(None, 0)
    (tmp_path / "1.png").write_text("no picture", encoding="utf-8")
    with pytest.raises(EvaluationError, match=r"1\.png is no image that can be read"):
        pope(tmp_path, images=str(tmp_path)).items(None, 0)
    with pytest.raises(EvaluationError, match="needs 'images'"):
        pope(tmp_path).items(None, 0)
