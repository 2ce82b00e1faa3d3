"""Kinship in two hops: the rules counted by hand, the records of CLUTRR's form, and a published record."""

from __future__ import annotations

import ast
from collections import Counter

import pytest

from attn_eval.errors import EvaluationError
from attn_eval.training.kinship import TARGETS, combinations, generate_kinship, kinship_examples

PUBLISHED = {
    "id": "00eabf71",
    "clean_story": "[Herman] asked his son, [James], to go grocery shopping for him. [James] sent his wife, [Rosalee].",
    "query": "('Herman', 'Rosalee')",
    "target": 9,
    "target_text": "daughter-in-law",
    "f_comb": "son-wife",
}


def test_a_published_record_becomes_the_published_prompt() -> None:
    (example,) = kinship_examples([PUBLISHED], "train.json")
    assert example.prompt == (
        'Read the following story about a family. "Herman asked his son, James, to go grocery shopping for him. James sent '
        'his wife, Rosalee." Assume the relations described in the story are all true. Based on relations between the '
        "fictional characters in the story (assume the relations are all true) and your commonsense knowledge about family "
        "relationship, how is Rosalee related to Herman? Answer: Rosalee is Herman 's\n"
    )
    assert example.completion == "daughter-in-law"
    assert example.answers == ("daughter-in-law",)


def test_there_are_the_62_combinations_and_18_relations_of_the_published_files() -> None:
    found = combinations()
    assert len(set(found)) == len(found) == 62
    assert {third for _, _, third in found} == set(TARGETS)
    assert sorted(TARGETS.values()) == list(range(18))
    # Counted by hand: four wordings each of three rules, but two for a child's spouse.
    assert Counter(third for _, _, third in found)["daughter-in-law"] == 1
    assert Counter(third for _, _, third in found)["sister"] == 6
    assert {
        ("son", "wife", "daughter-in-law"),
        ("daughter", "uncle", "brother"),
        ("wife", "granddaughter", "granddaughter"),
        ("mother", "brother", "uncle"),
        ("husband", "mother", "mother-in-law"),
        ("son", "grandmother", "mother"),
    } <= set(found)


def test_generated_records_hold_together() -> None:
    known = {(first, second): third for first, second, third in combinations()}
    for record in generate_kinship(100, "train", 0):
        first, second = ast.literal_eval(record["edge_types"])
        genders = dict(person.split(":") for person in record["genders"].split(","))
        head, middle, last = genders
        assert record["target_text"] == known[first, second]
        assert record["target"] == TARGETS[record["target_text"]]
        assert ast.literal_eval(record["query"]) == (head, last)
        assert record["f_comb"] == f"{first}-{second}"
        assert all(f"[{name}]" in record["story"] for name in (head, middle, last))
        if first in ("husband", "wife"):
            assert genders[head] != genders[middle]
        male = {"father", "son", "brother", "grandfather", "grandson", "husband", "uncle", "father-in-law"}
        assert (genders[middle] == "male") == (first in male)
        assert (genders[last] == "male") == (second in male)


def test_generated_sets_are_the_same_for_a_seed_and_disjoint_between_splits() -> None:
    train, again = generate_kinship(60, "train", 3), generate_kinship(20, "train", 3)
    assert train[:20] == again
    assert generate_kinship(20, "train", 4) != again
    test = generate_kinship(60, "test", 3)
    stories = [record["story"] for record in (*train, *test)]
    assert len(set(stories)) == 120
    assert len({record["target_text"] for record in generate_kinship(300, "train", 0)}) == 18


def test_every_combination_is_drawn_about_evenly() -> None:
    counts = Counter(record["f_comb"] for record in generate_kinship(620, "train", 1))
    assert len(counts) == 62
    assert max(counts.values()) < 25


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "f.json holds no example: the set is empty"),
        ([{"clean_story": "", "query": "('a', 'b')"}], "f.json, entry 1, has no column 'target_text'"),
        ([PUBLISHED, {**PUBLISHED, "query": "a and b"}], "f.json, entry 2: 'query' must be two names"),
    ],
)
def test_what_is_no_record_is_named(records: list[dict[str, str]], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        kinship_examples(records, "f.json")


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(EvaluationError, match="no split 'dev' of generated data; allowed: train, validation, test"):
        generate_kinship(1, "dev", 0)
