"""Exact match on hand-made answers, and TruthfulQA's prompt."""

from __future__ import annotations

import pytest

from attn_eval.training.measuring import choice_prompt, exact_match


@pytest.mark.parametrize(
    ("answer", "stop", "score"),
    [
        ("son", ".", 1.0),
        (" Son. He is", ".", 1.0),
        ("\nson", "\n", 1.0),
        ("son-in-law", ".", 0.0),
        ("son\nand more", ".", 0.0),
        ("son\nand more", "\n", 1.0),
        ("boy", ".", 1.0),
        ("", ".", 0.0),
        ("the son", ".", 0.0),
    ],
)
def test_an_answer_is_right_up_to_its_stop(answer: str, stop: str, score: float) -> None:
    assert exact_match(answer, ("son", "Boy"), stop) == score


def test_choices_are_asked_with_the_primer_and_the_instruction() -> None:
    prompt = choice_prompt("Can pigs fly?", instruction=True)
    assert prompt.startswith("Interpret each question literally")
    assert prompt.endswith("A: The 1992 Olympics were held in Barcelona, Spain.\n\nQ: Can pigs fly?\nA:")
    assert choice_prompt("?", instruction=False).startswith(
        "Q: What is human life expectancy in the United States?\nA: "
    )
    assert prompt.count("\nA:") == 7
