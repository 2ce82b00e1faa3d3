"""What sparse prefill gains over dense attention on a GPU: the bare kernel on lists, and methods with static patterns.

    python -m bench.sparse_prefill [--budget-seconds 120] [--only kernel,streaming] [--lengths 8192,32768] [--out FILE]

Llama-3.1-8B's shape (32 query heads, 8 key and value heads, head_dim 128), batch 1, bfloat16, causal. ``dense_ms`` is the faster
of SDPA's cuDNN and flash backends at that length in the same run. Medians of CUDA events after a warm-up.

``kernel`` rows: random causal lists, a diagonal of masked tiles, and a share of what lies before it, as key tiles or as single
columns. ``density`` is the share of all causal pairs of a query and a key that is computed, ``share_of_dense_rate`` how many
of them a second, as a share of the dense baseline's. Making the lists is not in the time. Random q and k: these rows are about
time, and have no recall.

A method's rows are of queries and keys with a known structure (``bench.structured``). ``ours_ms`` has everything in it, of which
``select_ms`` is for choosing keys and making their lists, 0 for static patterns. ``recall`` is the share of dense attention that
the visited keys hold, the mean and the 5th percentile over heads and ``RECALL_ROWS`` rows, on which ``density`` is counted, too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from attn_hooks import (
    AnchorAttention,
    AttentionCall,
    DynamicMask,
    Edit,
    MoBA,
    PowerAttention,
    S2Attention,
    Streaming,
    TokenLayout,
    VerticalSlash,
    XAttention,
)
from attn_kernels import AttentionInputs, KeyTiles, Sparsity, measure_recall
from attn_kernels.patterns import Pattern
from attn_kernels.sparse_attention.sparse_flash import sparse_flash
from attn_kernels.sparse_attention.visits import Lists, Visits, lists_of, visits_of
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
from bench.structured import structured_query_key

SHAPE = "llama-3.1-8b"
LENGTHS, SMOKE_LENGTHS = (8192, 32768, 131072, 262144), (512,)
QUERY_TILE, KEY_TILE = 128, 64
# Shares of the keys before the diagonal; above 32K tokens lists of columns take too much memory to draw.
TILE_DENSITIES = {8192: (0.1, 0.3, 0.5, 0.7), 32768: (0.1, 0.3, 0.7), 131072: (0.05, 0.1)}
COLUMN_DENSITIES = {8192: (0.1, 0.3), 32768: (0.05, 0.1)}
EDITS: dict[str, dict[str, Edit]] = {
    "streaming": {
        "4 sinks, window 1024": Streaming(sinks=4, window=1024),
        "128 sinks, window 4096": Streaming(sinks=128, window=4096),
    },
    "power": {
        "block 64, 4 of window": PowerAttention(block=64, window_blocks=4, sink_blocks=1),
        "block 128, 8 of window": PowerAttention(block=128, window_blocks=8, sink_blocks=1),
    },
    "xattention": {
        "stride 16, threshold 0.9": XAttention(threshold=0.9, stride=16),
        "stride 16, threshold 0.7": XAttention(threshold=0.7, stride=16),
        "stride 8, threshold 0.9": XAttention(threshold=0.9, stride=8),
    },
    "vertical_slash": {
        "1000 and 6096": VerticalSlash(vertical=1000, slash=6096),
        "1000 and 1000": VerticalSlash(vertical=1000, slash=1000),
        "300 and 200": VerticalSlash(vertical=300, slash=200),
    },
    "anchor": {
        "theta 12": AnchorAttention(theta=12.0),
        "theta 8": AnchorAttention(theta=8.0),
        "theta 4": AnchorAttention(theta=4.0),
    },
    "s2": {
        "16 local, stride 8": S2Attention(local_blocks=16, stride=8),
        "8 local, stride 16 by query head": S2Attention(local_blocks=8, stride=16, shards="query_heads"),
    },
    # Without W and A, which come from training: a window.
    "dynamic_mask": {"window 2048": DynamicMask(window=2048)},
    "moba": {
        "3 of 2048": MoBA(block=2048, top_k=3),
        "12 of 512": MoBA(block=512, top_k=12),
        "3 of 512": MoBA(block=512, top_k=3),
    },
}
RECALL_ROWS = 256


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
    begins, stops, pools, size = [], [], [], 0
    # Key and value head by head: the mask of all would not fit.
    for _ in range(inputs.key.shape[1]):
        chosen = torch.rand(len(rows), length, device=device, generator=generator) < share
        of_head = lists_of((chosen & (inputs.key_index < rows[:, None]))[None, None])
        begins.append(of_head.begin + size)
        stops.append(of_head.stop + size)
        pools.append(of_head.pool)
        size += len(of_head.pool)
    columns = Lists(torch.cat(begins, 1), torch.cat(stops, 1), torch.cat(pools))
    group = inputs.num_heads // inputs.key.shape[1]
    return Visits(QUERY_TILE, KEY_TILE, part=part, columns=columns), pairs + size * group * QUERY_TILE


def as_prompt(inputs: AttentionInputs) -> AttentionCall:
    """The call as a layer's first forward of a prompt."""
    kinds = torch.ones(1, inputs.num_keys, dtype=torch.uint8, device=inputs.query.device)
    return AttentionCall(
        inputs, "llama", 0, 1, range(inputs.num_heads), "prefill", TokenLayout(kinds), None, kinds, inputs.num_keys, {}
    )


