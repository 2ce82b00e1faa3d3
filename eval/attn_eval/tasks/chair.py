"""CHAIR, hallucinated objects in captions (arXiv 1809.02156), with what it must be read beside: recall and length."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from pydantic import PositiveInt

from attn_eval.caption_objects import PUBLISHED_SYNONYMS, ObjectNames, WordRules, object_names
from attn_eval.errors import EvaluationError
from attn_eval.tasks.images import (
    ALL_PARTS,
    Figures,
    ImageTask,
    Judgement,
    Question,
    Reply,
    Totals,
    need,
    number_in,
    read_json,
    read_records,
    share,
    to_lines,
)

Files = tuple[str, ...]


class Scene(NamedTuple):
    """An annotated image: its id, its file, and the classes that are in it."""

    image_id: int
    file: str
    objects: frozenset[str]


class ChairTask(ImageTask):
    """Share of captions (CHAIR_S) and of mentions (CHAIR_I) that are hallucinated, recall, precision and F1 of objects,
    words a caption, distinct-2 (mean over captions), and the share of captions cut at the token limit.

    An object is there if it has an instance mask or a reference caption names it.

    Attributes:
        instances: COCO's ``instances_*.json``, one or more.
        captions: COCO's ``captions_*.json``, one or more; without them only the masks count.
        questions: which images: lines of JSON with ``image`` (a file name) or ``image_id``. None: all with annotations.
        synonyms: ``chair``, the published list, or a file of that form.
        words: ``rules`` or ``nltk``, see `attn_eval.caption_objects.ObjectNames`.
        prompt: what the model is asked.
    """

    version: ClassVar[int] = 1
    plain_figures: ClassVar[frozenset[str]] = frozenset({"length"})
    flip_figures: ClassVar[frozenset[str]] = frozenset({"chair_s"})
    reads_datasets: ClassVar[bool] = False

    instances: Files | str = ()
    captions: Files | str = ()
    synonyms: str = PUBLISHED_SYNONYMS
    words: WordRules = "rules"
    prompt: str = "Please describe this image in detail."
    new_tokens: PositiveInt = 512

    def asked(self, seed: int) -> list[Question]:
        scenes = self._scenes()
        wanted = self._wanted() or sorted(scenes)
        missing = [image for image in wanted if image not in scenes]
        if missing:
            raise EvaluationError(
                f"{self.name}: {len(missing)} of {len(wanted)} images are not in the annotations, the first is {missing[0]}"
            )
        chosen = self.sampled([str(image) for image in wanted], seed)
        return [self._question(scenes[int(image)]) for image in chosen]

    def judge(self, question: Question, reply: Reply) -> Judgement:
        named = self._names().mentions(reply.text)
        true = set(question.truth)
        hallucinated = [name for name in named.objects if name not in true]
        counts = {
            "captions": 1.0,
            "hallucinating": float(bool(hallucinated)),
            "mentions": float(len(named.objects)),
            "hallucinated": float(len(hallucinated)),
            "named": float(len(set(named.objects))),
            "found": float(len(true & set(named.objects))),
            "true": float(len(true)),
            "words": float(named.words),
        }
        if named.distinct_pairs is not None:
            counts |= {"distinct_pairs": named.distinct_pairs, "with_pairs": 1.0}
        if reply.capped is not None:
            counts |= {"capped": float(reply.capped), "cap_known": 1.0}
        return Judgement(
            score=1.0 - counts["hallucinating"],
            counts=counts,
            read={"objects": list(named.objects), "hallucinated": hallucinated},
        )

    def figures(self, totals: Totals) -> Figures:
        total = totals[ALL_PARTS]
        figures = {
            "chair_s": share(total["hallucinating"], total["captions"]),
            "chair_i": share(total["hallucinated"], total["mentions"]),
            "recall": share(total["found"], total["true"]),
            "precision": share(total["found"], total["named"]),
            "f1": share(2 * total["found"], total["named"] + total["true"]),
            "length": share(total["words"], total["captions"]),
        }
        if "with_pairs" in total:
            figures["distinct_2"] = share(total["distinct_pairs"], total["with_pairs"])
        if "cap_known" in total:
            figures["at_token_cap"] = share(total["capped"], total["cap_known"])
        return {(ALL_PARTS, name): values for name, values in figures.items()}

    def answered(self, files: Sequence[Path]) -> list[tuple[Question, Reply]]:
        """JSON or JSON lines of ``image_id`` and ``caption`` (or, as LLaVA writes it, ``text``); an image each."""
        scenes = self._scenes()
        pairs = []
        for file in files:
            for record in read_records(file, "the captions", ["image_id"]):
                image = (
                    record["image_id"] if isinstance(record["image_id"], int) else number_in(str(record["image_id"]))
                )
                if image not in scenes:
                    raise EvaluationError(
                        f"{self.name}: {file} has a caption of image {image}, which has no annotations"
                    )
                if "caption" not in record and "text" not in record:
                    raise EvaluationError(f"{self.name}: {file} has neither 'caption' nor 'text' for image {image}")
                caption = str(record.get("caption", record.get("text")))
                pairs.append((self._question(scenes[image]), Reply(caption)))
        return pairs

    def answer_files(self, answers: Sequence[tuple[Question, str]]) -> dict[str, str]:
        records = [{"image_id": int(question.places[0][1]), "caption": answer} for question, answer in answers]
        return {"captions.jsonl": to_lines(records)}

    def notes(self, questions: Sequence[Question]) -> list[str]:
        if self.captions:
            return []
        return [f"{self.name}: no reference captions, so an object is there only if it has a mask; the paper uses both"]

    def _question(self, scene: Scene) -> Question:
        return Question(
            id=f"{self.name}-{scene.image_id}",
            task=self.task,
            question=self.prompt,
            prompt=self.prompt + self.suffix,
            image=scene.file,
            truth=tuple(sorted(scene.objects)),
            places=((ALL_PARTS, str(scene.image_id)),),
            new_tokens=self.new_tokens,
        )

    def _names(self) -> ObjectNames:
        return object_names(self.synonyms, self.words)

    def _scenes(self) -> dict[int, Scene]:
        instances = need(_listed(self.instances), self, "instances", "COCO's instances_*.json")
        return _scenes_of(instances, _listed(self.captions), self.synonyms, self.words)

    def _wanted(self) -> list[int]:
        wanted = []
        for file in self.questions:
            for record in read_records(file, f"the images of {self.name}"):
                image = record.get("image_id", record.get("image"))
                wanted.append(image if isinstance(image, int) else number_in(str(image)))
        return list(dict.fromkeys(wanted))


def _listed(files: Files | str) -> Files:
    return (files,) if isinstance(files, str) else files


@functools.lru_cache(maxsize=4)
def _scenes_of(instances: Files, captions: Files, synonyms: str, words: WordRules) -> dict[int, Scene]:
    names = object_names(synonyms, words)
    files: dict[int, str] = {}
    objects: dict[int, set[str]] = {}
    for path in instances:
        annotations = _coco(path, ("images", "categories", "annotations"))
        categories = {entry["id"]: names.class_named(entry["name"], path) for entry in annotations["categories"]}
        for image in annotations["images"]:
            files[image["id"]] = image["file_name"]
            objects.setdefault(image["id"], set())
        for mask in annotations["annotations"]:
            objects.setdefault(mask["image_id"], set()).add(categories[mask["category_id"]])
    for path in captions:
        for caption in _coco(path, ("annotations",))["annotations"]:
            if caption["image_id"] in objects:
                objects[caption["image_id"]] |= set(names.mentions(caption["caption"]).objects)
    return {image: Scene(image, file, frozenset(objects[image])) for image, file in files.items()}


def _coco(path: str, keys: Sequence[str]) -> dict[str, Any]:
    loaded = read_json(path, "the annotations")
    lacking = [key for key in keys if not isinstance(loaded, dict) or key not in loaded]
    if lacking:
        raise EvaluationError(f"the annotations {path} have no {' and no '.join(map(repr, lacking))}: are they COCO's?")
    return dict(loaded)
