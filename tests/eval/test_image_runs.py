"""Whole runs with images on a tiny LLaVA with the real engine: batches, files, pairing, resume, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from transformers import Idefics3Processor
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

import attn_hooks
from attn_eval import runner
from attn_eval.answers import image_task, score_answers
from attn_eval.comparison import compare_results
from attn_eval.errors import EvaluationError
from attn_eval.generation import Answer, answer_questions, plan_questions
from attn_eval.image_prompts import ImagePrompts
from attn_eval.loading import load_vision_model
from attn_eval.recipe import GenerationSettings, Recipe
from attn_eval.run_log import load_results
from attn_eval.runner import run_recipe
from attn_eval.tasks.images import Picture, Question
from tests.eval.benchmarks import chair_files, draw, pope_files
from tests.hooks.test_vision_layout import byte_tokenizer
from tests.hooks.vlms import CASES

QUIET = Console(quiet=True)


@pytest.fixture
def recipe(vision_folder: Path, tmp_path: Path) -> Recipe:
    images = draw(tmp_path / "images", ["1.png", "2.png", *(f"COCO_val2014_{n:012d}.png" for n in (1, 2, 3))])
    tasks = (
        {"task": "pope", "questions": pope_files(tmp_path), "images": images, "new_tokens": 4},
        {"task": "chair", **chair_files(tmp_path), "images": images, "new_tokens": 6},
    )
    return Recipe(
        name="tiny/images",
        model=str(vision_folder),
        dtype="float32",
        device="cpu",
        edits=({"method": "streaming", "sinks": 1, "window": 8},),
        tasks=tasks,
        batch_size=2,
    )


def with_answers(monkeypatch: pytest.MonkeyPatch, answer: Any) -> list[str]:
    """Replace the model's answers by ``answer(question, edited)``; returns the list that the asked ids go to."""
    asked: list[str] = []

    def answers(model: Any, prompts: Any, questions: list[Question], images: Any, *rest: Any) -> list[Answer]:
        edited = bool(attn_hooks.edits_in_force(model))
        model(**prompts.encode([question.prompt for question in questions], images))
        asked.extend(question.id for question in questions)
        return [Answer(answer(question, edited), 3, 0.1, 0.2, 9, True, (-1.0, -2.0)) for question in questions]

    monkeypatch.setattr(runner, "answer_questions", answers)
    return asked


def oracle(question: Question, edited: bool = False) -> str:
    if question.task == "chair":
        return " ".join(question.truth)
    return question.truth[0].capitalize()


def test_a_run_with_images_writes_its_files(recipe: Recipe, tmp_path: Path) -> None:
    results = run_recipe(recipe, tmp_path / "out", console=QUIET, save_data=True)
    assert load_results(tmp_path / "out") == json.loads(json.dumps(results))
    assert len(results["samples"]) == 5 + 3
    pope = [sample for sample in results["samples"] if sample["label"] == "pope"]
    assert all(len(sample["baseline"]["first_token"]) == 2 for sample in pope)
    assert any(sample["baseline"]["first_token"] != sample["edited"]["first_token"] for sample in pope)
    assert {report["task"] for report in results["edit_reports"]} == {"pope", "chair"}
    assert all(edit["calls"] for report in results["edit_reports"] for edit in report["report"]["edits"])
    metrics = {(metric["task"], metric["length"], metric["metric"]) for metric in results["metrics"]}
    assert {("pope", "adversarial", "f1"), ("pope", "all", "accuracy"), ("chair", "all", "chair_i")} <= metrics
    assert ("chair", "all", "at_token_cap") in metrics
    written = sorted(
        str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()
    )
    assert written == sorted(
        ["data/chair.jsonl", "data/pope.jsonl", "figures_chair.png", "figures_pope.png", "reports.jsonl"]
        + ["results.json", "run.json", "samples.jsonl", "table.md"]
        + [f"answers/chair/{run}/captions.jsonl" for run in ("baseline", "edited")]
        + [
            f"answers/pope/{run}/{name}.jsonl"
            for run in ("baseline", "edited")
            for name in ("adversarial", "disagreements", "random")
        ]
    )
    page = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert "| pope | adversarial | f1 | 4 |" in page
    assert "published files" in page
    assert "5 questions asked once stand for 8 of the splits" in page


