"""CHAIR on three images, counted by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from attn_eval.answers import image_task, score_answers
from attn_eval.errors import EvaluationError
from attn_eval.tasks.images import Reply
from tests.eval.benchmarks import chair_files, write_json, write_lines

# 1 holds a person and a dog, 2 a cat and a couch, 3 nothing.
CAPTIONS = {
    1: "A dog, a dog and a frisbee.",
    2: "A cat on a couch.",
    3: "Blue sky.",
}


def chair(folder: Path, **settings: Any) -> Any:
    return image_task("chair", {**chair_files(folder), **settings})


def answers(folder: Path, captions: dict[int, str], name: str = "captions.jsonl") -> list[Path]:
    return [write_lines(folder / name, [{"image_id": image, "caption": text} for image, text in captions.items()])]


def test_truth_is_masks_and_reference_captions_together(tmp_path: Path) -> None:
    questions = chair(tmp_path).asked(0)
    assert {question.places[0][1]: question.truth for question in questions} == {
        "1": ("dog", "person"),
        "2": ("cat", "couch"),
        "3": (),
    }
    assert questions[0].prompt == "Please describe this image in detail."
    assert questions[0].image == "COCO_val2014_000000000001.png"
    masks_only = image_task("chair", {"instances": chair_files(tmp_path)["instances"]})
    assert masks_only.asked(0)[1].truth == ("cat",)
    assert "no reference captions" in masks_only.notes([])[0]


def test_figures_counted_by_hand(tmp_path: Path) -> None:
    metrics, notes = score_answers(chair(tmp_path), answers(tmp_path, CAPTIONS))
    found = {metric["metric"]: metric["baseline"] for metric in metrics}
    # 5 mentions, of which the frisbee is none of the image's; distinct: dog, frisbee, cat, couch; 3 of 4 true ones.
    assert found["chair_s"] == pytest.approx(1 / 3)
    assert found["chair_i"] == pytest.approx(1 / 5)
    assert found["recall"] == pytest.approx(3 / 4)
    assert found["precision"] == pytest.approx(3 / 4)
    assert found["f1"] == pytest.approx(3 / 4)
    # Words and punctuation marks: 9, 6 and 3.
    assert found["length"] == pytest.approx(18 / 3)
    # Of 8 pairs "a dog" comes twice; the other captions repeat none.
    assert found["distinct_2"] == pytest.approx((7 / 8 + 1 + 1) / 3)
    assert "at_token_cap" not in found
    assert notes == []
    (length,) = [metric for metric in metrics if metric["metric"] == "length"]
    assert length["unit"] == ""
    assert length["baseline_interval"] == pytest.approx((3.0, 9.0))


def test_a_model_that_names_nothing_has_no_chair_i(tmp_path: Path) -> None:
    metrics, _ = score_answers(chair(tmp_path), answers(tmp_path, {1: "", 2: "Hm.", 3: "Sky"}))
    found = {metric["metric"]: metric["baseline"] for metric in metrics}
    assert (found["chair_i"], found["precision"]) == (None, None)
    assert (found["chair_s"], found["recall"], found["f1"]) == (0.0, 0.0, 0.0)


def test_captions_at_the_token_cap_are_counted(tmp_path: Path) -> None:
    task = chair(tmp_path)
    judged = task.judge(task.asked(0)[0], Reply("A dog", capped=True))
    assert (judged.counts["capped"], judged.counts["cap_known"], judged.score) == (1.0, 1.0, 1.0)
    assert judged.read == {"objects": ["dog"], "hallucinated": []}


def test_two_runs_are_paired_by_image(tmp_path: Path) -> None:
    edited = answers(tmp_path, CAPTIONS | {1: "A dog.", 3: "A bus."}, "edited.jsonl")
    metrics, _ = score_answers(chair(tmp_path), answers(tmp_path, CAPTIONS), edited)
    found = {metric["metric"]: metric for metric in metrics}
    sentences = found["chair_s"]
    assert (sentences["right_to_wrong"], sentences["wrong_to_right"], sentences["mcnemar_p"]) == (1, 1, 1.0)
    assert sentences["difference"] == 0.0
    assert found["chair_i"]["difference"] == pytest.approx(1 / 4 - 1 / 5)
    with pytest.raises(EvaluationError, match="1 are only in the first, 0 only in the edited"):
        score_answers(chair(tmp_path), answers(tmp_path, CAPTIONS), answers(tmp_path, {1: "A", 2: "B"}, "two.jsonl"))


def test_answers_of_a_run_and_of_llava_are_read(tmp_path: Path) -> None:
    task = chair(tmp_path)
    written = task.answer_files([(question, "A cat.") for question in task.asked(0)])
    path = tmp_path / "captions.jsonl"
    path.write_text(written["captions.jsonl"], encoding="utf-8")
    assert [question.id for question, _ in task.answered([path])] == ["chair-1", "chair-2", "chair-3"]
    records = [{"question_id": 0, "image_id": "COCO_val2014_000000000002.jpg", "text": "A cat."}]
    ((question, reply),) = task.answered([Path(write_json(tmp_path / "llava.json", records))])
    assert (question.id, reply.text) == ("chair-2", "A cat.")


def test_images_can_be_listed_and_drawn(tmp_path: Path) -> None:
    listed = str(write_lines(tmp_path / "images.jsonl", [{"image": "000000000003.jpg"}, {"image_id": 1}]))
    assert [question.id for question in chair(tmp_path, questions=listed).asked(0)] == ["chair-3", "chair-1"]
    assert len(chair(tmp_path, samples=2).asked(0)) == 2
    unknown = str(write_lines(tmp_path / "images.jsonl", [{"image_id": 77}]))
    with pytest.raises(EvaluationError, match="1 of 1 images are not in the annotations, the first is 77"):
        chair(tmp_path, questions=unknown).asked(0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"instances": "/no/file.json"}, "the annotations /no/file.json can't be read"),
        ({"instances": []}, "it needs 'instances'"),
        ({"synonyms": "/no/names.txt"}, "the list of object names /no/names.txt"),
        ({"dataset": "tsunghanwu/mscoco_chair"}, "reads its published files only"),
        ({"instance": "x"}, "no key 'instance'; did you mean 'instances'"),
        ({"dataset_config": "x"}, "say which part of a 'dataset'"),
    ],
)
def test_mistakes_are_one_line(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=message):
        chair(tmp_path, **settings).asked(0)


def test_annotations_of_another_kind_are_refused(tmp_path: Path) -> None:
    captions = chair_files(tmp_path)["captions"]
    with pytest.raises(EvaluationError, match="have no 'images' and no 'categories'"):
        image_task("chair", {"instances": captions}).asked(0)
    strange = answers(tmp_path, {9: "A train."}, "strange.jsonl")
    with pytest.raises(EvaluationError, match="image 9, which has no annotations"):
        score_answers(chair(tmp_path), strange)
