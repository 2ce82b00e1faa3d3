"""Readers of yes and no: every answer that the scripts are known to disagree on, read by hand."""

from __future__ import annotations

import pytest

from attn_eval.yes_no import READERS, read_answer, readings

# The gold answer is yes throughout; columns are pope, negation, substring, exact, cased, mme, first_word.
READ: list[tuple[str, str]] = [
    ("Yes", "yyyyyyy"),
    ("yes", "yyyy-yy"),
    ("No", "nnnnnnn"),
    ("Yes.", "yyy--yy"),
    ("Y", "yyn--y-"),
    ("NO", "ynnn-nn"),
    ("There is no dog.", "nnn----"),
    ("Yes, there is. It is not a cat.", "yny--yy"),
    ("The image doesn't show one", "ynn----"),
    ("Not sure", "yyn--n-"),
    ("Nothing here", "yyn--n-"),
    ("No, yes", "nny--nn"),
    ("", "yyn----"),
    (" yes", "yyyy-yy"),
    ("eyes", "yyy--y-"),
]
SHORT = {"y": "yes", "n": "no", "-": None}


@pytest.mark.parametrize(("answer", "expected"), READ, ids=[answer or "nothing" for answer, _ in READ])
def test_what_each_script_reads(answer: str, expected: str) -> None:
    read = {name: read_answer(name, answer, "yes") for name in READERS}
    assert read == dict(zip(READERS, map(SHORT.get, expected), strict=True))


def test_the_substring_rule_looks_at_the_gold_answer() -> None:
    both = "no, or yes"
    assert read_answer("substring", both, "yes") == "yes"
    assert read_answer("substring", both, "no") == "no"
    assert read_answer("substring", "nothing", "no") == "no"


def test_a_task_hears_its_own_reader_and_the_common_ones() -> None:
    assert list(readings("mme", "Yes", "yes")) == ["mme", "pope", "negation", "substring", "exact", "first_word"]
