"""Texts to hide needles in: sentences, hashes, and what is said where there is none."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest

from attn_eval.errors import EvaluationError
from attn_eval.haystack import HELD_OUT, PYTHON_SOURCES, get_haystack
from attn_eval.tasks.needle_grid import sentence_end_before


def test_sentences_are_whole_and_white_space_is_collapsed(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text('It cost 3.14\n pounds.  "Why?" he asked.\n\nNobody knew!', encoding="utf-8")
    haystack = get_haystack(str(path))
    assert haystack.sentences == ("It cost 3.14 pounds.", '"Why?"', "he asked.", "Nobody knew!")
    assert haystack.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert haystack.sentences_from(None, 6) == [*haystack.sentences, *haystack.sentences[:2]]
    assert haystack.words_from(None, 5) == 'It cost 3.14 pounds. "Why?"'
    starts = {haystack.words_from(random.Random(seed), 2) for seed in range(40)}
    assert starts == {"It cost", '"Why?" he', "he asked.", "Nobody knew!"}


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("Second.", encoding="utf-8")
    (tmp_path / "a.txt").write_text("First.", encoding="utf-8")
    (tmp_path / "c.md").write_text("Not read.", encoding="utf-8")
    assert get_haystack(str(tmp_path)).sentences == ("First.", "Second.")


@pytest.mark.parametrize("name", [HELD_OUT, PYTHON_SOURCES])
def test_shipped_and_installed_texts_are_there(name: str) -> None:
    assert len(get_haystack(name).sentences) > 1000


def test_a_text_that_is_not_there_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="no haystack 'essays': give"):
        get_haystack("essays")
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    with pytest.raises(EvaluationError, match="holds no text"):
        get_haystack(str(empty))
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(EvaluationError, match="UTF-8"):
        get_haystack(str(binary))


def test_sentence_end_before() -> None:
    text = "One. Pi is 3.14 here. Three"
    assert sentence_end_before(text, 2) == 0
    assert sentence_end_before(text, 4) == 4
    assert sentence_end_before(text, 14) == 4
    assert text[: sentence_end_before(text, len(text))] == "One. Pi is 3.14 here."
