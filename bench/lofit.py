"""What LoFiT costs beside LoRA: training step, peak memory, bytes, and inference, at Llama-3.1-8B's shape with random weights.

    python -m bench.lofit [--budget-seconds 240] [--phases train,inference] [--only lofit,"lora 8"] [--out FILE]

``train``: forward, backward and AdamW on the adapter, bfloat16, a batch of 4 x 512 tokens, with and without gradient
checkpointing; medians by CUDA events, the arms in turns, the order reversed from round to round; ratios to ``lora 8``, rank 8 on
q_proj and v_proj. ``lofit`` tunes the offsets of 3 % of the heads, spread over the layers; ``lofit scales`` all heads' scales, the
first stage; ``lora 8, all linear`` every linear layer of the decoder. Peak memory counts the model's weights, too; beside it
stands what is above them. ``inference``: time to first token at 2048 tokens, 64 tokens by a plain loop after it, and as many
replays of a CUDA graph; the adapter as PEFT's, as an edit, and merged; speeds as a share of the base's.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

import attn_hooks
from attn_hooks.lofit import LofitConfig
from bench.end_to_end import CASES, SMOKE_CASES, Model
from bench.render import markdown_table, number
from bench.shapes import MIB, Budget, Results, Row, add_common_options, environment, free_memory, rounded, short

CASE = "llama-3.1-8b"
BATCH, LENGTH, SMOKE_LENGTH = 4, 512, 16
PROMPT, SMOKE_PROMPT = 2048, 32
SHARE_OF_HEADS, RANK = 0.03, 8
WARM_UP, STEPS, ROUNDS = 3, 8, 2
ROUNDS_OF_INFERENCE = 3
LORA, BASE = f"lora {RANK}", "base"
GOALS = {"step_ratio": 0.9, "peak_ratio": 0.9}


def spread_heads(layers: int, heads: int) -> list[tuple[int, int]]:
    """3 % of all heads, in as many layers as there are heads to place."""
    count = max(1, round(SHARE_OF_HEADS * layers * heads))
    return [(place * layers // count, (5 * place) % heads) for place in range(count)]


def adapters(layers: int, heads: int) -> dict[str, Callable[[], Any]]:
    """Arm -> its PEFT config."""
    every_linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return {
        "lofit": lambda: LofitConfig(heads=spread_heads(layers, heads)),
        "lofit scales": lambda: LofitConfig(component="scale"),
        LORA: lambda: LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["q_proj", "v_proj"]),
        f"{LORA}, all linear": lambda: LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=every_linear),
    }


class Bench:
    """The arms in turns on one model."""

    def __init__(self, options: argparse.Namespace, results: Results, budget: Budget) -> None:
        self.options, self.results, self.budget = options, results, budget
        self.device = torch.device("cpu" if options.smoke else "cuda")
        case = (SMOKE_CASES if options.smoke else CASES)[CASE]
        self.loaded = Model(CASE, case, self.device, torch.float32 if options.smoke else torch.bfloat16)
        self.layers, self.heads = self.loaded.text.num_hidden_layers, self.loaded.text.num_attention_heads
        known = adapters(self.layers, self.heads)
        self.arms = {name: make for name, make in known.items() if options.only is None or name in options.only}

    def run(self) -> None:
        if self.options.phases is None or "train" in self.options.phases:
            for checkpointing in (False, True):
                self.train(checkpointing)
        if self.options.phases is None or "inference" in self.options.phases:
            self.infer()

    def train(self, checkpointing: bool) -> None:
        model = self.loaded.model
        ids = torch.randint(3, 250, (BATCH, SMOKE_LENGTH if self.options.smoke else LENGTH), device=self.device)
        measured: dict[str, list[float]] = {name: [] for name in self.arms}
        rows: dict[str, Row] = {}
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for turn in range(1 if self.options.smoke else ROUNDS):
            for name in list(self.arms)[:: (-1) ** turn]:
                if self.budget.left < 15:
                    self.results.note("skipped", f"train {name}, round {turn}: out of time")
                    continue
                row: Row = {"phase": "train", "arm": name, "checkpointing": checkpointing, "batch": BATCH}
                row["n_tokens"] = ids.shape[1]
                try:
                    measured[name] += self.steps(name, ids, row)
                except Exception as problem:
                    row["error"] = short(problem)
                rows[name] = row
                free_memory()
        if checkpointing:
            model.gradient_checkpointing_disable()
        for name, row in rows.items():
            row["step_ms"] = rounded(statistics.median(measured[name])) if measured[name] else None
        lora = rows.get(LORA, {})
        for row in rows.values():
            row["step_ratio"] = _ratio(row["step_ms"], lora.get("step_ms"))
            for of in ("peak", "above_weights"):
                row[f"{of}_ratio"] = _ratio(row.get(f"{of}_mib"), lora.get(f"{of}_mib"))
            self.results.put(row)
            print(row, flush=True)

    def steps(self, name: str, ids: Tensor, row: Row) -> list[float]:
        """Milliseconds of each step after the warm-up."""
        torch.manual_seed(0)
        weights = self._allocated()
        adapted: Any = get_peft_model(self.loaded.model, self.arms[name]())
        try:
            trained = [value for value in adapted.parameters() if value.requires_grad]
            row["trained_numbers"] = sum(value.numel() for value in trained)
            row["adapter_bytes"] = _bytes_of(adapted)
            optimizer = torch.optim.AdamW(trained, lr=1e-4)
            adapted.train()
            found = []
            for step in range(WARM_UP + (1 if self.options.smoke else STEPS)):
                if step == WARM_UP and self.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                elapsed = self._timer()
                adapted(input_ids=ids, labels=ids, use_cache=False).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                milliseconds = elapsed()
                if step >= WARM_UP:
                    found.append(milliseconds)
            if self.device.type == "cuda":
                peak = torch.cuda.max_memory_allocated()
                row["peak_mib"], row["above_weights_mib"] = rounded(peak / MIB), rounded((peak - weights) / MIB)
            return found
        finally:
            adapted.unload()
            self.loaded.model.eval().requires_grad_(False)

    def infer(self) -> None:
        """Speeds of one adapter in force in three ways, in turns."""
        model = self.loaded
        prompt = model.prompt(SMOKE_PROMPT if self.options.smoke else PROMPT)
        config = LofitConfig(heads=spread_heads(self.layers, self.heads), init_std=0.05)
        seconds: dict[str, dict[str, list[float]]] = {}
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            adapted: Any = get_peft_model(model.model, config)
            adapted.save_pretrained(folder)
            adapted.unload()
            ways: dict[str, Callable[[], AbstractContextManager[Any]]] = {
                BASE: nullcontext,
                "PEFT adapter": lambda: _as_peft(model.model, folder, merged=False),
                "edit": lambda: attn_hooks.editing(model.model, f"lofit:{folder}"),
                "merged": lambda: _as_peft(model.model, folder, merged=True),
            }
            for turn in range(1 + (1 if self.options.smoke else ROUNDS_OF_INFERENCE)):
                for name in [*list(ways)[:: (-1) ** turn], BASE]:
                    if self.budget.left < 12:
                        self.results.note("skipped", f"inference {name}, round {turn}: out of time")
                        continue
                    with ways[name]():
                        model.first_token(prompt)
                        of = {
                            "first_token": model.first_token(prompt)[0],
                            "decode": model.decode(prompt),
                            "replay": model.replay(prompt, model.case.new_tokens),
                        }
                    if turn:
                        for phase, second in of.items():
                            seconds.setdefault(name, {}).setdefault(phase, []).append(second)
        for name, phases in seconds.items():
            row: Row = {"phase": "inference", "arm": name, "n_prompt": prompt["input_ids"].shape[1]}
            row["new_tokens"] = model.case.new_tokens
            for phase, of_phase in phases.items():
                row[f"{phase}_ms"] = rounded(1e3 * statistics.median(of_phase))
                row[f"{phase}_speed"] = _ratio(statistics.median(seconds[BASE][phase]), statistics.median(of_phase))
            self.results.put(row)
            print(row, flush=True)

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated() if self.device.type == "cuda" else 0

    def _timer(self) -> Callable[[], float]:
        """Started; what it returns waits and tells the milliseconds."""
        if self.device.type != "cuda":
            begin = self.loaded.now()
            return lambda: 1e3 * (self.loaded.now() - begin)
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()

        def elapsed() -> float:
            after.record()
            after.synchronize()
            return float(before.elapsed_time(after))

        return elapsed


@contextmanager
def _as_peft(model: Any, folder: str, merged: bool) -> Iterator[None]:
    """The adapter on the model, or in its biases for as long."""
    projections = [module for name, module in model.named_modules() if name.endswith(".self_attn.o_proj")]
    biases = [projection.bias for projection in projections]
    adapted: Any = PeftModel.from_pretrained(model, folder)
    if merged:
        adapted.merge_and_unload()
    try:
        yield
    finally:
        if not merged:
            adapted.unload()
        for projection, bias in zip(projections, biases, strict=True):
            projection.bias = bias


def _bytes_of(adapted: Any) -> int:
    with tempfile.TemporaryDirectory() as folder:
        adapted.save_pretrained(folder)
        return (Path(folder) / "adapter_model.safetensors").stat().st_size


def _ratio(found: float | None, other: float | None) -> float | None:
    return None if not found or not other else rounded(found / other)


def tables(rows: list[Row]) -> str:
    """Training beside LoRA, in bold above the goal; inference beside the base."""
    training, inference = ([row for row in rows if row["phase"] == phase] for phase in ("train", "inference"))

    def cell(row: Row, name: str) -> str:
        value = row.get(name)
        text = "-" if value is None else number(value)
        missed = value is not None and row["arm"].startswith("lofit") and value > GOALS.get(name, value)
        return f"**{text}**" if missed else text

    columns = ["step_ms", "step_ratio", "peak_mib", "peak_ratio", "above_weights_ratio"]
    body = [
        [
            row["arm"],
            "yes" if row["checkpointing"] else "no",
            f"{row.get('trained_numbers', 0):,}",
            f"{row.get('adapter_bytes', 0):,}",
            *(cell(row, name) for name in columns),
        ]
        for row in training
    ]
    header = [
        "arm",
        "checkpointing",
        "numbers",
        "bytes",
        "step, ms",
        "to LoRA",
        "peak, MiB",
        "to LoRA",
        "above weights",
    ]
    speeds = ["first_token_speed", "decode_speed", "replay_speed"]
    beside = [[row["arm"], *(cell(row, name) for name in speeds)] for row in inference]
    parts = [markdown_table(header, body)] if body else []
    if beside:
        parts.append(markdown_table(["in force as", "first token", "decode", "CUDA graph"], beside))
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser)
    parser.add_argument("--out", type=Path, help="default: bench/results/lofit-h200.json; none in a smoke run")
    options = parser.parse_args()
    if not options.smoke and not torch.cuda.is_available():
        parser.error("there is no GPU here; --smoke tries the program on the CPU")
    out = options.out or (None if options.smoke else Path("bench/results/lofit-h200.json"))
    meta = environment("bench.lofit", sys.argv[1:], options.commit)
    results = Results(out, meta, ("phase", "arm", "checkpointing"))
    if options.resume:
        results.resume()
    Bench(options, results, Budget(options.budget_seconds, options.started)).run()
    results.write()
    print(tables(results.rows))
    for note in results.meta.get("skipped", []):
        print(f"skipped: {note}")


if __name__ == "__main__":
    main()
