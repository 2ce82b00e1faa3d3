"""Write held-out scenes as files that evaluations read: pictures, COCO's annotations, POPE's and MME's questions.

    python -m testbed.vlm.scenes --out out/vlm_test --split test
    python -m testbed.vlm.scenes --out out/vlm_val --split val --scenes 100

``test`` and ``tune`` have every object's companion missing, ``val`` is as the training scenes are. The folder holds

| file | what |
|---|---|
| `images/000000000001.png` | scene 1; the number is COCO's image id |
| `instances.json`, `captions.json` | COCO's annotations: masks of what is seen of an object, and five captions a scene |
| `coco_pope_random.json`, `..._popular.json`, `..._adversarial.json` | POPE's lines: six questions a scene |
| `mme/count`, `mme/position`, `mme/color` | MME's folders: two questions a scene where they can be asked |
| `manifest.json` | seed, versions, and the SHA-256 of every file |

A split, a number of scenes and this code give the same questions and pixels on every machine. The bytes of a PNG may
differ with another Pillow; ``pixels`` in the manifest is over the pixels themselves.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from rich.progress import track
from torch import Tensor

from testbed.vlm.classes import CLASSES, COLOUR_NAMES, NUMBER_WORDS
from testbed.vlm.draws import Draws
from testbed.vlm.layout import IMAGE_SIZE, Layout
from testbed.vlm.render import Renderer
from testbed.vlm.splits import DIFFICULTY, POPE_SPLITS, SPLITS, Split, pope_classes
from testbed.vlm.text import MOST, POPE_QUESTION, Writer

FORMAT = 1
REFERENCES = 5
SHORT_REFERENCES = 2
CHUNK = 50
MME_SUFFIX = " Please answer yes or no."
# As far apart as the training's questions about places have two objects, in half pixels.
CLEARLY_APART = IMAGE_SIZE // 5


def image_name(number: int) -> str:
    return f"{number:012d}.png"


def run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed run-length code of a ``(H, W)`` bool mask: column by column, the first run is of zeros."""
    return [sum(1 for _ in run) for value, run in _runs(mask.T.ravel().tolist())]


def _runs(values: Sequence[bool]) -> Iterator[tuple[bool, Iterator[bool]]]:
    if values[0]:
        yield False, iter(())
    yield from groupby(values)


def annotation(number: int, image: int, kind: int, mask: np.ndarray) -> dict[str, Any]:
    """COCO's entry of one object.

    Args:
        number: its id, from 1.
        image: the image's id.
        kind: index into CLASSES.
        mask: where it is seen, ``(H, W)`` bool, not empty.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    left, top = int(columns[0]), int(rows[0])
    return {
        "id": number, "image_id": image, "category_id": CLASSES[kind].coco_id, "iscrowd": 0, "area": int(mask.sum()),
        "bbox": [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1],
        "segmentation": {"size": list(mask.shape), "counts": run_lengths(mask)},
    }  # fmt: skip


def pope_records(layout: Layout, split: str) -> list[dict[str, Any]]:
    """POPE's questions in the published form, numbered from 1."""
    records = []
    for scene, kinds in enumerate(pope_classes(layout, split).tolist(), start=1):
        for place, kind in enumerate(kinds):
            records.append(
                {
                    "question_id": len(records) + 1,
                    "image": image_name(scene),
                    "text": POPE_QUESTION.format(CLASSES[kind].article),
                    "label": "no" if place % 2 else "yes",
                }
            )
    return records


def mme_questions(layout: Layout) -> dict[str, dict[int, tuple[str, str]]]:
    """Category, scene's number, and the question whose answer is yes and the one whose answer is no."""
    draws = Draws(layout.keys)
    wrong_numbers = draws.below("mme number", 1, MOST - 2)[:, 0].tolist()
    wrong_colours = draws.below("mme colour", 1, len(COLOUR_NAMES) - 1)[:, 0].tolist()
    found: dict[str, dict[int, tuple[str, str]]] = {"count": {}, "position": {}, "color": {}}
    for place in range(len(layout)):
        number, scene = place + 1, layout[place : place + 1]
        counts = scene.counts()[0].tolist()
        rows = [values[0].tolist() for values in (scene.classes, scene.x, scene.y, scene.paints)]
        objects = [row for row in zip(*rows, strict=True) if row[0] >= 0]

        several = [kind for kind, count in enumerate(counts) if count > 1]
        if several:
            many, right = CLASSES[several[0]].many, counts[several[0]]
            others = [count for count in range(2, MOST + 1) if count != right]
            asked = (right, others[wrong_numbers[place]])
            found["count"][number] = _both(f"Are there {NUMBER_WORDS[n]} {many} in the image?" for n in asked)

        painted = [row for row in objects if row[3] > 0]
        if painted:
            name, paint = CLASSES[painted[0][0]].name, painted[0][3] - 1
            asked = (paint, (paint + 1 + wrong_colours[place]) % len(COLOUR_NAMES))
            found["color"][number] = _both(f"Is there a {COLOUR_NAMES[n]} {name} in the image?" for n in asked)

        alone = [row for row in objects if counts[row[0]] == 1]
        # Left and above in turn, so that both are asked.
        axis, relation = ((1, "to the left of"), (2, "above"))[number % 2]
        pairs = [(a, b) for a in alone for b in alone if b[axis] - a[axis] >= CLEARLY_APART]
        if pairs:
            first, second = (CLASSES[row[0]].name for row in pairs[0])
            asked_pairs = ((first, second), (second, first))
            found["position"][number] = _both(f"Is the {a} {relation} the {b} in the image?" for a, b in asked_pairs)
    return found


