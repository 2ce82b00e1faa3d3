"""How a prediction is scored. The rules are RULER's (NVIDIA/RULER, scripts/eval/synthetic/constants.py)."""

from __future__ import annotations

import re
from collections.abc import Sequence

_CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f]")
_INTEGER = re.compile(r"\d+")


def clean(prediction: str) -> str:
    """Strip the prediction and turn control characters (0x00 to 0x1f) into newlines, as RULER does before scoring."""
    return _CONTROL_CHARACTERS.sub("\n", prediction.strip()).strip()


def string_match_all(prediction: str, references: Sequence[str]) -> float:
    """The share of the references that occur in the prediction, case-insensitive, as substrings; 0.0 to 1.0.

    Raises:
        ValueError: no references, which would make every prediction right.
    """
    if not references:
        raise ValueError("string_match_all needs at least one reference")
    text = clean(prediction).lower()
    return sum(reference.lower() in text for reference in references) / len(references)


def first_integer_match(prediction: str, reference: str) -> float:
    """1.0 if the first whole number in the prediction is the reference, else 0.0 (the passkey papers' rule)."""
    found = _INTEGER.search(clean(prediction))
    return float(found is not None and int(found.group()) == int(reference))