def chosen_by(edit: Edit, inputs: AttentionInputs) -> Sparsity | None:
    """What the edit does to a prompt; None: nothing."""
    found = edit.primitives(as_prompt(inputs))
    if not found:
        return None
    (sparsity,) = found
    assert isinstance(sparsity, Sparsity)
    return sparsity


def visited_by(edit: Edit, inputs: AttentionInputs) -> Visits | Pattern:
    """For the kernel. Chooses anew."""
    sparsity = chosen_by(edit, inputs)
    assert sparsity is not None
    pattern = sparsity.pattern
    return visits_of(pattern, inputs, None) if isinstance(pattern, KeyTiles) else pattern


class Bench:
    """Measures length by length."""

    def __init__(self, options: argparse.Namespace, results: Results, budget: Budget) -> None:
        self.options, self.results, self.budget = options, results, budget
        self.device = torch.device("cpu" if options.smoke else "cuda")
        self.shape = (SMOKE_SHAPES if options.smoke else SHAPES)[SHAPE]

    def run(self) -> None:
        for length in self.options.lengths or (SMOKE_LENGTHS if self.options.smoke else LENGTHS):
            wanted = self.options.only or ["kernel", *EDITS]
            if "kernel" in wanted:
                self.kernel(call_of(self.shape, length, self.device), length)
            methods = [name for name in EDITS if name in wanted]
            if methods and self.budget.left > 8:
                shape, dtype = self.shape, torch.bfloat16 if self.device.type == "cuda" else torch.float32
                made = structured_query_key(
                    length, shape.heads, shape.kv_heads, max(64, shape.head_dim), device=self.device, dtype=dtype
                )
                self.methods(made.inputs, length, methods)

    def kernel(self, inputs: AttentionInputs, length: int) -> None:
        dense = self.dense(inputs)
        for kind, densities in (("tile", TILE_DENSITIES), ("column", COLUMN_DENSITIES)):
            for share in densities.get(length, (0.3,) if self.options.smoke else ()):
                row = self.row("kernel", f"{kind}s, {share} of the past", length, dense)

                def measure(row: Row, kind: str = kind, share: float = share) -> None:
                    visited, pairs = random_visits(inputs, kind, share)
                    row["kind"] = kind
                    row["ours_ms"] = rounded(self.milliseconds(partial(sparse_flash, inputs, visited)))
                    causal = self.shape.heads * length * (length + 1) / 2
                    row["density"] = rounded(pairs / causal)
                    row["share_of_dense_rate"] = rounded(pairs / causal * dense / row["ours_ms"])

                self.put(row, measure)

    def methods(self, inputs: AttentionInputs, length: int, names: Sequence[str]) -> None:
        dense = self.dense(inputs)
        rows = torch.linspace(0, length - 1, min(RECALL_ROWS, length)).round().long()
        for name in names:
            for setting, edit in EDITS[name].items():

                def measure(row: Row, edit: Edit = edit) -> None:
                    sparsity = chosen_by(edit, inputs)
                    if sparsity is None:
                        row["error"] = "dense at this length"
                        return
                    kept = measure_recall(inputs, sparsity, rows).total()
                    row |= {"density": rounded(kept.density), "recall": rounded(kept.recall)}
                    row["recall_p5"] = rounded(kept.recall_p5)
                    chooses = isinstance(sparsity.pattern, KeyTiles)
                    del sparsity
                    free_memory()
                    row["select_ms"] = rounded(self.milliseconds(lambda: visited_by(edit, inputs))) if chooses else 0.0
                    row["ours_ms"] = rounded(self.milliseconds(lambda: sparse_flash(inputs, visited_by(edit, inputs))))

                self.put(self.row(name, setting, length, dense), measure)

    def row(self, method: str, setting: str, length: int, dense: float) -> Row:
        empty = ("kind", "density", "recall", "recall_p5", "select_ms", "speedup", "share_of_dense_rate")
        return {"method": method, "setting": setting, "n": length, **dict.fromkeys(empty), "dense_ms": rounded(dense)}

    def put(self, row: Row, measure: Callable[[Row], None]) -> None:
        if self.results.has(row):
            return
        if self.budget.left < 8:
            self.results.note("skipped", f"{row['method']} {row['setting']}, {row['n']} tokens: out of time")
            return
        try:
            measure(row)
            if "ours_ms" in row:
                row["speedup"] = rounded(row["dense_ms"] / row["ours_ms"])
        except Exception as problem:
            row["error"] = short(problem)
        self.results.put(row)
        print({name: value for name, value in row.items() if value is not None}, flush=True)
        free_memory()

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
            *(number(row.get(name), ".3f") for name in ("density", "recall", "recall_p5")),
            *(number(row.get(name)) for name in ("dense_ms", "select_ms", "ours_ms", "speedup", "share_of_dense_rate")),
        ]
        for row in rows
    ]
    heads = ["method", "setting", "tokens", "density", "recall", "5th percentile"]
    heads += ["dense ms", "choosing ms", "ours ms", "speedup", "share of the dense rate"]
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