def _both(questions: Iterator[str]) -> tuple[str, str]:
    yes, no = questions
    return yes, no


def write_scenes(out: Path, split: Split, scenes: int) -> dict[str, Any]:
    """Write a split's first scenes: all of the folder or, if it is stopped, none.

    Args:
        out: the folder, made if it isn't there.
        split: one of SPLITS.
        scenes: how many, at most the split's.

    Returns:
        The manifest.

    Raises:
        ValueError: more scenes than the split has, or a folder that holds files already.
    """
    if not 0 < scenes <= split.scenes:
        raise ValueError(
            f"the split {split.name} has {split.scenes} scenes, not {scenes}: give --scenes 1 to {split.scenes}"
        )
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give --out a new folder")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} holds files already: give --out a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f"{out.name}_unfinished_", dir=out.parent) as unfinished:
        manifest = _write_all(Path(unfinished) / out.name, split, scenes)
        (Path(unfinished) / out.name).rename(out)
    return manifest


def _write_all(out: Path, split: Split, scenes: int) -> dict[str, Any]:
    from PIL import Image

    layout = split.layout("cpu")[:scenes]
    renderer, writer = Renderer("cpu", DIFFICULTY), Writer("cpu")
    files: list[Path] = []
    pixels = hashlib.sha256()

    def save_text(name: str, text: str) -> None:
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        files.append(path)

    def save_picture(path: Path, picture: Tensor) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()).save(path)
        files.append(path)

    mme = mme_questions(layout)
    annotations: list[dict[str, Any]] = []
    for start in track(range(0, scenes, CHUNK), description=f"drawing {scenes} scenes", transient=True):
        part = layout[start : start + CHUNK]
        pictures, (seen, _) = renderer(part), renderer.visible(part)
        pixels.update(pictures.numpy().tobytes())
        for place, picture in enumerate(pictures):
            number = start + place + 1
            save_picture(out / "images" / image_name(number), picture)
            for category, questions in mme.items():
                if number in questions:
                    save_picture(out / "mme" / category / image_name(number), picture)
            for kind, mask in zip(part.classes[place].tolist(), seen[place].numpy(), strict=True):
                if kind >= 0:
                    annotations.append(annotation(len(annotations) + 1, number, kind, mask))

    references = [
        writer.caption(layout, f"reference {place}", short=place >= REFERENCES - SHORT_REFERENCES).strings()
        for place in range(REFERENCES)
    ]
    captions = [(scene, rows[scene - 1][1]) for scene in range(1, scenes + 1) for rows in references]
    images = [
        {"id": number, "file_name": image_name(number), "width": IMAGE_SIZE, "height": IMAGE_SIZE}
        for number in range(1, scenes + 1)
    ]
    info = {"description": f"testbed-vlm, split {split.name}", "version": str(FORMAT)}
    categories = [{"id": entry.coco_id, "name": entry.name} for entry in CLASSES]
    instances = {"info": info, "images": images, "categories": categories, "annotations": annotations}
    told = [{"id": place, "image_id": scene, "caption": text} for place, (scene, text) in enumerate(captions, start=1)]
    save_text("instances.json", json.dumps(instances) + "\n")
    save_text("captions.json", json.dumps({"info": info, "images": images, "annotations": told}) + "\n")
    for name in POPE_SPLITS:
        lines = [json.dumps(record) + "\n" for record in pope_records(layout, name)]
        save_text(f"coco_pope_{name}.json", "".join(lines))
    for category, questions in mme.items():
        for number, (yes, no) in questions.items():
            lines = [f"{yes}{MME_SUFFIX}\tYes\n", f"{no}{MME_SUFFIX}\tNo\n"]
            save_text(f"mme/{category}/{Path(image_name(number)).stem}.txt", "".join(lines))
    manifest = _manifest(split, scenes, pixels.hexdigest(), {str(path.relative_to(out)): path for path in files})
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def _manifest(split: Split, scenes: int, pixels: str, files: Mapping[str, Path]) -> dict[str, Any]:
    return {
        "format": FORMAT, "split": split.name, "seed": split.seed, "companions_missing": split.broken, "scenes": scenes,
        "difficulty": asdict(DIFFICULTY), "pixels": pixels,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("torch", "numpy", "pillow")},
        "sha256": {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in sorted(files.items())},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--split", choices=SPLITS, required=True)
    parser.add_argument("--scenes", type=int, help="the first so many; all by default")
    given = parser.parse_args()
    split = SPLITS[given.split]
    try:
        manifest = write_scenes(given.out, split, split.scenes if given.scenes is None else given.scenes)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(
        f"{manifest['scenes']} scenes, {len(manifest['sha256'])} files in {given.out}, pixels {manifest['pixels'][:16]}"
    )


if __name__ == "__main__":
    main()