def test_an_oracle_is_right_an_edit_that_breaks_it_is_seen_and_its_answers_score_the_same(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_answers(monkeypatch, lambda question, edited: "A train" if edited else oracle(question))
    results = run_recipe(recipe, tmp_path / "out", console=QUIET)
    found = {(m["task"], m["length"], m["metric"]): m for m in results["metrics"]}
    accuracy = found["pope", "random", "accuracy"]
    assert (accuracy["baseline"], accuracy["edited"], accuracy["right_to_wrong"]) == (1.0, 0.5, 2)
    assert (found["chair", "all", "chair_s"]["baseline"], found["chair", "all", "chair_s"]["edited"]) == (0.0, 1.0)
    assert found["chair", "all", "f1"]["baseline"] == 1.0
    assert found["chair", "all", "at_token_cap"]["baseline"] == 1.0
    # Yes is the likelier first token throughout; the oracle says it to 2 of 4 questions.
    assert found["pope", "random", "first_token_agrees"]["baseline"] == 0.5

    folders = [tmp_path / "out" / "answers" / "pope" / run for run in ("baseline", "edited")]
    files = [[folder / f"{split}.jsonl" for split in ("random", "adversarial")] for folder in folders]
    scored, _ = score_answers(image_task("pope", {"questions": recipe.tasks[0]["questions"]}), *files)
    for metric in scored:
        if metric["metric"] != "first_token_agrees":
            assert metric == found["pope", metric["length"], metric["metric"]]
    unclear = (folders[0] / "disagreements.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["first_token"] for line in unclear] == ["yes"] * 3
    assert any("3 of 5 answers are read differently by others (first_token 3)" in note for note in results["notes"])


def test_a_killed_run_asks_only_what_is_missing(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(question: Question, edited: bool) -> str:
        if edited:
            raise KeyboardInterrupt
        return oracle(question)

    with_answers(monkeypatch, killed)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, tmp_path / "out", console=QUIET)
    asked = with_answers(monkeypatch, oracle)
    results = run_recipe(recipe, tmp_path / "out", console=QUIET)
    assert len(asked) == 5 + 3 + 3
    assert results["timing"]["samples_of_earlier_calls"] == 5
    # Other pixels under the same name are other data.
    Image.new("RGB", (20, 20), "red").save(tmp_path / "images" / "1.png")
    with pytest.raises(EvaluationError, match="differs in its data"):
        run_recipe(recipe, tmp_path / "out", console=QUIET)


def test_two_runs_are_compared_image_by_image(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_answers(monkeypatch, oracle)
    first = run_recipe(recipe, tmp_path / "first", console=QUIET)
    with_answers(monkeypatch, lambda question, edited: "No" if question.task == "pope" else "A bus")
    second = run_recipe(recipe.model_copy(update={"edits": ()}), tmp_path / "second", console=QUIET)
    entries = {(e["task"], e["length"], e["metric"]): e for e in compare_results(first, second)}
    recall = entries["pope", "all", "recall"]
    assert recall["paired"] and (recall["first"], recall["second"], recall["difference"]) == (1.0, 0.0, -1.0)
    flips = entries["chair", "all", "chair_s"]
    assert (flips["right_to_wrong"], flips["wrong_to_right"]) == (3, 0)
    # All three images go one way.
    assert flips["bootstrap_p"] == pytest.approx(2 / 10_001)
    other_data = run_recipe(recipe, tmp_path / "third", console=QUIET, limit=1)
    entries = {(e["task"], e["length"], e["metric"]): e for e in compare_results(first, other_data)}
    assert not entries["pope", "all", "recall"]["paired"]


@pytest.fixture(scope="module")
def vision(vision_folder: Path) -> tuple[Any, ImagePrompts]:
    model, processor = load_vision_model(str(vision_folder), "float32", "cpu")
    return model, ImagePrompts(processor)


def questions_of(count: int) -> tuple[list[Question], list[Any]]:
    prompts = ["What?", "Is there a dog in the image?", "Describe this image.", "Count."]
    asked = [
        Question(f"q{n}", "chair", text, text, f"{n}.png", (), (("all", str(n)),), 6)
        for n, text in enumerate(prompts[:count])
    ]
    return asked, [Image.new("RGB", (20 + 8 * n, 20), (60 * n, 10, 200)) for n in range(count)]


def test_batches_do_not_change_greedy_answers(vision: tuple[Any, ImagePrompts]) -> None:
    model, prompts = vision
    questions, images = questions_of(4)
    choices = prompts.first_tokens(("yes", "no"))
    settings = GenerationSettings()
    together = answer_questions(model, prompts, questions, images, settings, 0, choices)
    for question, image, answer in zip(questions, images, together, strict=True):
        (alone,) = answer_questions(model, prompts, [question], [image], settings, 0, choices)
        assert (answer.text, answer.prompt_tokens) == (alone.text, alone.prompt_tokens)
        assert answer.first_token == pytest.approx(alone.first_token, abs=1e-4)
    assert len({answer.text for answer in together}) > 1


def test_images_in_crops_of_different_number_make_one_batch() -> None:
    """Idefics3, whose processor wants images prompt by prompt and pads their crops."""
    tokenizer = byte_tokenizer(
        *("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"),
        *(f"<row_{row + 1}_col_{column + 1}>" for row in range(6) for column in range(6)),
    )
    resize = {"size": {"longest_edge": 48}, "max_image_size": {"longest_edge": 16}}
    processor = Idefics3Processor(Idefics3ImageProcessorPil(**resize), tokenizer, image_seq_len=4)
    config = CASES["idefics3"].config | {"image_token_id": tokenizer.convert_tokens_to_ids("<image>")}
    config["text_config"] = config["text_config"] | {"vocab_size": len(tokenizer)}
    model = replace(CASES["idefics3"], config=config).model()
    prompts = ImagePrompts(processor, "{image} {question}")
    questions, _ = questions_of(2)
    images = [Image.new("RGB", (48, 20), "teal"), Image.new("RGB", (48, 48), "olive")]
    together = answer_questions(model, prompts, questions, images, GenerationSettings(), 0)
    for question, image, answer in zip(questions, images, together, strict=True):
        (alone,) = answer_questions(model, prompts, [question], [image], GenerationSettings(), 0)
        assert (answer.text, answer.prompt_tokens) == (alone.text, alone.prompt_tokens)
    assert together[0].prompt_tokens != together[1].prompt_tokens


def test_the_first_token_s_log_probabilities_are_the_models(vision: tuple[Any, ImagePrompts]) -> None:
    model, prompts = vision
    questions, images = questions_of(1)
    (answer,) = answer_questions(model, prompts, questions, images, GenerationSettings(), 0, [[10, 11], [12]])
    with torch.inference_mode():
        last = model(**prompts.encode([questions[0].prompt], images)).logits[0, -1].softmax(-1)
    assert answer.first_token is not None
    assert answer.first_token == pytest.approx([float(last[[10, 11]].sum().log()), float(last[12].log())], abs=1e-4)


def test_beams_are_those_of_generate(vision: tuple[Any, ImagePrompts]) -> None:
    model, prompts = vision
    questions, images = questions_of(3)
    choices = prompts.first_tokens(("yes", "no"))
    greedy, beams = (
        answer_questions(model, prompts, questions, images, GenerationSettings(num_beams=number), 0, choices)
        for number in (1, 3)
    )
    inputs = prompts.encode([question.prompt for question in questions], images)
    with torch.inference_mode():
        made = model.generate(**inputs, max_new_tokens=6, do_sample=False, num_beams=3)
    texts = prompts.tokenizer.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert [answer.text for answer in beams] == texts != [answer.text for answer in greedy]
    for one, other in zip(greedy, beams, strict=True):
        assert other.first_token == pytest.approx(one.first_token, abs=1e-4)


def test_a_run_says_that_it_had_beams(recipe: Recipe, tmp_path: Path) -> None:
    searched = recipe.model_copy(update={"generation": GenerationSettings(num_beams=2), "edits": ()})
    results = run_recipe(searched, tmp_path / "out", console=QUIET, limit=1)
    assert results["recipe"]["generation"]["num_beams"] == 2
    assert "- Seed 42, beams of 2, batch 2" in (tmp_path / "out" / "table.md").read_text(encoding="utf-8")


def test_an_answer_is_capped_unless_it_ends(vision: tuple[Any, ImagePrompts]) -> None:
    model, prompts = vision
    questions, images = questions_of(1)
    (answer,) = answer_questions(model, prompts, questions, images, GenerationSettings(), 0)
    assert (answer.new_tokens, answer.capped) == (6, True)
    ids = prompts.tokenizer.encode(answer.text, add_special_tokens=False)
    before = model.generation_config.eos_token_id
    try:
        model.generation_config.eos_token_id = ids[-1]
        (ended,) = answer_questions(model, prompts, questions, images, GenerationSettings(), 0)
    finally:
        model.generation_config.eos_token_id = before
    assert not ended.capped


def test_prompts_hold_one_bos_and_all_image_tokens(vision_folder: Path, vision: tuple[Any, ImagePrompts]) -> None:
    _, prompts = vision
    tokenizer = prompts.tokenizer
    inputs = prompts.encode(["Hm?", "And here?"], questions_of(2)[1])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    assert [int((row == tokenizer.bos_token_id).sum()) for row in ids] == [1, 1]
    assert [int((row == image_token).sum()) for row in ids] == [16, 16]
    assert mask[0].tolist() == [0] * 6 + [1] * (ids.shape[1] - 6)
    assert prompts.text("Hm?") == "<bos><image>Hm? A:"
    own = ImagePrompts(prompts.processor, "USER: {image}\n{question} ASSISTANT:")
    assert own.text("Hm?") == "USER: <image>\nHm? ASSISTANT:"


def test_what_cannot_be_asked_is_one_line(recipe: Recipe, model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="takes no images, and the recipe has tasks with images"):
        run_recipe(recipe.model_copy(update={"model": str(model_folder)}), tmp_path / "out", console=QUIET)
    with pytest.raises(EvaluationError, match="in the folder"):
        changed = ({**recipe.tasks[0], "images": str(tmp_path / "nowhere")},)
        run_recipe(recipe.model_copy(update={"tasks": changed}), tmp_path / "out", console=QUIET)
    assert not (tmp_path / "out").exists()


def test_a_processor_without_a_template_needs_one(vision: tuple[Any, ImagePrompts]) -> None:
    processor = vision[1].processor
    template = processor.chat_template
    try:
        processor.chat_template = None
        with pytest.raises(EvaluationError, match=r"set generation\.image_prompt"):
            ImagePrompts(processor)
        assert ImagePrompts(processor, "{image}{question}").text("Hm?") == "<image>Hm?"
    finally:
        processor.chat_template = template
    with pytest.raises(EvaluationError, match="takes no images with a text"):
        ImagePrompts(processor.tokenizer)


def test_first_tokens_that_yes_and_no_share_are_left_out(vision: tuple[Any, ImagePrompts]) -> None:
    prompts = vision[1]
    tokenizer = prompts.tokenizer
    # One token a byte: a word with a space before it begins with the space, which says nothing.
    found = [sorted(tokenizer.decode([token]) for token in tokens) for tokens in prompts.first_tokens(("yes", "no"))]
    assert found == [["Y", "y"], ["N", "n"]]
    with pytest.raises(EvaluationError, match="begins yes and yard with one token"):
        prompts.first_tokens(("yes", "yard"))


def test_batches_hold_images_of_one_size() -> None:
    questions, _ = questions_of(4)
    sized = [replace(q, picture=Picture("", 20 + 10 * (n % 2), 20)) for n, q in enumerate(questions)]
    batches = plan_questions(sized, 2)
    assert [[question.id for question in batch] for batch in batches] == [["q1", "q3"], ["q2", "q0"]]
    assert plan_questions(list(reversed(sized)), 2) == batches
