"""MME, AMBER and MMHal-Bench on a handful of questions, counted by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import datasets
import pytest
from PIL import Image
from rich.console import Console

from attn_eval.answers import image_task, score_answers
from attn_eval.errors import EvaluationError
from attn_eval.recipe import Recipe
from attn_eval.runner import run_recipe
from attn_eval.tasks import amber
from attn_eval.tasks.amber import Lexicon
from attn_eval.tasks.images import Reply
from tests.eval.benchmarks import amber_files, draw, mme_folder, mmhal_template, write_json


def mme(folder: Path, **settings: Any) -> Any:
    return image_task("mme", {"images": mme_folder(folder), "categories": ["existence", "count"], **settings})


def answer_files(task: Any, folder: Path, answers: list[str]) -> list[Path]:
    """What a run would leave, from answers in the order of the questions."""
    folder.mkdir(exist_ok=True)
    files = []
    for name, content in task.answer_files(list(zip(task.asked(0), answers, strict=True))).items():
        files.append(folder / name)
        files[-1].write_text(content, encoding="utf-8")
    return files


def figures(metrics: list[dict[str, Any]], run: str = "baseline") -> dict[tuple[str, str], Any]:
    return {(metric["length"], metric["metric"]): metric[run] for metric in metrics}


def test_mme_counted_by_hand(tmp_path: Path) -> None:
    task = mme(tmp_path / "mme")
    # Image a both right, b one of two, c one of two ("Not sure" is read as no within its first four characters).
    files = answer_files(task, tmp_path / "out", ["Yes.", "no, none", "Y", "yes", "Not sure", "No"])
    assert sorted(file.name for file in files) == ["count.txt", "existence.txt"]
    metrics, _ = score_answers(task, files)
    found = figures(metrics)
    assert found["existence", "accuracy"] == 3 / 4
    assert found["existence", "accuracy_plus"] == 1 / 2
    assert found["existence", "mme_score"] == 125.0
    assert (found["count", "accuracy"], found["count", "accuracy_plus"], found["count", "mme_score"]) == (
        0.5,
        0.0,
        50.0,
    )
    assert found["all", "mme_score"] == 175.0
    units = {metric["metric"]: metric["unit"] for metric in metrics}
    assert (units["mme_score"], units["accuracy_plus"]) == ("", "share")
    # One image of count says nothing about spread.
    assert all(metric["baseline_interval"] is None for metric in metrics)


def test_mme_questions_and_their_suffix(tmp_path: Path) -> None:
    question = mme(tmp_path).asked(0)[0]
    assert question.prompt == question.question == "Is there a dog in this image? Please answer yes or no."
    assert (question.image, question.truth, question.places) == ("existence/a.png", ("yes",), (("existence", "a.png"),))
    other = mme(tmp_path, suffix="\nAnswer with one word.").asked(0)[0]
    assert other.prompt == "Is there a dog in this image?\nAnswer with one word."
    assert mme(tmp_path).asked(0)[-1].image == "count/images/c.png"
    assert len(mme(tmp_path).items(None, 0)) == 6
    assert len(mme(tmp_path, samples=1).asked(0)) == 2


def test_mme_of_the_hub(tmp_path: Path) -> None:
    pictures = mme_folder(tmp_path / "mme")
    rows = [
        {
            "question_id": f"{question.parts[0]}/{question.places[0][1]}",
            "image": Image.open(f"{pictures}/{question.image}"),
            "question": question.question,
            "answer": question.truth[0].capitalize(),
            "category": question.parts[0],
        }
        for question in mme(tmp_path / "mme").asked(0)
    ]
    rows.append(rows[0] | {"category": "OCR"})
    (tmp_path / "hub").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "hub" / "test.parquet")
    task = image_task("mme", {"dataset": str(tmp_path / "hub"), "categories": ["existence", "count"]})
    ours, published = task.items(None, 0), mme(tmp_path / "mme").items(None, 0)
    assert [(q.question, q.truth, q.places) for q in ours] == [(q.question, q.truth, q.places) for q in published]
    assert [q.picture.width for q in ours] == [q.picture.width for q in published]
    files = answer_files(mme(tmp_path / "mme"), tmp_path / "out", ["Yes", "No"] * 3)
    assert figures(score_answers(task, files)[0])["all", "mme_score"] == 400.0


def test_mme_mistakes_are_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "mme"
    task = mme(folder)
    with pytest.raises(EvaluationError, match="no questions of the category 'position'"):
        mme(folder, categories=["position"]).asked(0)
    with pytest.raises(EvaluationError, match="no 'questions'"):
        image_task("mme", {}).asked(0)
    broken = tmp_path / "existence.txt"
    broken.write_text("a.png\tIs it?\tYes\n", encoding="utf-8")
    with pytest.raises(EvaluationError, match="it has 3 columns"):
        task.answered([broken])
    broken.write_text("a.png\tIs it?\tYes\tyes\n", encoding="utf-8")
    with pytest.raises(EvaluationError, match=r"no answer to 'Is there a dog in this image\?"):
        task.answered([broken])
    (folder / "existence" / "a.txt").write_text("Is it? Please answer yes or no.\tYes\n", encoding="utf-8")
    with pytest.raises(EvaluationError, match=r"existence/existence/a\.png has 1 questions; MME asks two"):
        task.asked(0)


def amber_task(folder: Path, **settings: Any) -> Any:
    return image_task("amber", {**amber_files(folder), **settings})


RESPONSES = [
    # person (as an associated word it names the truth "man"), forest (names tree), a bench (safe), puppies (hallucinated
    # and tempting), a boat (hallucinated).
    {"id": 1, "response": "A person in the forest near a bench with puppies and a boat."},
    {"id": 2, "response": "The water."},
    {"id": 3, "response": "No"},
    {"id": 4, "response": "yes"},
    {"id": 5, "response": "No"},
    {"id": 6, "response": "No"},
]


def test_amber_counted_by_hand(tmp_path: Path) -> None:
    answers = Path(write_json(tmp_path / "answers.json", RESPONSES))
    metrics, notes = score_answers(amber_task(tmp_path), [answers])
    found = figures(metrics)
    # 5 nouns and 1; two of them hallucinated. Truths 3 and 1, named: man, tree; sea. Traps 2 and 1, named: dog.
    assert found["generative", "chair"] == pytest.approx(2 / 6)
    assert found["generative", "cover"] == pytest.approx(3 / 4)
    assert found["generative", "hal"] == 1 / 2
    assert found["generative", "cog"] == pytest.approx(1 / 3)
    assert found["generative", "length"] == pytest.approx((13 + 2) / 2)
    # "yes" is not "Yes", so it is neither; no is said 3 times, right twice, and gold twice.
    assert found["discriminative", "accuracy"] == 2 / 4
    assert found["discriminative", "precision"] == pytest.approx(2 / 3)
    assert found["discriminative", "recall"] == 1.0
    assert found["discriminative", "f1"] == pytest.approx(4 / 5)
    assert (found["existence", "accuracy"], found["attribute", "accuracy"], found["state", "accuracy"]) == (
        1.0,
        0.0,
        0.0,
    )
    assert (found["relation", "accuracy"], found["relation", "precision"]) == (1 / 2, 1 / 2)
    assert found["all", "amber_score"] == pytest.approx((1 - 2 / 6 + 4 / 5) / 2)
    assert notes == [
        "amber, baseline: 1 of 6 answers are read differently by others (pope 1, negation 1, substring 1, exact 1, "
        "first_word 1)"
    ]


def test_amber_answers_of_one_kind_make_no_amber_score(tmp_path: Path) -> None:
    answers = Path(write_json(tmp_path / "answers.json", RESPONSES[:2]))
    found = figures(score_answers(amber_task(tmp_path), [answers])[0])
    assert {part for part, _ in found} == {"generative"}
    flipped = Path(write_json(tmp_path / "edited.json", [RESPONSES[0], {"id": 2, "response": "The water and a boat"}]))
    metrics, _ = score_answers(amber_task(tmp_path), [answers], [flipped])
    (hal,) = [metric for metric in metrics if metric["metric"] == "hal"]
    assert (hal["right_to_wrong"], hal["wrong_to_right"], hal["difference"]) == (1, 0, 0.5)


def test_amber_answers_of_a_run_are_read_back(tmp_path: Path) -> None:
    task = amber_task(tmp_path)
    asked = task.asked(0)
    assert [question.new_tokens for question in asked] == [512, 512, 10, 10, 10, 10]
    assert asked[0].prompt == "Describe this image."
    assert asked[2].prompt == "Is it so, 3?\nAnswer the question using a single word or phrase."
    pairs = task.answered(answer_files(task, tmp_path / "out", list("abcdef")))
    assert [reply.text for _, reply in pairs] == list("abcdef")
    strange = Path(write_json(tmp_path / "strange.json", [{"id": 77, "response": "No"}]))
    with pytest.raises(EvaluationError, match="answers the id 77, which no query file has"):
        task.answered([strange])
    with pytest.raises(EvaluationError, match="it needs 'annotations'"):
        amber_task(tmp_path, annotations="").asked(0)


def test_a_similar_word_is_taken_for_a_true_or_a_tempting_one() -> None:
    lexicon = Lexicon({"sea": [], "dog": [], "ocean": [], "wolf": []}, frozenset(), "rules")
    near = {("ocean", "sea"), ("wolf", "dog")}
    nouns = lexicon.nouns("Oceans, a wolf")
    assert nouns == ["ocean", "wolf"]
    covered, trapped, hallucinated = lexicon.sort_out(nouns, ["sea"], ["dog"], lambda *pair: pair in near)
    assert (covered, trapped, hallucinated) == ({0}, {0}, ["wolf"])
    assert lexicon.sort_out(nouns, ["sea"], ["dog"], lambda *pair: False) == (set(), set(), ["ocean", "wolf"])


def test_spacy_s_vectors_are_asked_for_at_the_published_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    likeness = {("ocean", "sea"): 0.81, ("wolf", "dog"): 0.8}
    module: Any = ModuleType("spacy")
    loaded: list[str] = []

    def load(name: str) -> Any:
        loaded.append(name)
        return lambda word: SimpleNamespace(word=word, similarity=lambda other: likeness[word, other.word])

    module.load = load
    monkeypatch.setitem(sys.modules, "spacy", module)
    amber._similar.cache_clear()
    similar = amber._similar("spacy")
    assert (similar("ocean", "sea"), similar("wolf", "dog"), loaded) == (True, False, ["en_core_web_lg"])
    amber._similar.cache_clear()
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(EvaluationError, match=r"'attn-hooks\[amber\]'; python -m spacy download en_core_web_lg"):
        amber._similar("spacy")


def test_nouns_are_tagged_by_nltk(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("nltk")
    module.word_tokenize = str.split
    module.pos_tag = lambda words: [(word, "VB" if word == "water" else "NNS") for word in words]
    module.stem = SimpleNamespace(
        WordNetLemmatizer=lambda: SimpleNamespace(lemmatize=lambda word, pos="n": word.removesuffix("s"))
    )
    monkeypatch.setitem(sys.modules, "nltk", module)
    assert Lexicon({"tree": ["water"]}, frozenset(), "nltk").nouns("water trees Trees rocks") == ["tree"]


def test_mmhal_fills_the_template(tmp_path: Path) -> None:
    task = image_task("mmhal", {"questions": mmhal_template(tmp_path)})
    asked = task.asked(0)
    assert [(question.image, question.prompt) for question in asked] == [
        ("aa.jpg", "What colour is dog aa?"),
        ("bb.jpg", "What colour is dog bb?"),
    ]
    (file,) = answer_files(task, tmp_path / "out", ["It is brown.", "Red"])
    filled = json.loads(file.read_text(encoding="utf-8"))
    template = json.loads(Path(mmhal_template(tmp_path)).read_text(encoding="utf-8"))
    assert filled == [template[0] | {"model_answer": "It is brown."}, template[1] | {"model_answer": "Red"}]
    metrics, notes = score_answers(task, [file])
    assert figures(metrics) == {("all", "length"): 2.0}
    assert "need the benchmark's judge" in notes[0]
    assert task.judge(asked[0], Reply("x", capped=True)).counts["capped"] == 1.0


def test_all_three_run_on_a_model(vision_folder: Path, tmp_path: Path) -> None:
    images = draw(tmp_path / "images", ["AMBER_1.jpg", "AMBER_2.jpg", "aa.jpg", "bb.jpg"])
    tasks = (
        {"task": "mme", "images": mme_folder(tmp_path / "mme"), "categories": ["existence", "count"], "new_tokens": 3},
        {"task": "amber", **amber_files(tmp_path / "amber"), "images": images, "new_tokens": 2, "caption_tokens": 5},
        {"task": "mmhal", "questions": mmhal_template(tmp_path), "images": images, "new_tokens": 4},
    )
    recipe = Recipe(
        name="tiny/three",
        model=str(vision_folder),
        dtype="float32",
        device="cpu",
        edits=({"method": "streaming", "window": 8},),
        tasks=tasks,
        batch_size=4,
    )
    results = run_recipe(recipe, tmp_path / "out", console=Console(quiet=True))
    metrics = {(metric["task"], metric["length"], metric["metric"]) for metric in results["metrics"]}
    assert {("mme", "all", "mme_score"), ("amber", "generative", "cog"), ("mmhal", "all", "length")} <= metrics
    for name in ("mme", "amber", "mmhal"):
        assert (tmp_path / "out" / f"figures_{name}.png").is_file()
    answers = tmp_path / "out" / "answers"
    written = json.loads((answers / "amber" / "edited" / "answers.json").read_text(encoding="utf-8"))
    assert [entry["id"] for entry in written] == [1, 2, 3, 4, 5, 6]
    scored, _ = score_answers(
        image_task("amber", amber_files(tmp_path / "amber")), [answers / "amber" / "edited" / "answers.json"]
    )
    ran = {
        (metric["length"], metric["metric"]): metric["edited"]
        for metric in results["metrics"]
        if metric["task"] == "amber"
    }
    assert all(metric["baseline"] == ran[metric["length"], metric["metric"]] for metric in scored)
