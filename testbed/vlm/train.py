"""Train the testbed model on one GPU, on scenes and texts that the GPU draws itself.

    python -m testbed.vlm.train --out out/vlm_1 --minutes 8.2
    python -m testbed.vlm.train --out out/vlm_2 --minutes 8.2 --start out/vlm_1/final.safetensors --seed 2 --learning-rate 6e-4

It writes ``curve.json`` and one file of weights a checkpoint, ``at_10.safetensors`` to ``final.safetensors``, side by side;
``testbed.vlm.export`` makes a model's folder of one. The second call goes on from the first one's weights; the optimizer's
moments are built up anew in its warm-up. The whole process ends within ``--minutes`` of its start: checkpoints are written
before anything is measured on them.
"""

from __future__ import annotations

import time

BEGAN = time.monotonic()

import argparse  # noqa: E402
import json  # noqa: E402
import traceback  # noqa: E402
import zlib  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from testbed.vlm import MODEL  # noqa: E402
from testbed.vlm.layout import draw_layouts  # noqa: E402
from testbed.vlm.measure import QUESTION_LENGTH, Examiner  # noqa: E402
from testbed.vlm.model import SlotForward, load_weights, new_model, save_weights  # noqa: E402
from testbed.vlm.render import Renderer, pixel_values  # noqa: E402
from testbed.vlm.splits import DIFFICULTY, MEASURED, SPLITS, TRAIN_SEED  # noqa: E402
from testbed.vlm.text import Tokens, Writer  # noqa: E402

CAPTION_LENGTH = 74
QUESTIONS = 5
# Scenes, texts and pictures of several steps are drawn at once: many small kernels, whose launches would cost more.
STEPS_A_DRAW = 8


def seconds() -> float:
    return time.monotonic() - BEGAN


def log(**values: Any) -> None:
    print(json.dumps({"seconds": round(seconds(), 1), **values}), flush=True)


class Batches:
    """Endless training batches: pictures uint8, slot tokens, and where the answers are."""

    def __init__(self, tokenizer: Tokenizer, device: torch.device, seed: int, batch: int, *, compiled: bool) -> None:
        self.device, self.seed, self.batch = device, TRAIN_SEED + 10_000 * seed, batch
        self.renderer = Renderer(device, DIFFICULTY, compiled=compiled)
        self.writer, self.tokens = Writer(device), Tokens(tokenizer, device)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        count, start = self.batch * STEPS_A_DRAW, 0
        while True:
            indices = torch.arange(start, start + count, dtype=torch.int32, device=self.device)
            layout = draw_layouts(self.seed, indices, broken=False, difficulty=DIFFICULTY)
            writer = self.writer
            texts = [
                (writer.caption(layout, "caption"), CAPTION_LENGTH),
                *((writer.exist(layout, f"exist {i}"), QUESTION_LENGTH) for i in range(QUESTIONS - 2)),
                (writer.number_or_colour(layout, "number or colour"), QUESTION_LENGTH),
                (writer.position(layout, "position"), QUESTION_LENGTH),
            ]
            slots = [self.tokens(text, length) for text, length in texts]
            tokens, answers = (torch.cat([slot[part] for slot in slots], dim=1) for part in (0, 1))
            pictures = self.renderer(layout)
            yield from zip(*(values.split(self.batch) for values in (pictures, tokens, answers)), strict=True)
            start += count


class Losses(nn.Module):
    """Mean loss of the captions' tokens and of the questions' answers."""

    def __init__(self, slots: SlotForward) -> None:
        super().__init__()
        self.slots = slots

    def forward(self, pictures: Tensor, tokens: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.slots(pixel_values(pictures), tokens)[:, :-1]
        target, weight = tokens[:, 1:], answers[:, 1:].float()
        loss = (
            F.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), reduction="none").view_as(weight) * weight
        )
        caption = CAPTION_LENGTH - 1
        return tuple(  # type: ignore[return-value]
            loss[:, part].sum() / weight[:, part].sum() for part in (slice(0, caption), slice(caption, None))
        )


