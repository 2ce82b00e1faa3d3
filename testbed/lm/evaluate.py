"""Measure the trained model on held-out text and seeds, and write ``metrics.json`` and the model card's tables.

python testbed/lm/evaluate.py rows                    # the evaluations' own tasks, as files (needs attn-hooks[eval])
python testbed/lm/evaluate.py measure [--model DIR] [--out metrics.json]     # on a GPU if there is one
python testbed/lm/evaluate.py card                    # prints the tables into models/testbed-lm/README.md
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "eval"))
MODEL = ROOT / "models" / "testbed-lm"
ROWS = ROOT / "out" / "testbed_lm" / "rows"
TOKENS = ROOT / "out" / "testbed_lm" / "tokens.npz"

LENGTHS = (4096, 8192)
SAMPLES = 100
SEED = 20_000

# Label, the task's settings, and the score that issue 2 asks for at 4096 and 8192.
_RANDOM_START = {"start": "random"}
TASKS: dict[str, dict[str, Any]] = {
    "passkey": {"task": "passkey"},
    "niah_single_1": {"task": "niah_single_1"},
    "niah_single_2": {"task": "niah_single_2", **_RANDOM_START},
    "niah_single_3": {"task": "niah_single_3", **_RANDOM_START},
    "niah_multikey_1": {"task": "niah_multikey_1", **_RANDOM_START},
    "niah_one_of_8": {"task": "niah_multikey_1", "keys": 8, **_RANDOM_START},
    "niah_multikey_2": {"task": "niah_multikey_2"},
    "niah_multikey_3": {"task": "niah_multikey_3"},
    "niah_multivalue": {"task": "niah_multivalue", **_RANDOM_START},
    "niah_multiquery": {"task": "niah_multiquery", **_RANDOM_START},
    "key_value_uuid": {"task": "key_value"},
    "key_value_number": {"task": "key_value", "key": "word", "value": "number"},
    "tracking_2_hops": {"task": "variable_tracking", "hops": 2, "example_tokens": 0},
    "tracking_4_hops": {"task": "variable_tracking"},
    # With its example, this task's smallest question has 4177 tokens.
    "common_words": {"task": "common_words", "example": False},
    "frequent_words": {"task": "frequent_words"},
}
BARS: dict[str, tuple[float | None, float | None]] = {
    "passkey": (0.99, 0.85),
    "niah_single_1": (0.99, 0.85),
    "niah_single_2": (0.99, 0.85),
    "niah_one_of_8": (0.95, None),
    "niah_multivalue": (0.85, None),
    "niah_multiquery": (0.85, None),
    "tracking_2_hops": (0.80, None),
}
TEXT_LOSS_BAR = 3.6

WINDOW = 8192
POSITION_EDGES = (1, 64, 256, 1024, 2048, 4096, 6144, 8192)
LOCAL_WINDOWS = (256, 1024)
LOCAL_LENGTH = 4096
SINKS = 4
MEASURES = ("text", "sinks", "local_window", "retrieval_heads", "retrieval")
HEAD_LENGTH = 2048
HEAD_ROWS = 16


# ---------------------------------------------------------------------------------------------- rows


def write_rows(label: str) -> str:
    """The rows of one task at all lengths, as the evaluations generate them."""
    from transformers import AutoTokenizer

    from attn_eval.tasks import build_task

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    began = time.monotonic()
    for length in LENGTHS:
        task: Any = build_task({**TASKS[label], "lengths": [length], "samples": SAMPLES})
        rows = task.generate(tokenizer, length, SAMPLES, SEED)
        with gzip.open(ROWS / f"{label}-{length}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(row.to_json() + "\n" for row in rows)
    return f"{label}: {time.monotonic() - began:.0f} s"


def read_rows(label: str, length: int) -> list[dict[str, Any]]:
    """Rows as dictionaries."""
    with gzip.open(ROWS / f"{label}-{length}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


# ---------------------------------------------------------------------------------------------- measures


class Measurement:
    """The model on its device, and what is measured of it."""

    def __init__(self, folder: Path, samples: int, tasks: list[str], lengths: list[int]) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.torch = torch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        self.tokenizer = AutoTokenizer.from_pretrained(MODEL)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=self.dtype).to(self.device).eval()
        self.samples, self.tasks, self.lengths = samples, tasks, lengths

    def retrieval(self) -> dict[str, dict[str, dict[str, float]]]:
        """Greedy generation, scored by the evaluations' rules: each task's mean score at each length."""
        from attn_eval.scoring import first_integer_match, string_match_all

        scores: dict[str, dict[str, dict[str, float]]] = {}
        for label in self.tasks:
            scores[label] = {}
            for length in self.lengths:
                rows = read_rows(label, length)[: self.samples]
                answers = self.generate(rows, batch=50 if length > 4096 else 100)
                score = [
                    first_integer_match(answer, row["outputs"][0])
                    if label == "passkey"
                    else string_match_all(answer, row["outputs"])
                    for row, answer in zip(rows, answers, strict=True)
                ]
                scores[label][str(length)] = {"score": round(sum(score) / len(score), 4), "samples": len(score)}
            print(label, scores[label], flush=True)
        return scores

    def generate(self, rows: list[dict[str, Any]], batch: int) -> list[str]:
        """What the model writes, greedily."""
        answers: list[str] = []
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            texts = [row["input"] + row["answer_prefix"] for row in part]
            inputs = self.tokenizer(texts, return_tensors="pt", padding=True).to(self.device)
            inputs.pop("token_type_ids", None)
            with self.torch.inference_mode():
                output = self.model.generate(**inputs, max_new_tokens=part[0]["new_tokens"], do_sample=False)
            answers += self.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return answers

    def text(self) -> dict[str, Any]:
        """Loss on held-out text by source and by position, and bits a byte by source."""
        import numpy as np

        windows_by_source, bytes_a_token = self._windows()
        totals: dict[str, Any] = {"by_source": {}, "by_position": {}}
        every = []
        for source, windows in windows_by_source.items():
            losses = np.concatenate([self._losses(window) for window in windows])
            nats = float(losses.mean())
            bits = nats / np.log(2) / bytes_a_token[source]
            totals["by_source"][source] = {
                "nats_a_token": round(nats, 4), "bits_a_byte": round(float(bits), 4),
                "tokens": int(losses.size), "bytes_a_token": round(bytes_a_token[source], 3),
            }  # fmt: skip
            every.append(losses)
        together = np.concatenate(every)
        totals["nats_a_token"] = round(float(together.mean()), 4)
        full = np.concatenate([losses for losses in every if losses.shape[1] == WINDOW - 1])
        for low, high in itertools.pairwise(POSITION_EDGES):
            totals["by_position"][f"{low}-{high - 1}"] = round(float(full[:, low - 1 : high - 1].mean()), 4)
        return totals

    def _windows(self) -> tuple[dict[str, list[Any]], dict[str, float]]:
        """BOS and held-out text of one source, cut into windows; bytes a token of the source."""
        import numpy as np
        from data import BOS, Corpus

        corpus = Corpus.load(TOKENS, "held_out")
        windows, bytes_a_token = {}, {}
        for index, source in enumerate(corpus.source_names):
            chosen = np.flatnonzero(corpus.document_sources == index)
            tokens = np.concatenate(
                [corpus.text[corpus.document_starts[i] : corpus.document_starts[i + 1]] for i in chosen]
            ).astype(np.int64)
            bytes_a_token[source] = float(corpus.document_bytes[chosen].sum() / len(tokens))
            count = len(tokens) // (WINDOW - 1)
            cut = tokens[: count * (WINDOW - 1)].reshape(count, WINDOW - 1)
            cut = cut[: max(1, min(count, self.samples))]
            windows[source] = np.split(np.concatenate([np.full((len(cut), 1), BOS), cut], axis=1), len(cut))
        return windows, bytes_a_token

    def _losses(self, window: Any, mask: Any = None) -> Any:
        """Loss of every token but BOS, (1, window - 1)."""
        torch = self.torch
        tokens = torch.from_numpy(window).to(self.device)
        with torch.inference_mode():
            logits = self.model(tokens, attention_mask=mask, use_cache=False).logits
            return (
                torch.nn.functional.cross_entropy(logits[0, :-1].float(), tokens[0, 1:], reduction="none")[None]
                .cpu()
                .numpy()
            )

    def sinks(self) -> dict[str, Any]:
        """The share of attention on BOS, by layer and head, for held-out text, queries from position 256 on."""
        torch = self.torch
        windows, _ = self._windows()
        self.model.set_attn_implementation("eager")
        shares = []
        for source_windows in windows.values():
            tokens = torch.from_numpy(source_windows[0][:, :HEAD_LENGTH]).to(self.device)
            with torch.inference_mode():
                attentions = self.model(tokens, output_attentions=True, use_cache=False).attentions
            shares.append(torch.stack([layer[0, :, 256:, 0].float().mean(-1) for layer in attentions]))
        self.model.set_attn_implementation("sdpa")
        mean = torch.stack(shares).mean(0).cpu()
        return {
            "bos_share_by_layer_and_head": [[round(share, 4) for share in layer] for layer in mean.tolist()],
            "bos_share_by_layer": [round(share, 4) for share in mean.mean(1).tolist()],
            "bos_share_of_even_attention": round(
                float(sum(1 / n for n in range(257, HEAD_LENGTH + 1)) / (HEAD_LENGTH - 256)), 5
            ),
        }

    def local_window(self) -> dict[str, Any]:
        """Loss of held-out text at positions past the window: all keys, a window alone, a window and the first keys."""
        import numpy as np

        torch = self.torch
        windows, _ = self._windows()
        length = LOCAL_LENGTH
        result: dict[str, Any] = {}
        query, key = torch.arange(length)[:, None], torch.arange(length)[None]
        for window in LOCAL_WINDOWS:
            near = (key <= query) & (key > query - window)
            masks = {
                "all keys": key <= query,
                "window": near,
                f"window and first {SINKS}": near | ((key < SINKS) & (key <= query)),
            }
            result[str(window)] = {}
            for name, mask in masks.items():
                losses = [
                    self._losses(one[:, :length], mask[None, None].to(self.device))[:, window:]
                    for source_windows in windows.values()
                    for one in source_windows[:2]
                ]
                result[str(window)][name] = round(float(np.concatenate(losses).mean()), 4)
        return result

    def retrieval_heads(self) -> dict[str, Any]:
        """How often each head's most attended key is the very token that is copied next, in one needle of 8 in text.

        The answer is given, so every head is asked about the same tokens; a share of 1 is a head that always looks
        at the next digit of the needle.
        """
        import random

        from data import IGNORED, Corpus, RowMaker

        torch = self.torch
        maker = RowMaker(Corpus.load(TOKENS, "held_out"), MODEL / "tokenizer.json", seed=SEED, augment=False)
        random.seed(SEED)
        self.model.set_attn_implementation("eager")
        hits = torch.zeros(self.model.config.num_hidden_layers, self.model.config.num_attention_heads)
        asked = 0
        for _ in range(min(HEAD_ROWS, self.samples)):
            row = maker.needles("text", HEAD_LENGTH, keys=8, values=1, queries=1, value="numbers", key="word")
            answer = next(index for index, kind in enumerate(row.kinds) if kind not in (IGNORED, 2))
            value = row.tokens[answer : answer + 8]
            place = next(index for index in range(answer) if row.tokens[index : index + 8] == value)
            tokens = torch.tensor([row.tokens[: answer + 8]], device=self.device)
            with torch.inference_mode():
                attentions = self.model(tokens, output_attentions=True, use_cache=False).attentions
            for digit in range(1, 8):
                for index, layer in enumerate(attentions):
                    top = layer[0, :, answer + digit - 1].argmax(-1).cpu()
                    hits[index] += top == place + digit
                asked += 1
        self.model.set_attn_implementation("sdpa")
        share = hits / asked
        ranked = sorted(
            ((float(share[i, j]), i, j) for i in range(share.shape[0]) for j in range(share.shape[1])), reverse=True
        )
        return {
            "share_by_layer_and_head": [[round(value, 3) for value in layer] for layer in share.tolist()],
            "best": [{"layer": i, "head": j, "share": round(value, 3)} for value, i, j in ranked[:8]],
            "length": HEAD_LENGTH,
            "tokens_asked": asked,
        }


def measure(arguments: argparse.Namespace) -> None:
    began = time.monotonic()
    measurement = Measurement(arguments.model, arguments.samples, arguments.tasks, arguments.lengths)
    metrics: dict[str, Any] = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.add else {
        "parameters": sum(weight.numel() for weight in measurement.model.parameters()),
        "device": measurement.device, "dtype": str(measurement.dtype), "samples": arguments.samples, "seed": SEED,
    }  # fmt: skip
    for name in MEASURES:
        if name in arguments.only:
            measured = getattr(measurement, name)()
            metrics[name] = {**metrics.get(name, {}), **measured}
            arguments.out.write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
            print(name, f"{time.monotonic() - began:.0f} s", json.dumps(metrics[name])[:3000], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    made = steps.add_parser("rows")
    made.add_argument("--processes", type=int, default=os.cpu_count())
    made.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    measured = steps.add_parser("measure")
    measured.add_argument("--model", type=Path, default=MODEL)
    measured.add_argument("--out", type=Path, default=MODEL / "metrics.json")
    measured.add_argument("--samples", type=int, default=SAMPLES)
    measured.add_argument("--only", nargs="+", choices=MEASURES, default=MEASURES)
    measured.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    measured.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    measured.add_argument("--add", action="store_true", help="add to what the file holds, in place of a new one")
    steps.add_parser("card")
    arguments = parser.parse_args()
    if arguments.step == "rows":
        ROWS.mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor(arguments.processes) as pool:
            for line in pool.map(write_rows, arguments.tasks):
                print(line, flush=True)
    elif arguments.step == "measure":
        measure(arguments)
    else:
        from card import write_card

        write_card(MODEL, BARS, TEXT_LOSS_BAR)


if __name__ == "__main__":
    main()
