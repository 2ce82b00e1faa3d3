"""Kinship in two hops: CLUTRR's task (arXiv 1908.06177) as LoFiT uses it, from its files or generated in their form.

A story tells two relations, Herman -> son James and James -> wife Rosalee; the question is the third, Rosalee is
Herman's daughter-in-law. 62 pairs of relations lead to 18 relations, as in the published files.
"""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Sequence
from typing import Any

from attn_eval.errors import EvaluationError
from attn_eval.training.examples import Completion, belongs_to, need_columns

GENERATOR_VERSION = 1
STOP = "."
PROMPT = (
    'Read the following story about a family. "{story}" Assume the relations described in the story are all true. Based on '
    "relations between the fictional characters in the story (assume the relations are all true) and your commonsense "
    "knowledge about family relationship, how is {person} related to {relative}? Answer: {person} is {relative} 's\n"
)

# (male, female) of each relation; the number is CLUTRR's `target`.
WORDS: dict[str, tuple[str, str]] = {
    "parent": ("father", "mother"),
    "child": ("son", "daughter"),
    "sibling": ("brother", "sister"),
    "grandparent": ("grandfather", "grandmother"),
    "grandchild": ("grandson", "granddaughter"),
    "spouse": ("husband", "wife"),
    "parent's sibling": ("uncle", "aunt"),
    "sibling's child": ("nephew", "niece"),
    "spouse's parent": ("father-in-law", "mother-in-law"),
    "child's spouse": ("son-in-law", "daughter-in-law"),
}
TARGETS = {
    "aunt": 0,
    "son-in-law": 1,
    "grandfather": 2,
    "brother": 3,
    "sister": 4,
    "father": 5,
    "mother": 6,
    "grandmother": 7,
    "uncle": 8,
    "daughter-in-law": 9,
    "grandson": 10,
    "granddaughter": 11,
    "father-in-law": 12,
    "mother-in-law": 13,
    "nephew": 14,
    "son": 15,
    "daughter": 16,
    "niece": 17,
}
# First hop, second hop, what they make together; for two siblings of one parent the story takes them as different.
RULES: tuple[tuple[str, str, str], ...] = (
    ("child", "spouse", "child's spouse"),
    ("sibling", "child", "sibling's child"),
    ("parent", "sibling", "parent's sibling"),
    ("parent", "parent", "grandparent"),
    ("child", "parent's sibling", "sibling"),
    ("sibling", "parent", "parent"),
    ("child", "grandparent", "parent"),
    ("child", "sibling", "child"),
    ("parent", "child", "sibling"),
    ("spouse", "parent", "spouse's parent"),
    ("sibling", "grandparent", "grandparent"),
    ("child", "child", "grandchild"),
    ("spouse", "child", "child"),
    ("spouse", "grandchild", "grandchild"),
    ("sibling", "sibling", "sibling"),
    ("grandchild", "sibling", "grandchild"),
)

MEN = (
    "Adam Albert Arthur Ben Carl Charles David Edward Eric Frank Fred George Harold Henry Hugh Jack James John Joseph Karl "
    "Lewis Louis Mark Martin Michael Oliver Oscar Paul Peter Philip Ralph Richard Robert Roger Samuel Simon Stephen "
    "Thomas Walter William"
)
WOMEN = (
    "Alice Amy Anna Barbara Betty Carol Catherine Clara Diana Dorothy Edith Eleanor Ellen Emily Emma Eva Florence Grace "
    "Hannah Helen Irene Jane Julia Kate Laura Lucy Margaret Martha Mary Nancy Olivia Rachel Rose Ruth Sarah Sophia "
    "Susan Teresa Victoria Vera"
)
NAMES = (MEN.split(), WOMEN.split())
# {b} is {a}'s {r}; {his} is said of {a}, {she} of {b}.
SENTENCES: tuple[str, ...] = (
    "[{a}] has a {r} called [{b}].",
    "[{b}] is the {r} of [{a}].",
    "[{a}] went to the market with {his} {r} [{b}].",
    "[{a}] and {his} {r}, [{b}], had dinner together.",
    "[{a}] wrote a long letter to {his} {r} [{b}].",
    "[{b}], the {r} of [{a}], baked bread all morning.",
    "[{a}] asked {his} {r} [{b}] to mend the fence.",
    "[{a}]'s {r} [{b}] came late to the party.",
    "[{a}] took {his} {r} [{b}] to the sea for a week.",
    "[{a}] is proud of {his} {r}, [{b}].",
    "[{b}] played chess with [{a}], whose {r} {she} is.",
    "Every Sunday [{a}] visits {his} {r} [{b}].",
)


