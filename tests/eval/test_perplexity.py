"""Likelihoods against the model's own logits, windows and strides, buckets, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import Gemma2Config, Gemma2ForCausalLM

from attn_eval.errors import EvaluationError
from attn_eval.haystack import get_haystack
from attn_eval.perplexity import PerplexityTask, WindowScore, decode_nll, prefill_nll, summarise


def make_task(source: str, **parameters: Any) -> PerplexityTask:
    return PerplexityTask(**{"task": "perplexity", "lengths": [64], "samples": 3, "source": source, **parameters})


def literal_nll(model: Any, ids: Any) -> Any:
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")


def test_prefill_in_chunks_equals_all_logits_at_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attn_eval.perplexity.POSITIONS_PER_CHUNK", 7)
    ids = torch.randint(3, 250, (1, 33))
    torch.testing.assert_close(prefill_nll(model, ids), literal_nll(model, ids))


def test_decode_equals_prefill_without_edits(model: Any) -> None:
    ids = torch.randint(3, 250, (1, 20))
    torch.testing.assert_close(decode_nll(model, ids, 5), literal_nll(model, ids)[4:], rtol=1e-4, atol=1e-4)


def test_soft_capped_logits_are_made_as_the_model_makes_them() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8, "vocab_size": 99}
    model = Gemma2ForCausalLM(Gemma2Config(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    model.get_output_embeddings().weight.data.mul_(200)
    ids = torch.randint(3, 99, (1, 12))
    torch.testing.assert_close(prefill_nll(model, ids), literal_nll(model, ids))


def test_logits_of_an_unknown_kind_are_refused(model: Any) -> None:
    head = model.get_output_embeddings()
    forward = type(model).forward

    class Shifted(type(model)):  # type: ignore[misc]
        def forward(self, *arguments: Any, **options: Any) -> Any:
            output = forward(self, *arguments, **options)
            output.logits = output.logits * 3 + 1
            return output

    other = Shifted(model.config)
    other.set_output_embeddings(head)
    with pytest.raises(EvaluationError, match="makes its logits in a way"):
        prefill_nll(other, torch.randint(3, 250, (1, 9)))


def test_windows_without_overlap_score_every_token_and_byte(haystack_file: str, tokenizer: Any, model: Any) -> None:
    task = make_task(haystack_file)
    windows = task.windows(tokenizer, 64, 3, seed=5)
    assert task.windows(tokenizer, 64, 1, seed=5) == windows[:1]
    assert task.windows(tokenizer, 64, 3, seed=6) != windows
    assert len({window.token_ids for window in windows}) == 3
    for window in windows:
        assert window.token_ids[0] == tokenizer.bos_token_id
        assert (len(window.token_ids), window.scored_from, window.scored_bytes) == (64, 1, 63)
    score = task.measure(model, windows[0])
    assert score.tokens == 63
    assert score.nll == pytest.approx(float(literal_nll(model, torch.tensor([windows[0].token_ids])).sum()), rel=1e-4)


def test_strided_windows_score_each_token_once(haystack_file: str, tokenizer: Any) -> None:
    windows = make_task(haystack_file, stride=16, add_bos=False).windows(tokenizer, 64, 3, seed=0)
    text = get_haystack(haystack_file).text
    assert [tokenizer.decode(window.token_ids) for window in windows] == [text[i : i + 64] for i in (0, 16, 32)]
    assert [window.scored_from for window in windows] == [1, 48, 48]
    assert [window.scored_bytes for window in windows] == [63, 16, 16]


def test_decode_mode_scores_behind_the_prompt(haystack_file: str, tokenizer: Any, model: Any) -> None:
    task = make_task(haystack_file, mode="decode", prompt_tokens=60)
    window = task.windows(tokenizer, 64, 1, seed=0)[0]
    score = task.measure(model, window)
    assert (window.scored_from, score.tokens, score.scored_bytes) == (60, 4, 4)


def test_position_buckets_double(haystack_file: str, tokenizer: Any, model: Any) -> None:
    task = make_task(haystack_file, lengths=[2100], samples=1)
    score = task.measure(model, task.windows(tokenizer, 2100, 1, seed=0)[0])
    assert {name: tokens for name, (_, tokens) in score.buckets.items()} == {
        "0-1024": 1023,
        "1024-2048": 1024,
        "2048-4096": 52,
    }
    assert sum(nll for nll, _ in score.buckets.values()) == pytest.approx(score.nll, rel=1e-5)


def test_the_mean_is_over_tokens() -> None:
    summary = summarise([WindowScore(10.0, 10, 20, {"0-1024": (10.0, 10)}), WindowScore(60.0, 30, 60, {})])
    assert summary["nats_per_token"] == pytest.approx(70 / 40)
    assert summary["bits_per_byte"] == pytest.approx(70 / 80 / 0.693147, rel=1e-5)


def test_what_can_not_be_measured_is_refused(haystack_file: str, tokenizer: Any) -> None:
    with pytest.raises(EvaluationError, match=r"has \d+ windows of 64 tokens"):
        make_task(haystack_file).windows(tokenizer, 64, 10_000, seed=0)
    with pytest.raises(ValidationError, match="prompt_tokens is for mode: decode"):
        make_task(haystack_file, prompt_tokens=3)
    with pytest.raises(ValidationError, match="no token to score"):
        make_task(haystack_file, lengths=[1])
    with pytest.raises(ValidationError, match="stride"):
        make_task(haystack_file, stride=65)
