"""Random keys and values, each drawn from the ``random.Random`` of its sample."""

from __future__ import annotations

import functools
import random
import string
import uuid
from collections.abc import Callable

from attn_eval.errors import EvaluationError


@functools.cache
def words_of_kind(name: str) -> tuple[str, ...]:
    try:
        from wonderwords import RandomWord
    except ImportError as error:
        raise EvaluationError("this task draws words from wonderwords: pip install 'attn-hooks[eval]'") from error
    return tuple(sorted(set(RandomWord().filter(include_categories=(name,)))))


@functools.cache
def all_words() -> tuple[str, ...]:
    """Every noun, adjective and verb of wonderwords, sorted: 8166 distinct words in wonderwords 3.0.1."""
    return tuple(sorted({*words_of_kind("noun"), *words_of_kind("adjective"), *words_of_kind("verb")}))


def word_key(rng: random.Random) -> str:
    """``adjective-noun``, as RULER's keys are."""
    return f"{rng.choice(words_of_kind('adjective'))}-{rng.choice(words_of_kind('noun'))}"


def seven_digits(rng: random.Random) -> str:
    """A whole number from 1000000 to 9999999."""
    return str(rng.randint(10**6, 10**7 - 1))


def uuid4(rng: random.Random) -> str:
    """A version 4 UUID from 128 random bits of the sample's generator."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def letters(rng: random.Random, count: int, alphabet: str = string.ascii_lowercase) -> str:
    """``count`` random letters."""
    return "".join(rng.choices(alphabet, k=count))


def distinct(draw: Callable[[], str], count: int, taken: frozenset[str] = frozenset()) -> list[str]:
    """``count`` different draws, in the order drawn, none of them in ``taken``.

    Raises:
        EvaluationError: a hundred draws a word were not enough.
    """
    found: dict[str, None] = {}
    for _ in range(100 * count):
        if len(found) == count:
            break
        word = draw()
        if word not in taken:
            found[word] = None
    if len(found) < count:
        raise EvaluationError(f"could not draw {count} different words; ask for fewer")
    return list(found)
