"""Examples as tokens: what is learned, what is asked, and log-probabilities counted by hand."""

from __future__ import annotations

import math
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from attn_eval.training.encoding import (
    IGNORED,
    CompletionCollator,
    OpenPromptEncoder,
    PreferenceCollator,
    completion_features,
    encode_pair,
    preference_features,
    sequence_log_probabilities,
)
from attn_eval.training.examples import Completion, Preference


def test_the_completion_alone_is_learned_with_the_end_behind_it(tokenizer: Any) -> None:
    (features,) = completion_features(OpenPromptEncoder(tokenizer), [Completion("a", "ab", " c", (" c",))])
    assert tokenizer.decode(features["input_ids"]) == "ab c<eos>"
    assert features["labels"] == [IGNORED, IGNORED, *features["input_ids"][2:]]


def test_a_token_across_the_border_leaves_the_prompt_as_it_is_asked() -> None:
    inner = Tokenizer(models.BPE(vocab={"A": 0, ":": 1, "k": 2, ":k": 3, "</s>": 4}, merges=[(":", "k")]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    # One word, so that the merge is made.
    inner.pre_tokenizer = pre_tokenizers.Split("~", "isolated")
    merging = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    assert merging("A:k")["input_ids"] == [0, 3]
    pair = encode_pair(OpenPromptEncoder(merging), "A:", "k", end=True)
    assert (pair.prompt, pair.continuation) == ([0, 1], [2, 4])


def test_an_end_that_the_tokenizer_adds_is_not_part_of_a_prompt(tokenizer: Any) -> None:
    class Closing:
        eos_token_id, chat_template = tokenizer.eos_token_id, None

        def __call__(self, text: str, **options: Any) -> Any:
            return {"input_ids": [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]}

    assert OpenPromptEncoder(Closing()).encode("ab") == tokenizer("ab")["input_ids"]


def test_batches_are_padded_on_the_right_and_nothing_is_learned_there(tokenizer: Any) -> None:
    encoder = OpenPromptEncoder(tokenizer)
    features = completion_features(encoder, [Completion("a", "a", "b", ("b",)), Completion("b", "abc", "d", ("d",))])
    batch = CompletionCollator(0)(features)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["labels"][0, 3:].tolist() == [IGNORED, IGNORED]
    pairs = preference_features(encoder, [Preference("1", "a", "b", "cd"), Preference("2", "e", "f", "g")])
    for feature, reference in zip(pairs, ((-1.0, -2.0), (-3.0, -4.0)), strict=True):
        feature["reference"] = reference
    batch = PreferenceCollator(0)(pairs)
    assert [tokenizer.decode(row, skip_special_tokens=True) for row in batch["input_ids"]] == ["ab", "ef", "acd", "eg"]
    assert batch["reference"].tolist() == [-1.0, -3.0, -2.0, -4.0]


def test_log_probabilities_by_hand() -> None:
    # Three positions, two tokens; position t predicts the label of t + 1.
    shares = torch.tensor([[[0.25, 0.75], [0.5, 0.5], [0.9, 0.1]], [[0.2, 0.8], [0.6, 0.4], [0.9, 0.1]]])
    labels = torch.tensor([[IGNORED, 1, 0], [IGNORED, IGNORED, 1]])
    found = sequence_log_probabilities(shares.log() + 3.0, labels)
    torch.testing.assert_close(found, torch.tensor([math.log(0.75 * 0.5), math.log(0.4)]))
