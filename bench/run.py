"""What an edit costs on the PyTorch path: prefill and decode of a random Llama, as a ratio to the unwrapped model.

    python -m bench.run [--out bench/results/NAME.json]

Each row is one setting in one process: the unwrapped model on SDPA (the baseline), the same model wrapped with no edit in
force, each method, and what a user would run otherwise: eager attention with the edit made on the N x N weights. Settings
take turns and the medians of their times are compared, so that a busy machine hits all alike. Random weights: this is about time
and memory only.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import AttentionMaskInterface, eager_mask

import attn_hooks
from attn_hooks import ACT, Ablate, HeadAffine, PowerAttention, SinkScale, Streaming

CPU_SHAPE = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 1024}
GPU_SHAPE = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336}
LAYERS = 4
DECODE_STEPS = 16

Setting = Callable[[nn.Module], AbstractContextManager[Any]]


def eager_with_edit(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float, **_: object
) -> tuple[Tensor, None]:
    """The published way: all weights in memory, then ACT's regrouping of one fixed key on them."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    weights = (query @ key.transpose(2, 3) * scaling + attention_mask).softmax(-1, dtype=torch.float32)
    sink_mass = weights[..., 1:2]
    edited = weights * (1 - 0.4 * sink_mass) / (1 - sink_mass).clamp(min=1e-6)
    edited[..., 1:2] = 0.4 * sink_mass
    return (edited.to(query.dtype) @ value).transpose(1, 2).contiguous(), None


class EagerWithEdit(AbstractContextManager[None]):
    """Runs the model on ``eager_with_edit`` inside the block."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model

    def __enter__(self) -> None:
        AttentionInterface.register("bench_eager_with_edit", eager_with_edit)
        AttentionMaskInterface.register("bench_eager_with_edit", eager_mask)
        self.model.set_attn_implementation("bench_eager_with_edit")

    def __exit__(self, *_: object) -> None:
        self.model.set_attn_implementation("sdpa")


def settings() -> dict[str, Setting]:
    """Name -> what puts it in force."""
    gain = torch.ones(LAYERS, GPU_SHAPE["num_attention_heads"] if torch.cuda.is_available() else 8) * 1.1
    edits = {
        "act": ACT(layers=tuple(range(LAYERS)), later_tokens="keep"),
        "act, 2 heads a layer": ACT(heads=tuple((layer, head) for layer in range(LAYERS) for head in (0, 5))),
        "sink_scale": SinkScale(),
        "streaming": Streaming(window=256),
        "power": PowerAttention(),
        "head_affine": HeadAffine(gain=gain),
        "ablate": Ablate(heads=((0, 0),)),
    }
    named: dict[str, Setting] = {
        "unwrapped (SDPA)": lambda model: nullcontext(),
        "wrapped, no edit": lambda model: attn_hooks.editing(model),
    }
    for name, edit in edits.items():
        named[name] = lambda model, edit=edit: attn_hooks.editing(model, edit)
    named["eager with an edit (N x N)"] = EagerWithEdit
    return named


@torch.no_grad()
def measure(model: nn.Module, ids: Tensor) -> tuple[float, float, float]:
    """Milliseconds of a prefill, milliseconds of a decode step, peak MiB (0 on a CPU)."""
    if ids.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    cache = DynamicCache(config=model.config)
    prefill = _seconds(lambda: model(ids, past_key_values=cache, logits_to_keep=1), ids)
    peak = torch.cuda.max_memory_allocated() / 2**20 if ids.is_cuda else 0.0
    step = ids[:, :1]
    decode = _seconds(lambda: [model(step, past_key_values=cache) for _ in range(DECODE_STEPS)], ids) / DECODE_STEPS
    return prefill * 1e3, decode * 1e3, peak


def _seconds(run: Callable[[], object], ids: Tensor) -> float:
    if ids.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def bench(lengths: list[int], repeats: int) -> list[dict[str, Any]]:
    """One row for each length and setting."""
    gpu = torch.cuda.is_available()
    torch.manual_seed(0)
    config = LlamaConfig(
        **(GPU_SHAPE if gpu else CPU_SHAPE), num_hidden_layers=LAYERS, vocab_size=1024, max_position_embeddings=65536
    )
    model = LlamaForCausalLM(config).eval().to("cuda" if gpu else "cpu", torch.bfloat16 if gpu else torch.float32)
    rows = []
    for length in lengths:
        ids = torch.randint(3, 1000, (1, length), device=model.device)
        times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in settings()}
        for repeat in range(repeats + 1):
            for name, enter in settings().items():
                with enter(model):
                    measured = measure(model, ids)
                if repeat:  # the first round warms up
                    times[name].append(measured)
        medians = {
            name: [statistics.median(column) for column in zip(*taken, strict=True)] for name, taken in times.items()
        }
        base = medians["unwrapped (SDPA)"]
        for name, (prefill, decode, peak) in medians.items():
            rows.append(
                {
                    "setting": name,
                    "n_query": length,
                    "prefill_ms": prefill,
                    "prefill_ratio": prefill / base[0],
                    "decode_ms": decode,
                    "decode_ratio": decode / base[1],
                    "peak_mib": peak,
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the rows as JSON to this file")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024], help="prompt lengths in tokens")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds, after one that warms up")
    arguments = parser.parse_args()
    rows = bench(arguments.lengths, arguments.repeats)
    table = Table("setting", "tokens", "prefill ms", "ratio", "decode ms", "ratio", "peak MiB")
    for row in rows:
        numbers = [f"{row[name]:.2f}" for name in ("prefill_ms", "prefill_ratio", "decode_ms", "decode_ratio")]
        table.add_row(
            row["setting"], str(row["n_query"]), *numbers, f"{row['peak_mib']:.0f}" if row["peak_mib"] else "-"
        )
    Console(width=110).print(table)
    if arguments.out:
        meta = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": torch.cuda.get_device_name()
            if torch.cuda.is_available()
            else f"CPU, {torch.get_num_threads()} threads",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "command": f"python -m bench.run --lengths {' '.join(map(str, arguments.lengths))} --repeats {arguments.repeats}",
            "layers": LAYERS,
            "shape": GPU_SHAPE if torch.cuda.is_available() else CPU_SHAPE,
        }
        arguments.out.write_text(json.dumps({"meta": meta, "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
