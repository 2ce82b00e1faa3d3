"""Download the texts, ship the held-out excerpt, train the tokenizer, and write the texts as tokens.

    python testbed/lm/prepare.py all

The steps (``download``, ``excerpt``, ``tokenizer``, ``tokens``) can also be run one by one. ``overlap``, not in ``all``,
adds to the model's measures how much of the held-out text the training text repeats.
"""

from __future__ import annotations

import argparse
import json
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import sources
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[2]
DOWNLOADS = ROOT / "out" / "testbed_lm" / "downloads"
TOKENS = ROOT / "out" / "testbed_lm" / "tokens.npz"
MODEL = ROOT / "models" / "testbed-lm"
EXCERPT = ROOT / "eval" / "attn_eval" / "data" / "held_out"

VOCABULARY = 4096
MAX_LENGTH = 8192
PAD, BOS, EOS = "<pad>", "<s>", "</s>"
EXCERPT_CHARACTERS = 200_000
EXCERPT_FILES = {"king_james": "kjv.txt", "python": "pydoc.txt", "shakespeare": "shakespeare.txt"}
# A sentence ends at . ! or ?, closing quotes and brackets included, where white space follows.
SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)\]]*\s+")
LONGEST_SENTENCE = 600
OVERLAP_WORDS = 8


def write_excerpt(documents: list[sources.Document]) -> None:
    """The beginning of the held-out documents of three sources, for the evaluations' haystack and perplexity."""
    EXCERPT.mkdir(parents=True, exist_ok=True)
    for source, file_name in EXCERPT_FILES.items():
        text = "\n".join(document.text for document in documents if document.source == source and document.held_out)
        end = text.rfind("\n\n", 0, EXCERPT_CHARACTERS) if len(text) > EXCERPT_CHARACTERS else len(text)
        (EXCERPT / file_name).write_text(text[:end].rstrip() + "\n", encoding="utf-8")


def train_tokenizer(documents: list[sources.Document]) -> None:
    """A byte-level BPE in which every digit is a token of its own, saved with the model."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True) for token in (PAD, BOS, EOS)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents if not document.held_out), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=MAX_LENGTH,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(MODEL)
    # The name of the class that transformers 4 and 5 both know.
    settings_file = MODEL / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings.pop("backend", None)
    settings_file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def sentences_of(text: str) -> list[str]:
    """The sentences with white space collapsed, as the evaluations put them into a haystack."""
    collapsed = (" ".join(sentence.split()) for sentence in SENTENCE_END.split(text))
    return [sentence for sentence in collapsed if 2 <= len(sentence) <= LONGEST_SENTENCE]


def tokenize_document(document: sources.Document) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Its tokens as it stands, and its sentences, each with a space before it, with their lengths."""
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    text = tokenizer.encode(document.text, add_special_tokens=False).ids
    sentences = [
        tokenizer.encode(" " + sentence, add_special_tokens=False).ids for sentence in sentences_of(document.text)
    ]
    flat = [token for sentence in sentences for token in sentence]
    return (
        np.array(text, dtype=np.uint16),
        np.array(flat, dtype=np.uint16),
        np.array([len(sentence) for sentence in sentences], dtype=np.uint16),
    )


def write_tokens(documents: list[sources.Document]) -> None:
    """All documents as tokens in one compressed file, the training part and the held-out part side by side."""
    names = sorted({document.source for document in documents})
    with ProcessPoolExecutor(max_workers=2) as pool:
        tokenized = list(pool.map(tokenize_document, documents, chunksize=16))
    arrays: dict[str, np.ndarray] = {"sources": np.array(names)}
    for part, held_out in (("train", False), ("held_out", True)):
        chosen = [index for index, document in enumerate(documents) if document.held_out is held_out]
        arrays[f"{part}_text"] = np.concatenate([tokenized[index][0] for index in chosen])
        arrays[f"{part}_text_lengths"] = np.array([len(tokenized[index][0]) for index in chosen], dtype=np.uint32)
        arrays[f"{part}_text_sources"] = np.array([names.index(documents[i].source) for i in chosen], dtype=np.uint8)
        arrays[f"{part}_text_bytes"] = np.array(
            [len(documents[index].text.encode()) for index in chosen], dtype=np.uint32
        )
        arrays[f"{part}_sentences"] = np.concatenate([tokenized[index][1] for index in chosen])
        arrays[f"{part}_sentence_lengths"] = np.concatenate([tokenized[index][2] for index in chosen])
        for name in names:
            of_source = [i for i in chosen if documents[i].source == name]
            characters = sum(len(documents[i].text) for i in of_source)
            tokens = sum(len(tokenized[i][0]) for i in of_source)
            print(f"{part} {name}: {len(of_source)} documents, {characters} characters, {tokens} tokens")
    np.savez_compressed(TOKENS, **arrays)


def write_overlap(documents: list[sources.Document]) -> None:
    """The share of held-out runs of words that stand in the training text too, by source, into ``metrics.json``."""

    def runs(document: sources.Document, step: int) -> list[int]:
        words = document.text.lower().split()
        return [hash(tuple(words[i : i + OVERLAP_WORDS])) for i in range(0, len(words) - OVERLAP_WORDS, step)]

    trained = {run for document in documents if not document.held_out for run in runs(document, 1)}
    shares = {}
    for source in sorted({document.source for document in documents}):
        held_out = [
            run
            for document in documents
            if document.source == source and document.held_out
            for run in runs(document, OVERLAP_WORDS)
        ]
        shares[source] = round(sum(run in trained for run in held_out) / len(held_out), 4)
    metrics_file = MODEL / "metrics.json"
    metrics = json.loads(metrics_file.read_text(encoding="utf-8")) if metrics_file.is_file() else {}
    metrics["overlap"] = {"words": OVERLAP_WORDS, "by_source": shares}
    metrics_file.write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="+", choices=("all", "download", "excerpt", "tokenizer", "tokens", "overlap"))
    steps = set(parser.parse_args().steps)
    if steps & {"all", "download"}:
        sources.download(DOWNLOADS)
    documents = list(sources.documents(DOWNLOADS))
    if steps & {"all", "excerpt"}:
        write_excerpt(documents)
    if steps & {"all", "tokenizer"}:
        train_tokenizer(documents)
    if steps & {"all", "tokens"}:
        write_tokens(documents)
    if "overlap" in steps:
        write_overlap(documents)


if __name__ == "__main__":
    main()
