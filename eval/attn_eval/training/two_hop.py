"""Questions in two hops about an edited fact: MQuAKE's form (arXiv 2305.14795) as LoFiT uses it, from its files or
generated.

"Imagine that {edited fact}. {question}": the answer follows from the edited fact and one that stays as it is. The
published questions need the model's own knowledge for the latter. The generated world is made up, so each record lists
``context``: the two facts and others of their kind, in random order, for a prompt with ``{context}``.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from attn_eval.errors import EvaluationError
from attn_eval.training.examples import Completion, belongs_to, need_columns

GENERATOR_VERSION = 1
STOP = "\n"
PROMPT = "Q: Imagine that {edit}. {question} A:"
CONTEXT_PROMPT = "{context} Q: Imagine that {edit}. {question} A:"


@dataclass(frozen=True)
class Relation:
    """One kind of fact.

    Attributes:
        name: as Wikidata calls it, with its property id.
        statement: the fact up to its object, ``{}`` for the subject.
        question: for the object.
        phrase: stands for the object in a question of the next hop.
    """

    name: str
    property: str
    statement: str
    question: str
    phrase: str


CITIZENSHIP = Relation(
    "country of citizenship",
    "P27",
    "{} is a citizen of",
    "What is the country of citizenship of {}?",
    "the country of which {} is a citizen",
)
EMPLOYER = Relation(
    "employer", "P108", "{} is employed by", "Who is the employer of {}?", "the company that employs {}"
)
CAPITAL = Relation("capital", "P36", "The capital of {} is", "What is the capital of {}?", "the capital of {}")
HEAD = Relation(
    "head of government",
    "P6",
    "The name of the current head of the {} government is",
    "Who is the head of government of {}?",
    "the head of government of {}",
)
LANGUAGE = Relation(
    "official language",
    "P37",
    "The official language of {} is",
    "What is the official language of {}?",
    "the official language of {}",
)
CHIEF = Relation(
    "chief executive officer",
    "P169",
    "The chief executive officer of {} is",
    "Who is the chief executive officer of {}?",
    "the chief executive officer of {}",
)
SEAT = Relation(
    "headquarters location",
    "P159",
    "The headquarters of {} is located in the city of",
    "In which city is the headquarters of {}?",
    "the city of the headquarters of {}",
)
CHAINS: tuple[tuple[Relation, Relation], ...] = (
    (CITIZENSHIP, CAPITAL),
    (CITIZENSHIP, HEAD),
    (CITIZENSHIP, LANGUAGE),
    (EMPLOYER, CHIEF),
    (EMPLOYER, SEAT),
)
OPENINGS = (
    "bra",
    "cor",
    "dal",
    "fen",
    "gor",
    "hal",
    "kel",
    "lor",
    "mar",
    "nor",
    "pel",
    "ros",
    "sel",
    "tor",
    "val",
    "wes",
)
MIDDLES = ("a", "e", "i", "o", "en", "ar", "il", "on")
ENDINGS = {
    "person": ("den", "lin", "man", "ric", "son", "ton"),
    "country": ("land", "mark", "nia", "stan"),
    "city": ("burg", "ford", "holm", "port", "ville"),
    "company": ("co", "corp", "tech", "works"),
    "language": ("ese", "ian", "ish"),
}
OBJECTS = {
    CITIZENSHIP: "country",
    EMPLOYER: "company",
    CAPITAL: "city",
    HEAD: "person",
    LANGUAGE: "language",
    CHIEF: "person",
    SEAT: "city",
}


def generate_two_hop(count: int, split: str, seed: int, distractors: int = 2) -> list[dict[str, Any]]:
    """``count`` records in the form of MQuAKE's files, of made-up names, no first subject in two splits.

    Half of the edits change the first hop, half the second. Record i is the same for any ``count``.

    Args:
        count: how many.
        split: train, validation or test.
        seed: of the draws; the same seed gives the same records.
        distractors: how many chains of the same relations stand in ``context`` beside the one that is asked for.

    Raises:
        EvaluationError: no such split.
    """
    rng = random.Random(f"two-hop {GENERATOR_VERSION} {split} {seed} {distractors}")
    return [_drawn_record(rng, split, case, distractors) for case in range(count)]


def two_hop_examples(records: Sequence[dict[str, Any]], where: str, prompt: str = PROMPT) -> list[Completion]:
    """Prompt and completion of MQuAKE's records: the first of the questions, the new answer, its aliases as answers.

    Args:
        records: with ``requested_rewrite``, ``questions``, ``new_answer`` and ``new_answer_alias``.
        where: names their file in an error.
        prompt: with ``{edit}`` and ``{question}``, and ``{context}`` where the records have it. The completion follows
            without a space, as in the published code.

    Raises:
        EvaluationError: there is no record, or one is not of that form.
    """
    columns = ["requested_rewrite", "questions", "new_answer", "new_answer_alias"]
    need_columns(records, where, columns + (["context"] if "{context}" in prompt else []))
    examples = []
    for number, record in enumerate(records, start=1):
        try:
            rewrite = record["requested_rewrite"][0]
            edit = f"{rewrite['prompt'].format(rewrite['subject'])} {rewrite['target_new']['str']}"
            question = record["questions"][0]
        except (KeyError, IndexError, TypeError) as error:
            raise EvaluationError(f"{where}, entry {number}, is not of MQuAKE's form: {error!r}") from error
        text = prompt.format(edit=edit, question=question, context=" ".join(record.get("context", ())))
        answers = (record["new_answer"], *record["new_answer_alias"])
        examples.append(Completion(str(record.get("case_id", number)), text, record["new_answer"], answers))
    return examples


def _drawn_record(rng: random.Random, split: str, case: int, distractors: int) -> dict[str, Any]:
    first, second = rng.choice(CHAINS)
    names = _Names(rng)
    subject = names.new("person", split)
    middle, answer = names.new(OBJECTS[first]), names.new(OBJECTS[second])
    other_middle, other_answer = names.new(OBJECTS[first]), names.new(OBJECTS[second])
    first_is_edited = rng.random() < 0.5
    # Of an edited first hop the second fact that counts is that of the new country or company.
    new_middle = other_middle if first_is_edited else middle
    facts = [_stated(first, subject, middle), _stated(second, middle, answer)]
    if first_is_edited:
        facts.append(_stated(second, other_middle, other_answer))
    for _ in range(distractors):
        person, place, thing = names.new("person"), names.new(OBJECTS[first]), names.new(OBJECTS[second])
        facts += [_stated(first, person, place), _stated(second, place, thing)]
    rng.shuffle(facts)
    edited, before, after = (first, middle, other_middle) if first_is_edited else (second, answer, other_answer)
    edited_subject = subject if first_is_edited else middle
    question = second.question.format(first.phrase.format(subject))
    return {
        "case_id": f"{split}-{case}",
        "requested_rewrite": [
            {
                "prompt": edited.statement,
                "question": edited.question.format(edited_subject),
                "relation_id": edited.property,
                "subject": edited_subject,
                "target_new": {"id": after, "str": after},
                "target_true": {"id": before, "str": before},
            }
        ],
        "questions": [question, _rephrased(question, "Tell me:"), _rephrased(question, "Do you know:")],
        "answer": answer,
        "answer_alias": [],
        "new_answer": other_answer,
        "new_answer_alias": [],
        "single_hops": [_hop(first, subject, middle), _hop(second, middle, answer)],
        "new_single_hops": [_hop(first, subject, new_middle), _hop(second, new_middle, other_answer)],
        "orig": {
            "edit_triples": [[edited_subject, edited.property, after]],
            "new_triples_labeled": [[subject, first.name, new_middle], [new_middle, second.name, other_answer]],
            "triples_labeled": [[subject, first.name, middle], [middle, second.name, answer]],
        },
        "context": facts,
    }


class _Names:
    """Made-up names of one record, all different; of a split, where one is asked for."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._taken: set[str] = set()

    def new(self, kind: str, split: str | None = None) -> str:
        while True:
            parts = (self._rng.choice(OPENINGS), self._rng.choice(MIDDLES), self._rng.choice(ENDINGS[kind]))
            name = "".join(parts).capitalize()
            if kind == "person":
                name = f"{name} {(self._rng.choice(OPENINGS) + self._rng.choice(ENDINGS[kind])).capitalize()}"
            if name not in self._taken and (split is None or belongs_to(name, split)):
                self._taken.add(name)
                return name


def _stated(relation: Relation, subject: str, found: str) -> str:
    return f"{relation.statement.format(subject)} {found}."


def _hop(relation: Relation, subject: str, found: str) -> dict[str, Any]:
    return {
        "answer": found,
        "answer_alias": [],
        "cloze": relation.statement.format(subject),
        "question": relation.question.format(subject),
    }


def _rephrased(question: str, opening: str) -> str:
    return f"{opening} {question[0].lower()}{question[1:]}"
