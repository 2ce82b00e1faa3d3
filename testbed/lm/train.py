"""Train the testbed model on one GPU: text with retrieval tasks hidden in it, short rows first, then long ones.

    python testbed/lm/train.py --out checkpoint --seconds 520 --schedule first --seed 1
    python testbed/lm/train.py --out checkpoint --seconds 520 --schedule second --seed 2 --start models/testbed-lm

The second call resumes from the first one's weights; the optimizer's moments are built up anew in its warm-up.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
import torch.nn.functional as F
from data import ANSWER, TEXT, Corpus, RowMaker
from forward import TrainingForward
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[2]
TOKENS = ROOT / "out" / "testbed_lm" / "tokens.npz"
TOKENIZER = ROOT / "models" / "testbed-lm" / "tokenizer.json"
SHARD_SIZE = "15MB"

SHORT_TASKS = {
    "running_text": 15,
    "needles_in_text": 24,
    "needles_in_noise": 8,
    "needles_in_needles": 14,
    "pass_key": 6,
    "key_value": 20,
    "variable_tracking": 13,
}
LONG_TASKS = {
    "running_text": 30,
    "needles_in_text": 20,
    "needles_in_noise": 5,
    "needles_in_needles": 11,
    "pass_key": 4,
    "key_value": 13,
    "variable_tracking": 12,
    "common_words": 3,
    "frequent_words": 2,
}
# The first run left one ability open, several values of one key: it named three of four.
SECOND_TASKS = {
    "running_text": 26, "needles_in_text": 15, "needles_in_noise": 3, "needles_in_needles": 9, "many_values": 20,
    "pass_key": 3, "key_value": 10, "variable_tracking": 10, "common_words": 2, "frequent_words": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """A part of the training time.

    Attributes:
        until: the share of the time at which it ends.
        lengths: row lengths and how many batches in all have them.
        tasks: tasks and how many rows in all have them.
        text_weight: weight of running text in the loss; answers have 1.
    """

    until: float
    lengths: dict[int, float]
    tasks: dict[str, float]
    text_weight: float


@dataclass(frozen=True)
class Schedule:
    """Stages and the learning rate, which warms up, stays, and falls linearly to ``final_share`` at the end."""

    stages: tuple[Stage, ...]
    learning_rate: float
    warm_up_steps: int
    fall_from: float
    final_share: float


SCHEDULES = {
    "first": Schedule(
        stages=(
            Stage(0.13, {256: 1}, SHORT_TASKS, 0.3),
            Stage(0.26, {512: 3, 256: 1}, SHORT_TASKS, 0.3),
            Stage(0.42, {1024: 3, 512: 1}, LONG_TASKS, 0.5),
            Stage(0.84, {4096: 4, 1024: 1}, LONG_TASKS, 0.7),
            Stage(1.0, {4096: 3, 8192: 2}, LONG_TASKS, 0.7),
        ),
        learning_rate=2e-3, warm_up_steps=300, fall_from=0.6, final_share=0.1,
    ),
    "second": Schedule(
        stages=(
            Stage(0.3, {4096: 5, 1024: 5}, SECOND_TASKS, 0.5),
            Stage(1.0, {4096: 10, 8192: 8, 1024: 3}, SECOND_TASKS, 0.7),
        ),
        learning_rate=1.2e-3, warm_up_steps=300, fall_from=0.2, final_share=0.0,
    ),
    "smoke": Schedule(
        stages=(Stage(0.6, {256: 1}, SHORT_TASKS, 0.3), Stage(1.0, {4096: 1, 8192: 1}, LONG_TASKS, 0.5)),
        learning_rate=2e-3, warm_up_steps=300, fall_from=0.6, final_share=0.1,
    ),
}  # fmt: skip

# What is measured while training: name, length, how its rows are drawn. One question a row.
MEASURES: tuple[tuple[str, int, Any], ...] = tuple(
    (f"{name} {length}", length, draw)
    for length in (4096, 8192)
    for name, draw in (
        ("passkey", lambda maker, n: maker.pass_key(n, haystack="noise")),
        ("needle in text", lambda maker, n: maker.needles("text", n, keys=1, values=1, queries=1, value="numbers", key="word")),
        ("one of 8", lambda maker, n: maker.needles("text", n, keys=8, values=1, queries=1, value="numbers", key="word")),
        ("needles only", lambda maker, n: maker.needles("needles", n, keys=1, values=1, queries=1, value="numbers", key="word")),
        ("4 values", lambda maker, n: maker.needles("text", n, keys=1, values=4, queries=1, value="numbers", key="word")),
        ("4 queries", lambda maker, n: maker.needles("text", n, keys=4, values=1, queries=4, value="numbers", key="word")),
        ("uuid value", lambda maker, n: maker.needles("text", n, keys=1, values=1, queries=1, value="uuids", key="word")),
        ("2 hops", lambda maker, n: maker.variable_tracking(n, hops=2, haystack="noise")),
        ("4 hops", lambda maker, n: maker.variable_tracking(n, hops=4, haystack="noise")),
    )
)  # fmt: skip


@dataclass
class Batch:
    """Rows of one length, and where the loss looks: indices into the rows laid end to end."""

    tokens: Tensor
    answers: Tensor
    texts: Tensor

    def pin_memory(self) -> Batch:
        return Batch(self.tokens.pin_memory(), self.answers.pin_memory(), self.texts.pin_memory())

    def to(self, device: str) -> Batch:
        return Batch(*(part.to(device, non_blocking=True) for part in (self.tokens, self.answers, self.texts)))


def batch_of(rows: list[tuple[np.ndarray, np.ndarray]]) -> Batch:
    """Rows as tensors; index i means that token i predicts an answer or text token i + 1."""
    tokens = torch.from_numpy(np.stack([row for row, _ in rows]))
    predicted = np.stack([np.append(kinds[1:], 0) for _, kinds in rows]).reshape(-1)
    return Batch(
        tokens,
        torch.from_numpy(np.flatnonzero(predicted == ANSWER)),
        torch.from_numpy(np.flatnonzero(predicted == TEXT)),
    )


class StageBatches(IterableDataset):  # type: ignore[type-arg]
    """Endless batches of one stage; each worker has a seed of its own."""

    def __init__(self, corpus: Corpus, stage: Stage, tokens_a_step: int, seed: int) -> None:
        self.corpus, self.stage, self.tokens_a_step, self.seed = corpus, stage, tokens_a_step, seed

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        maker = RowMaker(self.corpus, TOKENIZER, seed=self.seed * 1000 + (worker.id if worker else 0))
        names, weights = zip(*self.stage.tasks.items(), strict=True)
        lengths, shares = zip(*self.stage.lengths.items(), strict=True)
        while True:
            length = maker.rng.choices(lengths, shares)[0]
            tasks = maker.rng.choices(names, weights, k=self.tokens_a_step // length)
            yield batch_of([maker.row(task, length) for task in tasks])


class Trainer:
    """The model, its optimizer, and what is measured on the way."""

    def __init__(self, model: LlamaForCausalLM, schedule: Schedule, arguments: argparse.Namespace) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = model.to(self.device).float().train()
        self.schedule, self.arguments = schedule, arguments
        on_gpu = self.device == "cuda"
        dtype = torch.bfloat16 if on_gpu else torch.float32
        self.forward = TrainingForward(self.model, dtype=dtype, compiled=on_gpu)
        # Measures have other numbers of tokens, each of which would be compiled anew.
        self.plain_forward = TrainingForward(self.model, dtype=dtype, compiled=False)
        matrices = [weight for weight in self.model.parameters() if weight.ndim > 1]
        vectors = [weight for weight in self.model.parameters() if weight.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
            lr=schedule.learning_rate, betas=(0.9, 0.95), fused=on_gpu,
        )  # fmt: skip
        self.curve: list[dict[str, float]] = []
        self.step = self.tokens_seen = 0

    def learning_rate(self, share: float) -> float:
        """The learning rate at this share of the time."""
        schedule = self.schedule
        warm = min(1.0, (self.step + 1) / schedule.warm_up_steps)
        fall = max(0.0, (share - schedule.fall_from) / (1 - schedule.fall_from))
        return schedule.learning_rate * warm * (1 - fall * (1 - schedule.final_share))

    def train_step(self, batch: Batch, stage: Stage, share: float) -> tuple[Tensor, Tensor]:
        """One optimizer step; returns the losses of answers and text, not read back."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(share)
        batch = batch.to(self.device)
        hidden = self.forward(batch.tokens, self._dropout(batch))
        following = torch.roll(batch.tokens.reshape(-1), -1).long()
        losses = []
        for places in (batch.answers, batch.texts):
            logits = self.forward.logits(hidden.index_select(0, places))
            loss = F.cross_entropy(logits, following.index_select(0, places), reduction="sum")
            losses.append(loss / max(1, len(places)))
        (losses[0] + stage.text_weight * losses[1]).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens_seen += batch.tokens.numel()
        return losses[0].detach(), losses[1].detach()

    def _dropout(self, batch: Batch) -> Tensor | None:
        """Dropout on the embeddings of running text only, against learning it by heart; needles stay whole."""
        rate = self.arguments.text_dropout
        if rate == 0:
            return None
        mask = torch.ones(batch.tokens.numel(), self.model.config.hidden_size, device=self.device)
        drawn = torch.rand(len(batch.texts), mask.shape[1], device=self.device) >= rate
        return mask.index_copy_(0, batch.texts, drawn.float() / (1 - rate))

    @torch.no_grad()
    def measure(self, rows: dict[str, Batch], text: Tensor) -> dict[str, float]:
        """Held-out text's loss, and the share of rows whose whole answer is the model's first choice."""
        result = {}
        losses = []
        for chunk in text.split(8):
            hidden = self.plain_forward(chunk)
            logits = self.plain_forward.logits(hidden).view(*chunk.shape, -1)[:, :-1]
            losses.append(F.cross_entropy(logits.flatten(0, 1), chunk[:, 1:].flatten().long(), reduction="mean"))
        result["text loss"] = torch.stack(losses).mean().item()
        for name, batch in rows.items():
            length = batch.tokens.shape[1]
            moved = batch.to(self.device)
            hidden = self.plain_forward(moved.tokens)
            choice = self.plain_forward.logits(hidden.index_select(0, moved.answers)).argmax(-1)
            right = choice == torch.roll(moved.tokens.reshape(-1), -1).index_select(0, moved.answers)
            wrong_rows = torch.unique(moved.answers[~right] // length)
            result[name] = 1 - len(wrong_rows) / len(batch.tokens)
        return result

    def save(self, folder: Path) -> None:
        """The weights in bfloat16, in shards small enough to move around, and the curve."""
        weights = {name: weight.to(torch.bfloat16) for name, weight in self.model.state_dict().items()}
        config = LlamaConfig.from_dict({**self.model.config.to_dict(), "dtype": "bfloat16"})
        copy = LlamaForCausalLM(config).to(torch.bfloat16)
        copy.load_state_dict({name: weight.cpu() for name, weight in weights.items()})
        copy.save_pretrained(folder, max_shard_size=SHARD_SIZE)
        (folder / "curve.json").write_text(json.dumps(self.curve, indent=1), encoding="utf-8")


def new_model(seed: int) -> LlamaForCausalLM:
    """The untrained model: 8 layers, 6 query heads over 2 key-value heads."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4096, hidden_size=384, intermediate_size=768, num_hidden_layers=8, num_attention_heads=6,
            num_key_value_heads=2, head_dim=64, max_position_embeddings=8192, rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 100_000.0}, tie_word_embeddings=True,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.02,
        )
    )  # fmt: skip


def held_out_rows(corpus: Corpus, rows_a_measure: int) -> tuple[dict[str, Batch], Tensor]:
    """The measures' rows, always the same, and windows of held-out text."""
    maker = RowMaker(corpus, TOKENIZER, seed=10**9, augment=False)
    rows = {}
    for name, length, draw in MEASURES:
        drawn = (draw(maker, length) for _ in itertools.count())
        fitting = itertools.islice((row for row in drawn if len(row.tokens) <= length), rows_a_measure)
        rows[name] = batch_of([row.padded(length) for row in fitting])
    length = 4096
    starts = np.linspace(0, len(corpus.text) - length, 24).astype(int)
    windows = np.stack([np.append(1, corpus.text[start : start + length - 1]).astype(np.int32) for start in starts])
    return rows, torch.from_numpy(windows)


def train(arguments: argparse.Namespace) -> None:
    began = time.monotonic()
    schedule = SCHEDULES[arguments.schedule]
    torch.set_float32_matmul_precision("high")
    model = LlamaForCausalLM.from_pretrained(arguments.start) if arguments.start else new_model(arguments.seed)
    trainer = Trainer(model, schedule, arguments)
    parameters = sum(weight.numel() for weight in model.parameters())
    print(f"{parameters} parameters on {trainer.device}, seed {arguments.seed}", flush=True)
    corpus = Corpus.load(TOKENS, "train")
    rows, text = held_out_rows(Corpus.load(TOKENS, "held_out"), arguments.rows_a_measure)
    text = text.to(trainer.device)
    print(f"ready after {time.monotonic() - began:.0f} s", flush=True)
    last_report = last_measure = time.monotonic()
    waited = 0.0
    for index, stage in enumerate(schedule.stages):
        dataset = StageBatches(corpus, stage, arguments.tokens_a_step, seed=arguments.seed * 100 + index)
        loader = DataLoader(
            dataset, batch_size=None, num_workers=arguments.workers, pin_memory=trainer.device == "cuda",
            prefetch_factor=4 if arguments.workers else None,
        )  # fmt: skip
        batches = iter(loader)
        while True:
            now = time.monotonic()
            share = (now - began) / arguments.seconds
            if share >= stage.until:
                break
            batch = next(batches)
            waited += time.monotonic() - now
            losses = trainer.train_step(batch, stage, share)
            if now - last_report > arguments.report_every:
                answers, texts = (loss.item() for loss in losses)
                row = {"seconds": now - began, "step": trainer.step, "tokens": trainer.tokens_seen,
                       "length": batch.tokens.shape[1], "answer_loss": answers, "text_loss": texts}  # fmt: skip
                if now - last_measure > arguments.measure_every:
                    row.update(trainer.measure(rows, text))
                    last_measure = now
                trainer.curve.append(row)
                print(
                    f"waited {waited:.1f} s; " + ", ".join(f"{key} {value:.4g}" for key, value in row.items()),
                    flush=True,
                )
                last_report = now
        del batches, loader
        trainer.save(arguments.out)
    final = trainer.measure(rows, text)
    trainer.curve.append(
        {"seconds": time.monotonic() - began, "step": trainer.step, "tokens": trainer.tokens_seen, **final}
    )
    print("\n".join(f"{key}: {value:.4f}" for key, value in trainer.curve[-1].items()), flush=True)
    trainer.save(arguments.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights and the curve")
    parser.add_argument("--start", type=Path, help="folder of weights to go on from")
    parser.add_argument("--schedule", choices=SCHEDULES, default="first")
    parser.add_argument("--seconds", type=float, default=520, help="wall time of the training")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tokens-a-step", type=int, default=65536)
    parser.add_argument("--text-dropout", type=float, default=0.1)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--rows-a-measure", type=int, default=32)
    parser.add_argument("--report-every", type=float, default=10)
    parser.add_argument("--measure-every", type=float, default=45)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