def combinations() -> list[tuple[str, str, str]]:
    """The 62 (first relation, second relation, relation asked for) in words, e.g. ``("son", "wife", "daughter-in-law")``."""
    found = []
    for first, second, third in RULES:
        for first_gender in (0, 1):
            for second_gender in (0, 1):
                if second == "spouse" and second_gender == first_gender:
                    continue
                found.append((WORDS[first][first_gender], WORDS[second][second_gender], WORDS[third][second_gender]))
    return found


def generate_kinship(count: int, split: str, seed: int) -> list[dict[str, Any]]:
    """``count`` records in the form of CLUTRR's files, all stories different, no story in two splits.

    The pair of relations is drawn evenly from the 62, names and wording evenly; the two sentences stand in the order
    of the hops. Record i is the same for any ``count``.

    Args:
        count: how many.
        split: train, validation or test.
        seed: of the draws; the same seed gives the same records.

    Raises:
        EvaluationError: no such split.
    """
    rng = random.Random(f"kinship {GENERATOR_VERSION} {split} {seed}")
    pairs = combinations()
    records: dict[str, dict[str, Any]] = {}
    while len(records) < count:
        record = _drawn_record(rng, pairs)
        story = record["story"]
        if belongs_to(story, split) and story not in records:
            records[story] = {"id": f"{split}-{len(records)}", **record, "task_split": split}
    return list(records.values())


def kinship_examples(records: Sequence[dict[str, Any]], where: str, prompt: str = PROMPT) -> list[Completion]:
    """Prompt and completion of CLUTRR's records; the completion is the relation.

    Args:
        records: with ``clean_story`` (or ``story``), ``query`` and ``target_text``.
        where: names their file in an error.
        prompt: with ``{story}``, ``{person}`` and ``{relative}``. The published code leaves two spaces before each
            ``{person}``; here it is one.

    Raises:
        EvaluationError: there is no record, or one is not of that form.
    """
    stories = "clean_story" if records and isinstance(records[0], dict) and "clean_story" in records[0] else "story"
    need_columns(records, where, [stories, "query", "target_text"])
    examples = []
    for number, record in enumerate(records, start=1):
        relative, person = _people(record["query"], where, number)
        story = re.sub(r"[\[\]]", "", record[stories])
        text = prompt.format(story=story, person=person, relative=relative)
        target = record["target_text"]
        examples.append(Completion(str(record.get("id", number)), text, target, (target,)))
    return examples


def _drawn_record(rng: random.Random, pairs: Sequence[tuple[str, str, str]]) -> dict[str, Any]:
    first, second, third = rng.choice(pairs)
    # The words tell the genders of the second and the third person; a spouse in the first hop that of the first, too.
    middle, last = _gender_of(first), _gender_of(second)
    head = 1 - middle if first in WORDS["spouse"] else rng.randrange(2)
    people: list[str] = []
    for gender in (head, middle, last):
        people.append(rng.choice([name for name in NAMES[gender] if name not in people]))
    chosen = rng.sample(SENTENCES, 2)
    story = " ".join(
        _sentence(form, people[hop], people[hop + 1], relation, (head, middle)[hop], (middle, last)[hop])
        for hop, (form, relation) in enumerate(zip(chosen, (first, second), strict=True))
    )
    triples = [(people[0], first, people[1]), (people[1], second, people[2])]
    genders = zip(people, (head, middle, last), strict=True)
    return {
        "story": story,
        "clean_story": story,
        "query": str((people[0], people[2])),
        "target": TARGETS[third],
        "target_text": third,
        "proof_state": str([{(people[0], third, people[2]): triples}]),
        "f_comb": f"{first}-{second}",
        "task_name": "task_1.2",
        "story_edges": "[(0, 1), (1, 2)]",
        "edge_types": str([first, second]),
        "query_edge": "(0, 2)",
        "genders": ",".join(f"{name}:{('male', 'female')[gender]}" for name, gender in genders),
    }


def _sentence(form: str, a: str, b: str, relation: str, gender_of_a: int, gender_of_b: int) -> str:
    return form.format(a=a, b=b, r=relation, his=("his", "her")[gender_of_a], she=("he", "she")[gender_of_b])


def _gender_of(word: str) -> int:
    return next(words.index(word) for words in WORDS.values() if word in words)


def _people(query: Any, where: str, number: int) -> tuple[str, str]:
    try:
        relative, person = ast.literal_eval(query) if isinstance(query, str) else query
    except (ValueError, SyntaxError, TypeError) as error:
        raise EvaluationError(
            f"{where}, entry {number}: 'query' must be two names such as \"('Herman', 'Rosalee')\", given {query!r}"
        ) from error
    return str(relative), str(person)
