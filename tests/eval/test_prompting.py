"""Fitting to a length, chat templates, and where a character's token is."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from attn_eval.errors import EvaluationError
from attn_eval.prompting import MAX_PROBES, LengthError, PromptEncoder, largest_fitting


@pytest.mark.parametrize("budget", [56, 57, 99, 1000, 123_457])
@pytest.mark.parametrize("per_unit", [1, 7, 26])
def test_largest_fitting_finds_the_last_size_in_few_probes(budget: int, per_unit: int) -> None:
    probes = []

    def count(size: int) -> int:
        probes.append(size)
        return 30 + per_unit * size

    size = largest_fitting(count, budget, smallest=1, largest=None, new_tokens=0, what="task")
    assert count(size) <= budget < count(size + 1)
    assert len(probes) <= 10


def test_largest_fitting_ends_even_where_growing_adds_nothing() -> None:
    probes = []

    def count(size: int) -> int:
        probes.append(size)
        return 50

    assert largest_fitting(count, 60, smallest=1, largest=None, new_tokens=0, what="task") >= 1
    assert len(probes) <= MAX_PROBES + 1


def test_largest_fitting_says_what_is_feasible() -> None:
    with pytest.raises(LengthError, match="shortest feasible length is 90"):
        largest_fitting(lambda size: 80, 20, smallest=1, largest=None, new_tokens=10, what="task")
    with pytest.raises(LengthError, match="ends at a length of 160"):
        largest_fitting(lambda size: 10 * size, 1000, smallest=1, largest=15, new_tokens=10, what="task")


def test_special_tokens_come_from_the_tokenizer_or_the_chat_template_but_never_twice(tokenizer: Any) -> None:
    with pytest.raises(EvaluationError, match="no chat template"):
        PromptEncoder(tokenizer, chat_template=True)
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = "<bos>{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    encoder = PromptEncoder(chatty, chat_template=True)
    ids = encoder.encode("Hello", " The answer")
    assert chatty.decode(ids) == "<bos>[user]Hello[assistant]The answer"
    assert ids.count(chatty.bos_token_id) == 1
    assert encoder.token_positions("Hello", " The answer", [1]) == (1 + len("[user]") + 1,)


def test_token_positions_of_a_slow_tokenizer_are_counted(tokenizer: Any) -> None:
    class Slow:
        is_fast = False

        def __call__(self, text: str, **options: Any) -> Any:
            assert "return_offsets_mapping" not in options
            return tokenizer(text, **options)

        def decode(self, ids: list[int], **options: Any) -> str:
            return str(tokenizer.decode(ids, **options))

    text = "one two three"
    for encoder in (PromptEncoder(tokenizer), PromptEncoder(Slow())):
        assert encoder.token_positions(text, "", [4, 8]) == (4, 8)
        assert encoder.character_at_share(text, 0.5) == len(text) // 2
        assert encoder.character_at_share(text, 1.0) == len(text)