class Trainer:
    """The model, its optimizer, and what is measured on the way."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.out = Path(arguments.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
        model = (
            load_weights(Path(arguments.start), self.tokenizer)
            if arguments.start
            else new_model(self.tokenizer, arguments.seed)
        )
        self.model = model.to(self.device).train()
        self.on_gpu = self.device.type == "cuda"
        lengths = (CAPTION_LENGTH, *(QUESTION_LENGTH,) * QUESTIONS)
        self.losses: nn.Module = Losses(SlotForward(self.model, self.tokenizer, lengths, self.device))
        if arguments.compile:
            self.losses = torch.compile(self.losses, dynamic=False)  # type: ignore[assignment]
        matrices = [weight for weight in self.model.parameters() if weight.ndim > 1]
        vectors = [weight for weight in self.model.parameters() if weight.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}],
            lr=arguments.learning_rate, betas=(0.9, 0.95), fused=self.on_gpu,
        )  # fmt: skip
        self.examiner = Examiner(self.model, self.tokenizer, self.device, autocast=self.on_gpu)
        self.step = 0
        self.curve: list[dict[str, Any]] = []

    def learning_rate(self, share: float) -> float:
        """Warm-up by steps, a plateau, and a linear fall by the share of the time."""
        given = self.arguments
        warm = min(1.0, (self.step + 1) / given.warm_up)
        fall = max(0.0, (share - given.fall_from) / (1 - given.fall_from))
        return given.learning_rate * warm * (1 - fall * (1 - given.final_share))

    def train_step(self, batch: tuple[Tensor, Tensor, Tensor], share: float) -> tuple[Tensor, Tensor]:
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(share)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.on_gpu):
            caption, answer = self.losses(*batch)
        (caption + answer).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return caption.detach(), answer.detach()

    def save(self, name: str) -> None:
        save_weights(self.model, self.out / f"{name}.safetensors")
        log(saved=name, step=self.step)

    def measure(self, scenes: int) -> None:
        """Measure on the first scenes of both held-out splits; an error is printed and costs no training."""
        began = seconds()
        self.model.eval()
        result: dict[str, Any] = {"seconds": round(began, 1), "step": self.step}
        try:
            renderer = Renderer(self.device, DIFFICULTY)
            for split in (SPLITS[name] for name in MEASURED):
                layout = split.layout(self.device)[:scenes]
                pictures = torch.cat([renderer(layout[start : start + 125]) for start in range(0, len(layout), 125)])
                # The pictures are the same on every device; this shows it.
                result[split.name] = {"pixels": zlib.crc32(pictures.cpu().numpy().tobytes())}
                result[split.name] |= self.examiner.report(layout, pictures)
        except Exception:
            traceback.print_exc()
        self.model.train()
        self.curve.append(result)
        log(
            step=self.step,
            measured={k: v for k, v in result.items() if k in MEASURED},
            took=round(seconds() - began, 1),
        )
        self.write()

    def write(self) -> None:
        about = {**vars(self.arguments), "parameters": sum(weight.numel() for weight in self.model.parameters())}
        (self.out / "curve.json").write_text(
            json.dumps({"run": about, "curve": self.curve}, indent=1), encoding="utf-8"
        )


def train(arguments: argparse.Namespace) -> None:
    torch.set_float32_matmul_precision("high")
    trainer = Trainer(arguments)
    log(parameters=sum(weight.numel() for weight in trainer.model.parameters()), device=str(trainer.device))
    batches = iter(
        Batches(trainer.tokenizer, trainer.device, arguments.seed, arguments.batch, compiled=arguments.compile)
    )
    until = 60 * arguments.minutes - arguments.reserve
    save_at = sorted(float(share) for share in arguments.save_at.split(",") if share)
    first = next(batches)
    log(ready="data", shapes=[list(part.shape) for part in first])
    trainer.train_step(first, 0.0)
    began = last_report = last_measure = seconds()
    log(ready="first step")
    reported_step = trainer.step
    while seconds() < until and (arguments.steps is None or trainer.step < arguments.steps):
        share = (seconds() - began) / (until - began)
        losses = trainer.train_step(next(batches), share)
        now = seconds()
        if now - last_report > arguments.report_every:
            caption, answer = (loss.item() for loss in losses)
            now = seconds()
            row = {"seconds": round(now, 1), "step": trainer.step, "caption_loss": round(caption, 4),
                   "answer_loss": round(answer, 4)}  # fmt: skip
            trainer.curve.append(row)
            log(**row, steps_a_second=round((trainer.step - reported_step) / (now - last_report), 2),
                learning_rate=round(trainer.learning_rate(share), 6))  # fmt: skip
            last_report, reported_step = now, trainer.step
        if save_at and share >= save_at[0]:
            trainer.save(f"at_{round(100 * save_at.pop(0))}")
        if now - last_measure > arguments.measure_every and until - now > arguments.measure_every / 2:
            trainer.measure(arguments.scenes)
            last_measure = last_report = seconds()
            reported_step = trainer.step
    trainer.save("final")
    trainer.write()
    trainer.measure(arguments.final_scenes)
    log(done=True, steps=trainer.step)


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", required=True)
    options.add_argument("--minutes", type=float, default=8.2, help="of the whole process")
    options.add_argument("--reserve", type=float, default=22, help="seconds of them for the last save and measure")
    options.add_argument("--steps", type=int, help="end after so many steps")
    options.add_argument("--start", help="a checkpoint's file of weights, to go on from")
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--batch", type=int, default=512)
    options.add_argument("--learning-rate", type=float, default=1e-3)
    options.add_argument("--warm-up", type=int, default=300, help="steps")
    options.add_argument("--fall-from", type=float, default=0.5, help="share of the time")
    options.add_argument("--final-share", type=float, default=0.03, help="of the learning rate at the end")
    options.add_argument("--save-at", default="0.15,0.4", help="shares of the time; the end is saved anyway")
    options.add_argument("--measure-every", type=float, default=60, help="seconds")
    options.add_argument("--report-every", type=float, default=10, help="seconds")
    options.add_argument("--scenes", type=int, default=250, help="of each split, measured on the way")
    options.add_argument("--final-scenes", type=int, default=500)
    options.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    options.add_argument("--smoke", action="store_true", help="a few steps on small batches, on a CPU")
    return options


def main() -> None:
    arguments = parser().parse_args()
    if arguments.smoke:
        arguments.batch, arguments.steps, arguments.compile = 2, 3, False
        arguments.scenes = arguments.final_scenes = 4
        arguments.report_every = arguments.measure_every = 0
        arguments.minutes, arguments.reserve = 30, 0
    train(arguments)


if __name__ == "__main__":
    main()
