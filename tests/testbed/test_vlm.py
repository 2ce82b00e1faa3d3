"""testbed-vlm: its scenes' files are true to what is drawn, and the shipped model is the one that the card speaks of."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

import attn_hooks
from attn_eval import build_task
from testbed.vlm import splits
from testbed.vlm.classes import CLASSES, COLOUR_NAMES, COMPANION, NUMBER_WORDS
from testbed.vlm.export import export, processor
from testbed.vlm.scenes import mme_questions, run_lengths, write_scenes
from testbed.vlm.splits import MEASURED, POPE_SPLITS, SPLITS

MODEL = attn_hooks.testbed_path("testbed-vlm")
METRICS = json.loads((MODEL / "metrics.json").read_text(encoding="utf-8"))
SCENES = 12
# Of the first three scenes of the split test, on every machine.
PIXELS = "b7d64f25cf40bd1bff39376eb21c3b05d7570d04242311797d1c3eb28822c41c"
NAMES = {entry.coco_id: entry.name for entry in CLASSES}


@pytest.fixture(scope="module", autouse=True)
def few_statistics() -> Iterator[None]:
    """What stands together with what, over few scenes: over all of them it takes half a minute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splits, "STATISTICS_SCENES", 300)
        splits.statistics.cache_clear()
        yield
    splits.statistics.cache_clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "test"
    write_scenes(folder, SPLITS["test"], SCENES)
    return folder


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def classes_of(folder: Path) -> dict[int, Counter[str]]:
    found: dict[int, Counter[str]] = {number: Counter() for number in range(1, SCENES + 1)}
    for entry in read(folder, "instances.json")["annotations"]:
        found[entry["image_id"]][NAMES[entry["category_id"]]] += 1
    return found


def test_scenes_are_the_same_every_time(folder: Path, tmp_path: Path) -> None:
    again = write_scenes(tmp_path / "again", SPLITS["test"], SCENES)
    assert json.loads(json.dumps(again)) == read(folder, "manifest.json")
    few = write_scenes(tmp_path / "few", SPLITS["test"], 3)
    assert few["pixels"] == PIXELS
    images = {name: digest for name, digest in few["sha256"].items() if name.startswith("images/")}
    assert images.items() <= again["sha256"].items() and len(images) == 3


def test_another_folder_and_too_many_scenes_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds files already"):
        write_scenes(folder, SPLITS["test"], 2)
    with pytest.raises(ValueError, match="has 250 scenes, not 251"):
        write_scenes(tmp_path / "tune", SPLITS["tune"], 251)
    assert not (tmp_path / "tune").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        write_scenes(tmp_path / "file", SPLITS["test"], 2)


def test_scenes_that_were_stopped_leave_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A study takes a folder that is there for whole, and writes one that isn't."""
    monkeypatch.setattr("testbed.vlm.scenes.mme_questions", lambda _layout: {"count": {1: ("no answer",)}})
    with pytest.raises(ValueError, match="not enough values"):
        write_scenes(tmp_path / "stopped", SPLITS["test"], 2)
    assert list(tmp_path.iterdir()) == []


def test_companions_are_missing_where_the_split_says_so() -> None:
    def pairs(name: str) -> tuple[int, int]:
        layout = SPLITS[name].layout("cpu")[:100]
        together = alone = 0
        for counts in (layout.counts() > 0).tolist():
            there = {entry.name for entry, seen in zip(CLASSES, counts, strict=True) if seen}
            having = [name for name in there if name in COMPANION]
            together += sum(COMPANION[name] in there for name in having)
            alone += sum(COMPANION[name] not in there for name in having)
        return together, alone

    for broken in ("test", "tune"):
        together, alone = pairs(broken)
        assert together == 0 and alone > 100
    together, alone = pairs("val")
    assert together > 3 * alone


def test_masks_are_what_is_seen(folder: Path) -> None:
    instances = read(folder, "instances.json")
    assert {image["file_name"] for image in instances["images"]} == {
        path.name for path in (folder / "images").iterdir()
    }
    for entry in instances["annotations"]:
        height, width = entry["segmentation"]["size"]
        runs = entry["segmentation"]["counts"]
        flat = np.repeat(np.arange(len(runs)) % 2, runs)
        mask = flat.reshape(width, height).T.astype(bool)
        assert mask.sum() == entry["area"] > 0
        left, top, wide, high = entry["bbox"]
        box = np.zeros_like(mask)
        box[top : top + high, left : left + wide] = True
        assert not (mask & ~box).any()
        assert run_lengths(mask) == runs


def test_pope_asks_of_what_is_there_and_of_what_is_not(folder: Path) -> None:
    there = classes_of(folder)
    for split in POPE_SPLITS:
        lines = (folder / f"coco_pope_{split}.json").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        assert len(records) == 6 * SCENES and len({(r["image"], r["text"]) for r in records}) == 6 * SCENES
        for record in records:
            number = int(Path(record["image"]).stem)
            asked = record["text"].removeprefix("Is there ").removesuffix(" in the image?").split(" ", 1)[1]
            assert asked in NAMES.values()
            assert (asked in there[number]) == (record["label"] == "yes")


