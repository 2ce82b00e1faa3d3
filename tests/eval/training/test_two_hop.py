"""Two-hop questions about an edited fact: MQuAKE's form, read and generated."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from attn_eval.errors import EvaluationError
from attn_eval.training.two_hop import CONTEXT_PROMPT, generate_two_hop, two_hop_examples

PUBLISHED: dict[str, Any] = {
    "case_id": 18,
    "requested_rewrite": [
        {
            "prompt": "The name of the current head of the {} government is",
            "subject": "Nigeria",
            "target_new": {"id": "Q123510", "str": "Karl D\u00f6hler"},
            "target_true": {"id": "Q361567", "str": "Muhammadu Buhari"},
        }
    ],
    "questions": ["Who was the head of government of the country where Ahmadu Bello was a citizen?", "Another?"],
    "answer": "Muhammadu Buhari",
    "answer_alias": ["PMB"],
    "new_answer": "Karl D\u00f6hler",
    "new_answer_alias": ["K. D\u00f6hler"],
}


def test_a_published_record_becomes_the_published_prompt() -> None:
    (example,) = two_hop_examples([PUBLISHED], "train.jsonl")
    assert example.prompt == (
        "Q: Imagine that The name of the current head of the Nigeria government is Karl D\u00f6hler. "
        "Who was the head of government of the country where Ahmadu Bello was a citizen? A:"
    )
    assert example.completion == "Karl D\u00f6hler"
    assert example.answers == ("Karl D\u00f6hler", "K. D\u00f6hler")


def test_generated_answers_follow_from_the_edit_and_the_context() -> None:
    first_hop_edits = 0
    for record in generate_two_hop(80, "train", 0):
        (rewrite,) = record["requested_rewrite"]
        world = dict(fact.removesuffix(".").rsplit(" ", 1) for fact in record["context"] if _ends_in_one_word(fact))
        assert len(record["context"]) in (6, 7)
        first, second = record["new_single_hops"]
        edit = rewrite["prompt"].format(rewrite["subject"])
        first_is_edited = edit == first["cloze"]
        first_hop_edits += first_is_edited
        edited, kept = (first, second) if first_is_edited else (second, first)
        assert edited["cloze"] == edit
        assert edited["answer"] == rewrite["target_new"]["str"] != rewrite["target_true"]["str"]
        # The fact that stays is in the context as it is, and the new answer comes at the end of the chain.
        assert f"{kept['cloze']} {kept['answer']}." in record["context"]
        assert f"{edit} {rewrite['target_true']['str']}." in record["context"]
        assert record["new_answer"] == second["answer"] != record["answer"]
        assert first["answer"] in second["cloze"]
        assert len(world) == len(set(world))
    assert 20 < first_hop_edits < 60


def _ends_in_one_word(fact: str) -> bool:
    return fact[fact.rfind(" ") + 1 :][0].isupper()


def test_generated_records_go_through_the_same_reader() -> None:
    records = generate_two_hop(5, "test", 1)
    plain, with_context = two_hop_examples(records, "generated"), two_hop_examples(records, "generated", CONTEXT_PROMPT)
    assert plain[0].prompt.startswith("Q: Imagine that ")
    assert with_context[0].prompt.startswith(" ".join(records[0]["context"]) + " Q: Imagine that ")
    assert with_context[0].prompt.endswith(f"{records[0]['questions'][0]} A:")


def test_generated_sets_are_the_same_for_a_seed_and_disjoint_between_splits() -> None:
    train = generate_two_hop(40, "train", 3)
    assert train[:10] == generate_two_hop(10, "train", 3) != generate_two_hop(10, "train", 4)
    subjects = [
        {record["orig"]["triples_labeled"][0][0] for record in generate_two_hop(200, split, 3)}
        for split in ("train", "validation", "test")
    ]
    assert not (subjects[0] & subjects[1] or subjects[0] & subjects[2] or subjects[1] & subjects[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"requested_rewrite": []}, "f.jsonl, entry 1, is not of MQuAKE's form"),
        ({"questions": []}, "f.jsonl, entry 1, is not of MQuAKE's form"),
        ({"new_answer": None}, "f.jsonl, entry 1, has no column 'new_answer'"),
    ],
)
def test_what_is_no_record_is_named(change: dict[str, Any], message: str) -> None:
    record = copy.deepcopy(PUBLISHED) | change
    record = {key: value for key, value in record.items() if value is not None}
    with pytest.raises(EvaluationError, match=message):
        two_hop_examples([record], "f.jsonl")


def test_a_context_that_is_not_there_is_named_and_so_is_an_unknown_split() -> None:
    with pytest.raises(EvaluationError, match="no column 'context'"):
        two_hop_examples([PUBLISHED], "f.jsonl", CONTEXT_PROMPT)
    with pytest.raises(EvaluationError, match="no split 'dev' of generated data; allowed: train, validation, test"):
        generate_two_hop(1, "dev", 0)
