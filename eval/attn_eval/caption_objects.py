"""Which objects a caption names, as CHAIR counts them (arXiv 1809.02156).

Words are tokenised and brought to their singular, known pairs of words are joined, and what is then a class or one of
its synonyms is a mention of that class.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from attn_eval.errors import EvaluationError

WordRules = Literal["rules", "nltk"]
PUBLISHED_SYNONYMS = "chair"

# From the script of the paper: pairs that are one word, and what they stand for.
_PAIRS = (
    "motor bike", "motor cycle", "air plane", "traffic light", "street light", "traffic signal", "stop light",
    "fire hydrant", "stop sign", "parking meter", "suit case", "sports ball", "baseball bat", "baseball glove",
    "tennis racket", "wine glass", "hot dog", "cell phone", "mobile phone", "teddy bear", "hair drier",
    "potted plant", "bow tie", "laptop computer", "home plate", "train track",
)  # fmt: skip
_ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub")
_RENAMED = {
    # A baby bird is no person, and neither is a passenger train.
    **{f"{age} {animal}": animal for age in ("baby", "adult") for animal in _ANIMALS},
    **{f"passenger {vehicle}": vehicle for vehicle in ("jet", "train")},
    "bow tie": "tie",
    "toilet seat": "toilet",
    "wine glas": "wine glass",
}

_TOKEN = re.compile(r"[^\W_]+(?:-[^\W_]+)*|'[a-z]+|\.\.\.|[^\w\s]")
_IRREGULAR = {
    "children": "child",
    "geese": "goose",
    "mice": "mouse",
    "people": "person",
    "oxen": "ox",
    "teeth": "tooth",
}
_ENDINGS = (("ies", "y"), ("ves", "f"), ("ves", "fe"), ("men", "man"), ("es", ""), ("s", ""))


@dataclass(frozen=True)
class Mentions:
    """What a caption names.

    Attributes:
        objects: the class of every mention in order, repeats included.
        words: tokens of the caption, a joined pair and a punctuation mark counting as one each.
        distinct_pairs: the share of different ones among the caption's pairs of neighbouring words (distinct-2), or
            None for a caption of fewer than two.
    """

    objects: tuple[str, ...]
    words: int
    distinct_pairs: float | None


class ObjectNames:
    """Classes and their synonyms.

    Args:
        lines: a class each, then its synonyms, split at ``", "``. The script splits there and no finer, so that in its
            own list an entry behind two spaces (``motor bike``, ``cheesecake``) is never met.
        word_rules: ``rules`` knows plurals and needs nothing; ``nltk`` is the pipeline of the script that papers use
            today (OPERA's), with its tokeniser, tagger and WordNet lemmas.

    Raises:
        EvaluationError: no class, or ``nltk`` without the package or its data.
    """

    def __init__(self, lines: list[str], word_rules: WordRules = "rules") -> None:
        self.class_of: dict[str, str] = {}
        for line in lines:
            names = line.strip().split(", ")
            self.class_of |= dict.fromkeys(filter(None, names), names[0])
        if not self.class_of:
            raise EvaluationError("a list of object names needs at least one class: a line each, 'person, man, woman'")
        own_pairs = [name for name in self.class_of if name.strip().count(" ") == 1 and name == name.strip()]
        self.pairs = {pair: pair for pair in [*_PAIRS, *own_pairs]} | _RENAMED
        known = {part for name in [*self.class_of, *self.pairs] for part in name.split()}
        self._words: Callable[[str], list[str]] = (
            functools.partial(_words_by_rules, known=frozenset(known)) if word_rules == "rules" else _words_by_nltk()
        )

    def mentions(self, caption: str) -> Mentions:
        """The objects that a caption names."""
        single = self._words(caption.lower())
        words: list[str] = []
        place = 0
        while place < len(single):
            pair = " ".join(single[place : place + 2])
            words.append(self.pairs.get(pair, single[place]))
            place += 2 if pair in self.pairs else 1
        # The seat of a toilet is no chair.
        skipped = {"seat"} if {"toilet", "seat"} <= set(words) else set()
        pairs = list(itertools.pairwise(words))
        return Mentions(
            objects=tuple(self.class_of[word] for word in words if word in self.class_of and word not in skipped),
            words=len(words),
            distinct_pairs=len(set(pairs)) / len(pairs) if pairs else None,
        )

    def class_named(self, category: str, where: str) -> str:
        """The class of an annotation's category name.

        Raises:
            EvaluationError: the list has no such name.
        """
        if category not in self.class_of:
            raise EvaluationError(
                f"{where} has the category {category!r}, which is not in the list of object names: add a line for it, "
                "or give a list of your own as 'synonyms'"
            )
        return self.class_of[category]


@functools.lru_cache(maxsize=8)
def object_names(source: str, word_rules: WordRules) -> ObjectNames:
    """The published list for ``chair``, else the list in that file."""
    if source == PUBLISHED_SYNONYMS:
        text = resources.files("attn_eval").joinpath("data/chair/synonyms.txt").read_text(encoding="utf-8")
    else:
        try:
            text = Path(source).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise EvaluationError(f"the list of object names {source} can't be read: {error}") from error
    return ObjectNames(text.splitlines(), word_rules)


def _words_by_rules(text: str, known: frozenset[str]) -> list[str]:
    return [singular(token, known) for token in _TOKEN.findall(text)]


def singular(word: str, known: frozenset[str]) -> str:
    """The known word of which this is a plural; a word that is known already, or has no known singular, stays."""
    if word in known:
        return word
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    candidates = (word.removesuffix(ending) + single for ending, single in _ENDINGS if word.endswith(ending))
    return next((candidate for candidate in candidates if candidate in known), word)


def _words_by_nltk() -> Callable[[str], list[str]]:
    nltk = load_nltk()
    lemmatizer = nltk.stem.WordNetLemmatizer()

    def words(text: str) -> list[str]:
        return [lemmatizer.lemmatize(word, _wordnet_tag(tag)) for word, tag in nltk.pos_tag(nltk.word_tokenize(text))]

    return words


def load_nltk() -> Any:
    """The package, once it has shown that its tokeniser, tagger and WordNet are there.

    Raises:
        EvaluationError: one of them is not; the message says how to get it.
    """
    try:
        import nltk

        tagged = nltk.pos_tag(nltk.word_tokenize("two dogs"))
        nltk.stem.WordNetLemmatizer().lemmatize(tagged[1][0])
    except ImportError as error:
        raise EvaluationError(
            "words: nltk needs the package: pip install 'attn-hooks[chair]'; words: rules needs none"
        ) from error
    except LookupError as error:
        raise EvaluationError(
            "words: nltk needs its data: python -m nltk.downloader punkt_tab averaged_perceptron_tagger_eng wordnet; "
            "words: rules needs none"
        ) from error
    return nltk


def _wordnet_tag(tag: str) -> str:
    """WordNet's part of speech for a tag of the Penn treebank; a noun where it has none."""
    return {"J": "a", "V": "v", "R": "r"}.get(tag[:1], "n")
