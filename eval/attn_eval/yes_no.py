"""Yes or no in a model's answer, read by the rules of the scripts that papers score with.

The scripts differ, and so do the figures that they give for the same answers: a task scores by one of them and keeps a
log of the answers that the others read differently.
"""

from __future__ import annotations

import re
from collections.abc import Callable

YES, NO = "yes", "no"
_WORD = re.compile(r"[a-z]+")


def read_pope(answer: str, gold: str) -> str | None:
    """POPE's own script: the first sentence without commas says no if ``No``, ``not`` or ``no`` is a word of it."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return NO if {"No", "not", "no"} & set(words) else YES


def read_negation(answer: str, gold: str) -> str | None:
    """OPERA's and PAI's: the whole answer without full stops and commas, and ``NO`` and ``...n't`` say no as well."""
    words = answer.replace(".", "").replace(",", "").split(" ")
    said_no = any(word in ("No", "not", "no", "NO") or word.endswith("n't") for word in words)
    return NO if said_no else YES


def read_substring(answer: str, gold: str) -> str | None:
    """VCD's and AGLA's: right if the gold answer is somewhere in the answer, be it inside a word, as in ``nothing``."""
    return gold if gold in answer.strip().lower() else {YES: NO, NO: YES}[gold]


def read_exact(answer: str, gold: str) -> str | None:
    """lmms-eval's: the answer is ``yes`` or ``no`` in any case and nothing else, else it is neither."""
    text = answer.strip().lower()
    return text if text in (YES, NO) else None


def read_cased(answer: str, gold: str) -> str | None:
    """AMBER's: the answer is exactly ``Yes`` or ``No``."""
    return {"Yes": YES, "No": NO}.get(answer)


def read_first_word(answer: str, gold: str) -> str | None:
    """The answer's first word, if that is yes or no in any case."""
    first = _WORD.search(answer.lower())
    return first[0] if first and first[0] in (YES, NO) else None


def read_mme(answer: str, gold: str) -> str | None:
    """MME's: yes or no or their first letter without full stops, else yes, then no, within the first four characters."""
    text = answer.lower().strip().strip(".").strip()
    if text in (YES, NO, "y", "n"):
        return YES if text[0] == "y" else NO
    return next((word for word in (YES, NO) if word in text[:4]), None)


READERS: dict[str, Callable[[str, str], str | None]] = {
    "pope": read_pope,
    "negation": read_negation,
    "substring": read_substring,
    "exact": read_exact,
    "cased": read_cased,
    "mme": read_mme,
    "first_word": read_first_word,
}

COMMON = ("pope", "negation", "substring", "exact", "first_word")


def read_answer(reader: str, answer: str, gold: str) -> str | None:
    """``yes``, ``no``, or None for an answer that is neither.

    Args:
        reader: a name of `READERS`.
        answer: what the model wrote.
        gold: ``yes`` or ``no``; only ``substring`` looks at it.
    """
    return READERS[reader](answer, gold)


def readings(reader: str, answer: str, gold: str) -> dict[str, str | None]:
    """What a task's reader makes of an answer, and what those do that papers use for any benchmark."""
    return {name: READERS[name](answer, gold) for name in dict.fromkeys((reader, *COMMON))}
