"""Hand-made benchmarks in the published file formats: small enough to count by hand."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image


def write_json(path: Path, content: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def write_lines(path: Path, records: Iterable[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def draw(folder: Path, names: Sequence[str]) -> str:
    """One plain picture each, in a colour and a size of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20 + 4 * (number % 2), 20), (40 * number % 256, 90, 200 - 30 * number % 200)).save(path)
    return str(folder)


def pope_files(folder: Path) -> list[str]:
    """Two images; 2 questions with the answer yes in both splits, one no in both, one no in each alone."""
    shared = [("1.png", "dog", "yes"), ("2.png", "cat", "yes"), ("1.png", "bus", "no")]
    alone = {"random": ("2.png", "oven", "no"), "adversarial": ("2.png", "sink", "no")}
    files = []
    for split, last in alone.items():
        records = [
            {"question_id": number, "image": image, "text": f"Is there a {thing} in the image?", "label": label}
            for number, (image, thing, label) in enumerate([*shared, last], start=1)
        ]
        files.append(str(write_lines(folder / f"coco_pope_{split}.json", records)))
    return files


def chair_files(folder: Path) -> dict[str, str]:
    """Three images of a dog and a person, a cat, and nothing; a reference caption adds a couch to the second."""
    images = [{"id": number, "file_name": f"COCO_val2014_{number:012d}.png"} for number in (1, 2, 3)]
    categories = [{"id": number, "name": name} for number, name in ((1, "person"), (17, "cat"), (18, "dog"))]
    masks = [{"image_id": image, "category_id": category} for image, category in ((1, 18), (1, 1), (1, 1), (2, 17))]
    captions = [
        {"image_id": 1, "caption": "A woman walks her puppy."},
        {"image_id": 2, "caption": "A cat sleeps on the sofa."},
        {"image_id": 9, "caption": "A train, of an image without masks."},
    ]
    instances = {"images": images, "categories": categories, "annotations": masks}
    return {
        "instances": write_json(folder / "instances_val2014.json", instances),
        "captions": write_json(folder / "captions_val2014.json", {"annotations": captions}),
    }


def mme_folder(folder: Path) -> str:
    """Two images of existence and one of count, the latter in folders of their own as some categories have them."""
    for image, thing in (("a", "dog"), ("b", "cat")):
        lines = f"Is there a {thing} in this image? Please answer yes or no.\tYes\n"
        lines += "Is there a bus in this image? Please answer yes or no.\tNo\n"
        draw(folder / "existence", [f"{image}.png"])
        (folder / "existence" / f"{image}.txt").write_text(lines, encoding="utf-8")
    draw(folder / "count" / "images", ["c.png"])
    texts = folder / "count" / "questions_answers_YN"
    texts.mkdir(parents=True, exist_ok=True)
    counted = "Are there two cups? Please answer yes or no.\tYes\nAre there three cups? Please answer yes or no.\tNo\n"
    (texts / "c.txt").write_text(counted, encoding="utf-8")
    return str(folder)


def amber_files(folder: Path) -> dict[str, str]:
    """Two descriptions, and of the first image a question of each kind."""
    asked = {
        3: ("discriminative-hallucination", "no"),
        4: ("discriminative-attribute-state", "yes"),
        5: ("discriminative-relation", "yes"),
        6: ("relation", "no"),
    }
    queries = [{"id": n, "image": f"AMBER_{n}.jpg", "query": "Describe this image."} for n in (1, 2)]
    queries += [{"id": n, "image": "AMBER_1.jpg", "query": f"Is it so, {n}?"} for n in asked]
    annotations: list[dict[str, Any]] = [
        {"id": 1, "type": "generative", "truth": ["man", "person", "tree"], "hallu": ["dog", "bench"]},
        {"id": 2, "type": "generative", "truth": ["sea"], "hallu": ["ship"]},
        *({"id": n, "type": kind, "truth": truth} for n, (kind, truth) in asked.items()),
    ]
    associations = {
        "person": ["man", "people"],
        "man": ["person"],
        "tree": ["forest"],
        "dog": ["puppy"],
        "bench": [],
        "sea": ["water"],
        "ship": ["boat"],
    }
    (folder / "safe_words.txt").parent.mkdir(parents=True, exist_ok=True)
    (folder / "safe_words.txt").write_text("light\nbench\n", encoding="utf-8")
    return {
        "questions": write_json(folder / "query_all.json", queries),
        "annotations": write_json(folder / "annotations.json", annotations),
        "associations": write_json(folder / "relation.json", associations),
        "safe_words": str(folder / "safe_words.txt"),
    }


def mmhal_template(folder: Path) -> str:
    entries = [
        {
            "question_type": "attribute",
            "question_topic": "animal",
            "image_id": name,
            "image_src": f"https://images.example/6/{name}.jpg",
            "image_content": ["dog"],
            "question": f"What colour is dog {name}?",
            "gt_answer": "Brown.",
            "model_answer": "",
        }
        for name in ("aa", "bb")
    ]
    return write_json(folder / "response_template.json", entries)
