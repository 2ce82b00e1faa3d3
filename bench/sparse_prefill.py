"""What sparse prefill gains over dense attention on a GPU: the bare kernel on lists, and methods with static patterns.

    python -m bench.sparse_prefill [--budget-seconds 120] [--only kernel,streaming] [--lengths 8192,32768] [--out FILE]

Llama-3.1-8B's shape (32 query heads, 8 key and value heads, head_dim 128), batch 1, bfloat16, causal. ``dense_ms`` is the faster
of SDPA's cuDNN and flash backends at that length in the same run. Medians of CUDA events after a warm-up.

``kernel`` rows: random causal lists, a diagonal of masked tiles, and a share of what lies before it, as key tiles or as single
columns. ``density`` is the share of all causal pairs of a query and a key that is computed, ``share_of_dense_rate`` how many
of them a second, as a share of the dense baseline's. Making the lists is not in the time; a method's rows have it as
``select_ms``, which is 0 for static patterns. Random q and k: these rows are about time, and have no recall.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from attn_kernels import AttentionInputs, PowerOfTwoBlocks, SinkAndWindow
from attn_kernels.patterns import Pattern
from attn_kernels.sparse_attention.sparse_flash import sparse_flash
from attn_kernels.sparse_attention.visits import Lists, Visits, lists_of
from bench.render import markdown_table, number
from bench.shapes import (
    SHAPES,
    SMOKE_SHAPES,
    AttentionShape,
    Budget,
    Results,
    Row,
    add_common_options,
    environment,
    free_memory,
    rounded,
    short,
)

SHAPE = "llama-3.1-8b"
LENGTHS, SMOKE_LENGTHS = (8192, 32768, 131072, 262144), (256,)
QUERY_TILE, KEY_TILE = 128, 64
# Shares of the keys before the diagonal; above 32K tokens lists of columns take too much memory to draw.
TILE_DENSITIES = {8192: (0.1, 0.3, 0.5, 0.7), 32768: (0.1, 0.3, 0.7), 131072: (0.05, 0.1)}
COLUMN_DENSITIES = {8192: (0.1, 0.3), 32768: (0.05, 0.1)}
PATTERNS: dict[str, dict[str, Pattern]] = {
    "streaming": {
        "4 sinks, window 1024": SinkAndWindow(4, 1024),
        "128 sinks, window 4096": SinkAndWindow(128, 4096),
    },
    "power": {
        "block 64, 4 of window": PowerOfTwoBlocks(64, 4, 1),
        "block 128, 8 of window": PowerOfTwoBlocks(128, 8, 1),
    },
}


def call_of(shape: AttentionShape, length: int, device: torch.device) -> AttentionInputs:
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    sizes = (shape.heads, shape.kv_heads, shape.kv_heads)
    query, key, value = (
        torch.randn(1, heads, length, shape.head_dim, device=device, dtype=dtype, generator=generator)
        for heads in sizes
    )
    index = torch.arange(length, device=device)
    return AttentionInputs(
        query, key, value, shape.head_dim**-0.5, index, index, index[None], index[None],
        torch.ones(1, length, dtype=torch.bool, device=device), first_query=0, padded=False,
    )  # fmt: skip


def random_visits(inputs: AttentionInputs, kind: str, share: float) -> tuple[Visits, int]:
    """Lists by head, and how many pairs of a query and a key all heads together compute."""
    length, device = inputs.num_keys, inputs.query.device
    rows = torch.arange(0, length, QUERY_TILE, device=device)
    tiles = torch.arange(0, length, KEY_TILE, device=device)
    past = tiles + KEY_TILE <= rows[:, None]
    diagonal = (tiles < rows[:, None] + QUERY_TILE) & ~past
    pairs = inputs.num_heads * int(diagonal.sum()) * QUERY_TILE * KEY_TILE
    part = lists_of(diagonal[None, None])
    generator = torch.Generator(device).manual_seed(1)
    if kind == "tile":
        chosen = torch.rand(1, inputs.num_heads, *past.shape, device=device, generator=generator) < share
        whole = lists_of(chosen & past)
        return Visits(QUERY_TILE, KEY_TILE, whole, part), pairs + len(whole.pool) * QUERY_TILE * KEY_TILE
    begins, pools, size = [], [], 0
    # Key and value head by head: the mask of all would not fit.
    for _ in range(inputs.key.shape[1]):
        chosen = torch.rand(len(rows), length, device=device, generator=generator) < share
        of_head = lists_of((chosen & (inputs.key_index < rows[:, None]))[None, None])
        begins.append(of_head.begin + size)
        pools.append(of_head.pool)
        size += len(of_head.pool)
    columns = Lists(torch.cat(begins, 1), torch.cat(pools))
    group = inputs.num_heads // inputs.key.shape[1]
    return Visits(QUERY_TILE, KEY_TILE, part=part, columns=columns), pairs + size * group * QUERY_TILE


def pattern_density(pattern: Pattern, length: int, device: torch.device) -> float:
    """Share of the causal pairs that a pattern shows, counted on 1024 rows."""
    index = torch.arange(length, device=device)
    seen = possible = 0
    for rows in index[:: max(1, length // 1024)].split(64):
        shown = pattern.visible(rows[:, None], index[None]) & (index <= rows[:, None])
        seen, possible = seen + int(shown.sum()), possible + int((rows + 1).sum())
    return seen / possible


class Bench:
    """Measures length by length."""

    def __init__(self, options: argparse.Namespace, results: Results, budget: Budget) -> None:
        self.options, self.results, self.budget = options, results, budget
        self.device = torch.device("cpu" if options.smoke else "cuda")
        self.shape = (SMOKE_SHAPES if options.smoke else SHAPES)[SHAPE]

    def run(self) -> None:
        for length in self.options.lengths or (SMOKE_LENGTHS if self.options.smoke else LENGTHS):
            inputs = call_of(self.shape, length, self.device)
            dense = self.dense(inputs)
            for row, make in self.rows(inputs, length):
                row = {**row, "n": length, "dense_ms": rounded(dense)}
                if self.results.has(row):
                    continue
                if self.budget.left < 8:
                    self.results.note("skipped", f"{row['method']} {row['setting']}, {length} tokens: out of time")
                    continue
                try:
                    visited, pairs = make()
                    row["ours_ms"] = rounded(self.milliseconds(partial(sparse_flash, inputs, visited)))
                    row |= self.gained(row, pairs, length, dense)
                    del visited
                except Exception as problem:
                    row["error"] = short(problem)
                self.results.put(row)
                print({name: value for name, value in row.items() if value is not None}, flush=True)
                free_memory()

    def rows(self, inputs: AttentionInputs, length: int) -> Iterator[tuple[Row, Callable[[], tuple[Any, int | None]]]]:
        wanted = self.options.only or ["kernel", *PATTERNS]
        empty = dict.fromkeys(("kind", "density", "recall", "recall_p5", "select_ms", "speedup", "share_of_dense_rate"))
        for kind, densities in (("tile", TILE_DENSITIES), ("column", COLUMN_DENSITIES)):
            for share in densities.get(length, (0.3,) if self.options.smoke else ()) if "kernel" in wanted else ():
                row = {**empty, "method": "kernel", "setting": f"{kind}s, {share} of the past", "kind": kind}
                yield row, lambda kind=kind, share=share: random_visits(inputs, kind, share)
        for method in [name for name in PATTERNS if name in wanted]:
            for setting, pattern in PATTERNS[method].items():
                density = rounded(pattern_density(pattern, length, self.device))
                row = {**empty, "method": method, "setting": setting, "density": density, "select_ms": 0.0}
                yield row, lambda pattern=pattern: (pattern, None)

    def gained(self, row: Row, pairs: int | None, length: int, dense: float) -> Row:
        causal = self.shape.heads * length * (length + 1) / 2
        found: Row = {"speedup": rounded(dense / row["ours_ms"])}
        if pairs is not None:
            found["density"] = rounded(pairs / causal)
            found["share_of_dense_rate"] = rounded(pairs / causal * dense / row["ours_ms"])
        return found

    def dense(self, inputs: AttentionInputs) -> float:
        if self.device.type == "cpu":
            return self.milliseconds(lambda: _sdpa(inputs))
        found = []
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
            with sdpa_kernel(backend):
                found.append(self.milliseconds(lambda: _sdpa(inputs)))
        return min(found)

    def milliseconds(self, call: Callable[[], Any]) -> float:
        """The median; at least five calls."""
        if self.device.type == "cpu":
            call()
            return 1.0
        from triton.testing import do_bench

        call()
        return float(do_bench(call, warmup=20, rep=60, return_mode="median"))


def _sdpa(inputs: AttentionInputs) -> Tensor:
    return functional.scaled_dot_product_attention(
        inputs.query, inputs.key, inputs.value, is_causal=True, scale=inputs.scaling, enable_gqa=True
    )


def sparse_table(rows: list[Row]) -> str:
    """Settings down: what is computed, the time, and what that gains."""
    body = [
        [
            row["method"],
            row["setting"],
            f"{row['n'] // 1024}K",
            number(row.get("density"), ".3f"),
            *(number(row.get(name)) for name in ("dense_ms", "ours_ms", "speedup", "share_of_dense_rate")),
        ]
        for row in rows
    ]
    heads = ["method", "setting", "tokens", "density", "dense ms", "ours ms", "speedup", "share of the dense rate"]
    return markdown_table(heads, body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser)
    parser.add_argument("--out", type=Path, help="default: bench/results/sparse-prefill-h200.json; none in a smoke run")
    options = parser.parse_args()
    if not options.smoke and not torch.cuda.is_available():
        parser.error("there is no GPU here; --smoke tries the program on the CPU")
    out = options.out or (None if options.smoke else Path("bench/results/sparse-prefill-h200.json"))
    results = Results(
        out, environment("bench.sparse_prefill", sys.argv[1:], options.commit), ("method", "setting", "n")
    )
    if options.resume:
        results.resume()
    with torch.no_grad():
        Bench(options, results, Budget(options.budget_seconds, options.started)).run()
    results.write()
    print(sparse_table(results.rows))
    for note in results.meta.get("skipped", []):
        print(f"skipped: {note}")


if __name__ == "__main__":
    main()
