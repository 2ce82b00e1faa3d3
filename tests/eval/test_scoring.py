"""The scorers on answers made by hand, odd ones among them."""

from __future__ import annotations

import pytest

from attn_eval.scoring import clean, first_integer_match, string_match_all


@pytest.mark.parametrize(
    ("prediction", "references", "score"),
    [
        (" 1234567.", ["1234567"], 1.0),
        ("the numbers are 11 and 22", ["11", "22", "33", "44"], 0.5),
        ("CREEK, Patrol", ["creek", "patrol"], 1.0),
        ("12345678", ["1234567"], 1.0),  # a substring counts, as in RULER
        ("1 2 3 4 5 6 7", ["1234567"], 0.0),
        ("", ["x"], 0.0),
        ("\x00\x1f", ["x"], 0.0),
        ("a\x07b", ["ab"], 0.0),
        ("b a", ["a", "b"], 1.0),
    ],
)
def test_string_match_all(prediction: str, references: list[str], score: float) -> None:
    assert string_match_all(prediction, references) == pytest.approx(score)


def test_no_reference_is_an_error_and_not_a_full_score() -> None:
    with pytest.raises(ValueError, match="at least one reference"):
        string_match_all("anything", [])


@pytest.mark.parametrize(
    ("prediction", "score"),
    [(" 29176.", 1.0), ("29176", 1.0), ("it is 29176, not 5", 1.0), ("5 or 29176", 0.0), ("291760", 0.0), ("", 0.0)],
)
def test_first_integer_match(prediction: str, score: float) -> None:
    assert first_integer_match(prediction, "29176") == score


def test_clean_strips_and_replaces_control_characters() -> None:
    assert clean(" a\tb\x00 ") == "a\nb"
