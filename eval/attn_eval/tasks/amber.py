"""AMBER (arXiv 2311.07397): descriptions whose objects are known, and questions on existence, attribute and relation."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import PositiveInt

from attn_eval.caption_objects import WordRules, load_nltk, singular
from attn_eval.errors import EvaluationError
from attn_eval.tasks.images import (
    ALL_PARTS,
    Figures,
    Judgement,
    Question,
    Reader,
    Reply,
    Totals,
    YesNoTask,
    gold_answer,
    need,
    read_json,
    read_records,
    share,
    to_list,
)

GENERATIVE, DISCRIMINATIVE = "generative", "discriminative"
# The published types; the last 689 questions on relations lack the prefix.
PARTS: dict[str, tuple[str, ...]] = {
    "generative": (GENERATIVE,),
    "discriminative-hallucination": (DISCRIMINATIVE, "existence"),
    "discriminative-attribute-state": (DISCRIMINATIVE, "attribute", "state"),
    "discriminative-attribute-number": (DISCRIMINATIVE, "attribute", "number"),
    "discriminative-attribute-action": (DISCRIMINATIVE, "attribute", "action"),
    "discriminative-relation": (DISCRIMINATIVE, "relation"),
    "relation": (DISCRIMINATIVE, "relation"),
}
SPACY_MODEL = "en_core_web_lg"
SIMILARITY = 0.8

Similar = Callable[[str, str], bool]
_WORD = re.compile(r"[^\W\d_]+(?:-[^\W\d_]+)*")


class AmberTask(YesNoTask):
    """CHAIR, Cover, Hal and Cog of descriptions; accuracy, and precision, recall and F1 of no, of questions; with both,
    the AMBER score, the mean of 1 - CHAIR and F1.

    Attributes:
        questions: the published ``query_*.json``, one or more; they say which kinds are asked.
        annotations, associations, safe_words: the published ``annotations.json``, ``relation.json``,
            ``safe_words.txt``.
        words: ``rules`` takes every word of a description for a noun; ``nltk`` tags and lemmatises as the script does.
        similarity: ``spacy`` also takes a word for a true (or a tempting) one that it is near to, as the script does.
        suffix, new_tokens: of questions to answer with yes or no.
        caption_tokens: how many tokens a description may have.
    """

    version: ClassVar[int] = 1
    plain_figures: ClassVar[frozenset[str]] = frozenset({"length"})
    flip_figures: ClassVar[frozenset[str]] = frozenset({"accuracy", "hal"})
    reads_datasets: ClassVar[bool] = False

    annotations: str = ""
    associations: str = ""
    safe_words: str = ""
    words: WordRules = "rules"
    similarity: Literal["none", "spacy"] = "none"
    reader: Reader = "cased"
    new_tokens: PositiveInt = 10
    caption_tokens: PositiveInt = 512

    def asked(self, seed: int) -> list[Question]:
        files = need(self.questions, self, "questions", "the published query_*.json")
        queries = [record for file in files for record in read_records(file, "the queries", ["id", "image", "query"])]
        truths = _annotations(need(self.annotations, self, "annotations", "the published annotations.json"))
        unknown = [query["id"] for query in queries if query["id"] not in truths]
        if unknown:
            raise EvaluationError(f"{self.name}: the annotations have no id {unknown[0]}")
        chosen = set(self.sampled(list(dict.fromkeys(query["image"] for query in queries)), seed))
        return [self._question(query, truths[query["id"]]) for query in queries if query["image"] in chosen]

    def judge(self, question: Question, reply: Reply) -> Judgement:
        if GENERATIVE not in question.parts:
            return self.judge_yes_no(question, reply)[1]
        lexicon = _lexicon(
            need(self.associations, self, "associations", "the published relation.json"),
            need(self.safe_words, self, "safe_words", "the published safe_words.txt"),
            self.words,
        )
        nouns = lexicon.nouns(reply.text)
        covered, trapped, hallucinated = lexicon.sort_out(
            nouns, question.truth, question.traps, _similar(self.similarity)
        )
        counts = {
            "responses": 1.0,
            "hallucinating": float(bool(hallucinated)),
            "nouns": float(len(nouns)),
            "hallucinated": float(len(hallucinated)),
            "truths": float(len(question.truth)),
            "covered": float(len(covered)),
            "traps": float(len(question.traps)),
            "trapped": float(len(trapped)),
            "words": float(len(reply.text.split())),
        }
        if reply.capped is not None:
            counts |= {"capped": float(reply.capped), "cap_known": 1.0}
        read = {"nouns": nouns, "hallucinated": hallucinated}
        return Judgement(1.0 - counts["hallucinating"], counts, read)

    def figures(self, totals: Totals) -> Figures:
        found: Figures = {}
        for part, total in totals.items():
            if part == GENERATIVE:
                found[part, "chair"] = share(total["hallucinated"], total["nouns"])
                found[part, "cover"] = share(total["covered"], total["truths"])
                found[part, "hal"] = share(total["hallucinating"], total["responses"])
                found[part, "cog"] = share(total["trapped"], total["traps"])
                found[part, "length"] = share(total["words"], total["responses"])
                if "cap_known" in total:
                    found[part, "at_token_cap"] = share(total["capped"], total["cap_known"])
                continue
            found[part, "accuracy"] = share(total["right"], total["asked"])
            found[part, "precision"] = share(total["true_no"], total["said_no"])
            found[part, "recall"] = share(total["true_no"], total["gold_no"])
            found[part, "f1"] = share(2 * total["true_no"], total["said_no"] + total["gold_no"])
            if "first_known" in total:
                found[part, "first_token_agrees"] = share(total["first_agrees"], total["first_known"])
        if {GENERATIVE, DISCRIMINATIVE} <= set(totals):
            found[ALL_PARTS, "amber_score"] = (1 - found[GENERATIVE, "chair"] + found[DISCRIMINATIVE, "f1"]) / 2
        return found

    def answered(self, files: Sequence[Path]) -> list[tuple[Question, Reply]]:
        """JSON of ``id`` and ``response``; those that are there are scored, as the published script does."""
        questions = {question.places[0][1]: question for question in self.asked(0)}
        pairs = []
        for file in files:
            for record in read_records(file, "the answers", ["id", "response"]):
                if str(record["id"]) not in questions:
                    raise EvaluationError(f"{self.name}: {file} answers the id {record['id']}, which no query file has")
                pairs.append((questions[str(record["id"])], Reply(str(record["response"]))))
        return pairs

    def answer_files(self, answers: Sequence[tuple[Question, str]]) -> dict[str, str]:
        records = [{"id": int(question.places[0][1]), "response": answer} for question, answer in answers]
        return {"answers.json": to_list(records)}

    def _question(self, query: Mapping[str, Any], truth: Mapping[str, Any]) -> Question:
        where = f"{self.name}: id {query['id']}"
        if truth["type"] not in PARTS:
            raise EvaluationError(f"{where} is of the type {truth['type']!r}, which AMBER does not have")
        describe = truth["type"] == GENERATIVE
        return Question(
            id=f"{self.name}-{query['id']}",
            task=self.task,
            question=query["query"],
            prompt=query["query"] if describe else query["query"] + self.suffix,
            image=query["image"],
            truth=tuple(truth["truth"]) if describe else (gold_answer(truth["truth"], where),),
            places=tuple((part, str(query["id"])) for part in PARTS[truth["type"]]),
            new_tokens=self.caption_tokens if describe else self.tokens_to_write(),
            traps=tuple(truth["hallu"]) if describe else (),
        )


class Lexicon:
    """The words that AMBER knows, which of them stand for which, and which are never counted."""

    def __init__(self, associations: Mapping[str, Sequence[str]], safe: frozenset[str], words: WordRules) -> None:
        self.associations, self.safe = associations, safe
        self.known = frozenset({*associations, *(word for near in associations.values() for word in near)})
        self._nouns = functools.partial(_words, known=self.known) if words == "rules" else _nouns_by_nltk()

    def nouns(self, text: str) -> list[str]:
        """The known words of a description, repeats included."""
        return [word for word in self._nouns(text) if word in self.known]

    def sort_out(
        self, nouns: Sequence[str], truths: Sequence[str], traps: Sequence[str], similar: Similar
    ) -> tuple[set[int], set[int], list[str]]:
        """Indices of the truths and of the traps that the nouns name, and the hallucinated nouns.

        As in the published script a noun names the first truth that it is associated with, before the truth of that very
        word; and a safe word counts as a noun that is not hallucinated.
        """
        true, tempting = self._near(truths), self._near(traps)
        covered: set[int] = set()
        trapped: set[int] = set()
        hallucinated = []
        for noun in nouns:
            if noun in self.safe:
                continue
            named = _first(noun, true, str.__eq__)
            if named is None:
                traps_named = {_first(noun, tempting, str.__eq__), _first(noun, tempting, similar)}
                trapped |= {trap for trap in traps_named if trap is not None}
                named = _first(noun, true, similar)
            if named is None:
                hallucinated.append(noun)
            else:
                covered.add(named)
        return covered, trapped, hallucinated

    def _near(self, words: Sequence[str]) -> list[tuple[str, int]]:
        """Words that stand for one of ``words``, with its index: associated ones first."""
        near = [(other, index) for index, word in enumerate(words) for other in self.associations.get(word, ())]
        return near + [(word, index) for index, word in enumerate(words)]


def _first(noun: str, words: Sequence[tuple[str, int]], alike: Similar) -> int | None:
    return next((index for word, index in words if alike(noun, word)), None)


def _words(text: str, known: frozenset[str]) -> list[str]:
    return [singular(word, known) for word in _WORD.findall(text.lower())]


def _nouns_by_nltk() -> Callable[[str], list[str]]:
    nltk = load_nltk()
    lemmatizer = nltk.stem.WordNetLemmatizer()

    def nouns(text: str) -> list[str]:
        tagged = nltk.pos_tag(nltk.word_tokenize(text))
        return [lemmatizer.lemmatize(word) for word, tag in tagged if tag.startswith("NN")]

    return nouns


@functools.lru_cache(maxsize=2)
def _similar(kind: str) -> Similar:
    if kind == "none":
        return lambda first, second: False
    try:
        import spacy

        vectors = spacy.load(SPACY_MODEL)
    except (ImportError, OSError) as error:
        raise EvaluationError(
            "similarity: spacy needs the package and its vectors: pip install 'attn-hooks[amber]'; "
            f"python -m spacy download {SPACY_MODEL}; similarity: none needs neither"
        ) from error
    parsed = functools.lru_cache(maxsize=None)(vectors)
    return lambda first, second: parsed(first).similarity(parsed(second)) > SIMILARITY


@functools.lru_cache(maxsize=4)
def _lexicon(associations: str, safe_words: str, words: WordRules) -> Lexicon:
    loaded = read_json(associations, "the associations")
    if not isinstance(loaded, dict):
        raise EvaluationError(f"the associations {associations} are not a table of word: [words]")
    try:
        safe = frozenset(Path(safe_words).expanduser().read_text(encoding="utf-8").split())
    except OSError as error:
        raise EvaluationError(f"the safe words {safe_words} can't be read: {error.strerror}") from error
    return Lexicon(loaded, safe, words)


@functools.lru_cache(maxsize=4)
def _annotations(path: str) -> dict[int, dict[str, Any]]:
    records = read_records(path, "the annotations", ["id", "type", "truth"])
    return {record["id"]: record for record in records}
