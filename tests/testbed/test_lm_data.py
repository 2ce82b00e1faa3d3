"""The training rows must be, token for token, what the tokenizer makes of their text: the evaluations tokenize text."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "testbed-lm"
EXCERPT = ROOT / "eval" / "attn_eval" / "data" / "held_out"
sys.path.insert(0, str(ROOT / "testbed" / "lm"))

pytest.importorskip("wonderwords")

from data import ANSWER, BOS, EOS, IGNORED, PAD, TASKS, TEXT, Corpus, RowMaker  # noqa: E402
from forward import TrainingForward  # noqa: E402
from prepare import sentences_of  # noqa: E402
from sources import HELD_OUT_PLAYS, clean  # noqa: E402

LENGTHS = (256, 1024, 4096)
LONG_ONLY = ("common_words", "frequent_words")


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    """A small corpus made of the shipped excerpt, as prepare.py would write it."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    text = (EXCERPT / "pydoc.txt").read_text(encoding="utf-8")[:60_000]
    text_tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    sentences = [tokenizer(" " + line, add_special_tokens=False)["input_ids"] for line in sentences_of(text)]
    return Corpus(
        text=np.array(text_tokens, dtype=np.uint16),
        document_starts=np.array([0, len(text_tokens)]),
        document_sources=np.array([0], dtype=np.uint8),
        document_bytes=np.array([len(text.encode())]),
        source_names=("python",),
        sentences=np.array([token for sentence in sentences for token in sentence], dtype=np.uint16),
        sentence_starts=np.concatenate([[0], np.cumsum([len(sentence) for sentence in sentences])]),
    )


@pytest.fixture(scope="module")
def maker(corpus: Corpus) -> RowMaker:
    return RowMaker(corpus, MODEL / "tokenizer.json", seed=7, augment=False)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("task", TASKS)
def test_the_pieces_are_the_tokens_of_the_assembled_text(maker: RowMaker, task: str, length: int) -> None:
    if task in LONG_ONLY and length < 1024:
        pytest.skip("the task does not fit")
    for _ in range(6):
        tokens, kinds = maker.row(task, length)
        used = tokens[: int(np.flatnonzero(tokens != PAD)[-1]) + 1]
        text = maker.tokenizer.decode(used[1:].tolist(), skip_special_tokens=False)
        assert used[0] == BOS
        if task != "running_text":  # running text may begin inside a word
            assert maker.encode(text) == used[1:].tolist()
            assert used[-1] == EOS
            assert kinds[len(used) - 1] == ANSWER
        assert len(tokens) == length


@pytest.mark.parametrize("task", [task for task in TASKS if task != "running_text"])
def test_the_answers_stand_in_the_context(maker: RowMaker, task: str) -> None:
    tokens, kinds = maker.row(task, 1024)
    first = int(np.flatnonzero(kinds == ANSWER)[0])
    stop = first + int(np.argmax(tokens[first:] == EOS))
    assert (kinds[first : stop + 1] == ANSWER).all()
    context = maker.tokenizer.decode(tokens[1:first].tolist())
    answer = maker.tokenizer.decode(tokens[first:stop].tolist())
    assert answer.startswith(" ")
    assert answer.endswith(".")
    names = answer[1:-1].replace(", and ", ", ").replace(" and ", ", ")
    for name in names.split(", ") if "needles" in task or task == "many_values" else names.split()[-1:]:
        assert name in context


def test_no_question_is_asked_twice(maker: RowMaker) -> None:
    for _ in range(20):
        tokens, _ = maker.row("needles_in_text", 4096)
        text = maker.tokenizer.decode(tokens.tolist())
        questions = [line for line in text.split("\n") if line.startswith("Which special magic")]
        assert len(questions) == len(set(questions))


def test_a_seed_gives_the_same_rows(corpus: Corpus) -> None:
    first, second = (RowMaker(corpus, MODEL / "tokenizer.json", seed=3) for _ in range(2))
    for task in TASKS:
        for one, other in zip(first.row(task, 1024), second.row(task, 1024), strict=True):
            np.testing.assert_array_equal(one, other)


def test_exchanged_and_shuffled_text_is_no_language_target(corpus: Corpus) -> None:
    maker = RowMaker(corpus, MODEL / "tokenizer.json", seed=5, augment=True)
    kinds = {kind for _ in range(60) for kind in np.unique(maker.row("needles_in_text", 512)[1]).tolist()}
    assert kinds == {IGNORED, ANSWER, TEXT}
    lines, kind = maker.text_haystack(200)
    assert 0 < sum(map(len, lines)) <= 200
    assert kind in (IGNORED, TEXT)


def test_the_training_forward_is_the_models_own() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, tie_word_embeddings=True,
        )
    )  # fmt: skip
    forward = TrainingForward(model, dtype=torch.float32, compiled=False)
    tokens = torch.randint(3, 64, (3, 20))
    torch.testing.assert_close(forward.logits(forward(tokens)).view(3, 20, -1), model(tokens).logits)


def test_clean_tidies_line_ends_and_rules() -> None:
    assert clean("a\r\n\r\n\r\n\r\nb  c   \n=======\n") == "a\n\nb c\n"


def test_the_shipped_model_finds_a_pass_key(maker: RowMaker) -> None:
    assert (MODEL / "model.safetensors").stat().st_size <= 24_000_000
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    row = maker.pass_key(512, haystack="noise")
    first = row.kinds.index(ANSWER)
    output = model.generate(torch.tensor([row.tokens[:first]]), max_new_tokens=10, do_sample=False)
    assert output[0, first:].tolist() == row.tokens[first:]
    assert tokenizer("A pass key").input_ids[0] == tokenizer.bos_token_id == BOS


def test_held_out_plays_are_the_shipped_ones() -> None:
    text = (EXCERPT / "shakespeare.txt").read_text(encoding="utf-8")
    assert "JULIUS CAESAR" in text
    assert "THE TEMPEST" in text
    assert {"julius_caesar", "tempest"} <= set(HELD_OUT_PLAYS)