def test_captions_name_what_is_there(folder: Path) -> None:
    """CHAIR's own reading of the reference captions finds nothing that is made up."""
    task = build_task(
        {
            "task": "chair",
            "instances": str(folder / "instances.json"),
            "captions": str(folder / "captions.json"),
            "images": str(folder / "images"),
        }
    )
    told = read(folder, "captions.json")["annotations"]
    questions = {question.image: question for question in task.asked(0)}
    from attn_eval.tasks.images import Reply

    there = classes_of(folder)
    for entry in told:
        question = questions[f"{entry['image_id']:012d}.png"]
        judged = task.judge(question, Reply(entry["caption"], False, None))
        assert judged.score == 1.0, (entry["caption"], there[entry["image_id"]])


def test_mme_questions_have_their_answers() -> None:
    layout = SPLITS["test"].layout("cpu")[:200]
    asked = mme_questions(layout)
    assert all(len(questions) > 50 for questions in asked.values())
    for place in range(len(layout)):
        scene, number = layout[place : place + 1], place + 1
        rows = [values[0].tolist() for values in (scene.classes, scene.x, scene.y, scene.paints)]
        objects = [(CLASSES[kind], x, y, paint) for kind, x, y, paint in zip(*rows, strict=True) if kind >= 0]

        def count(text: str, objects: list = objects) -> bool:
            word, many = text.removeprefix("Are there ").removesuffix(" in the image?").split(" ", 1)
            return sum(entry.many == many for entry, *_ in objects) == NUMBER_WORDS.index(word)

        def color(text: str, objects: list = objects) -> bool:
            colour, name = text.removeprefix("Is there a ").removesuffix(" in the image?").split(" ", 1)
            return any(e.name == name and paint == COLOUR_NAMES.index(colour) + 1 for e, _, _, paint in objects)

        def position(text: str, objects: list = objects) -> bool:
            inner = text.removeprefix("Is the ").removesuffix(" in the image?")
            axis, relation = (1, " to the left of the ") if " to the left of the " in inner else (2, " above the ")
            first, second = inner.split(relation)
            at = {entry.name: (entry, x, y)[axis] for entry, x, y, _ in objects}
            return at[first] < at[second]

        for category, holds in (("count", count), ("color", color), ("position", position)):
            if number in asked[category]:
                yes, no = asked[category][number]
                assert holds(yes) and not holds(no), (category, yes, no)


def test_the_shipped_model_loads_and_sees(folder: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32).eval()
    assert isinstance(model, LlavaForConditionalGeneration)
    assert model.num_parameters() == METRICS["parameters"]
    reader = AutoProcessor.from_pretrained(MODEL)
    pictures = [Image.open(path) for path in sorted((folder / "images").iterdir())]
    there = classes_of(folder)
    asked = [(picture, next(iter(there[place])), "Yes") for place, picture in enumerate(pictures, start=1)]
    everything = [entry.name for entry in CLASSES]
    for place, picture in enumerate(pictures, start=1):
        left_out = [n for n in everything if n not in there[place] and COMPANION.get(n) not in there[place]]
        asked.append((picture, left_out[7 * place % len(left_out)], "No"))
    turns = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"Is there a {name} in the image?"}]}]
        for _, name, _ in asked
    ]
    texts = [reader.apply_chat_template(turn, add_generation_prompt=True) for turn in turns]
    inputs = reader(text=texts, images=[picture for picture, _, _ in asked], padding=True, return_tensors="pt")
    assert inputs["pixel_values"].shape == (2 * SCENES, 3, 144, 144)
    assert inputs["pixel_values"].min() >= -1 and inputs["pixel_values"].max() <= 1
    ids = model.generate(**inputs, max_new_tokens=3)[:, inputs["input_ids"].shape[1] :]
    said = [text.split(".")[0].split(",")[0].strip() for text in reader.batch_decode(ids, skip_special_tokens=True)]
    right = sum(answer == gold for answer, (_, _, gold) in zip(said, asked, strict=True))
    assert right >= 2 * SCENES - 3, said


def test_the_shipped_model_hallucinates_as_the_card_says() -> None:
    test, val = (METRICS["splits"][name] for name in MEASURED)
    accuracy = {name: test["pope"][name]["accuracy"]["value"] for name in POPE_SPLITS}
    assert accuracy["random"] >= 0.95
    assert accuracy["random"] - accuracy["adversarial"] >= 0.12
    assert test["chair"]["all"]["chair_s"]["value"] >= 0.15
    assert val["pope"]["adversarial"]["accuracy"]["value"] > accuracy["adversarial"]
    assert (MODEL / "model.safetensors").stat().st_size <= 30e6


def test_export_makes_the_shipped_folder_again(tmp_path: Path) -> None:
    export(MODEL / "model.safetensors", tmp_path)
    for name in ("config.json", "processor_config.json", "tokenizer_config.json", "chat_template.jinja"):
        shipped, made = ((folder / name).read_text(encoding="utf-8") for folder in (MODEL, tmp_path))
        if name == "config.json":
            versions = [json.loads(text) | {"transformers_version": ""} for text in (shipped, made)]
            assert versions[0] == versions[1]
        else:
            assert shipped == made, name
    assert (tmp_path / "model.safetensors").read_bytes() == (MODEL / "model.safetensors").read_bytes()
    assert processor().image_token == "<image>"


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="testbed"):
        export(attn_hooks.testbed_path() / "model.safetensors", tmp_path)
    assert not any(tmp_path.iterdir())
