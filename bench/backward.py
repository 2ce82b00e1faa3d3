"""What training through an edit costs one attention call on a GPU: forward and backward, as a ratio to SDPA's.

    python -m bench.backward [--shapes llama-3.1-8b] [--lengths 2048 8192] [--only dara lofit] [--out FILE]

Causal, bfloat16, random q, k and v that all ask for a gradient, as does the edit's factor. Forward and backward together, by
Triton's ``do_bench``, which flushes the L2 cache; medians. ``peak_mib`` is what forward and backward need beside inputs and
gradients. ``*_error`` is the largest difference from float32 autograd through the PyTorch path, as a share of the largest
gradient, up to ``--check-up-to`` keys, since that path holds every weight.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from triton.testing import do_bench

from attn_kernels import AttentionInputs, Gate, HeadAffine, LogitMap, Primitive, Regroup
from attn_kernels.edited_attention import blocked
from attn_kernels.edited_attention.backward import differentiable_edited_attention
from attn_kernels.edited_attention.lowering import lower
from bench.shapes import MIB, SHAPES, SMOKE_SHAPES, AttentionShape, Results, Row, environment, free_memory, rounded

Attention = Callable[[AttentionInputs, list[Primitive]], Tensor]


def by_sdpa(inputs: AttentionInputs, _: list[Primitive]) -> Tensor:
    return functional.scaled_dot_product_attention(
        inputs.query, inputs.key, inputs.value, is_causal=True, scale=inputs.scaling, enable_gqa=True
    )


def by_kernels(inputs: AttentionInputs, edits: list[Primitive]) -> Tensor:
    return differentiable_edited_attention(inputs, lower(inputs, edits))


def by_pytorch(inputs: AttentionInputs, edits: list[Primitive]) -> Tensor:
    plain = [edit for edit in edits if not isinstance(edit, HeadAffine)]
    return blocked.head_affine(blocked.edited_attention(inputs, plain), edits, inputs.query)


# An edit from its factor (H,), the heads' offsets (H, D), the first tokens and an image of a quarter of the keys.
EDITS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], list[Primitive]]] = {
    "plain": lambda factor, offset, first, image: [],
    "dara": lambda factor, offset, first, image: [LogitMap(image, scale=factor)],
    "lofit": lambda factor, offset, first, image: [HeadAffine(gain=factor, offset=offset)],
    "sink": lambda factor, offset, first, image: [Regroup(first, factor)],
    "var": lambda factor, offset, first, image: [Regroup(first, factor, image, Gate(image, 0.01))],
}


def make_inputs(shape: AttentionShape, length: int, device: torch.device) -> AttentionInputs:
    def normal(heads: int) -> Tensor:
        made = torch.randn(1, length, heads, shape.head_dim, device=device).to(torch.bfloat16).transpose(1, 2)
        return made.requires_grad_()

    index = torch.arange(length, device=device)
    valid = torch.ones(1, length, dtype=torch.bool, device=device)
    query, key, value = normal(shape.heads), normal(shape.kv_heads), normal(shape.kv_heads)
    scaling = shape.head_dim**-0.5
    return AttentionInputs(
        query, key, value, scaling, index, index, index[None], index[None], valid, first_query=0, padded=False
    )


class Case:
    """One edit on one call; its leaves ask for gradients."""

    def __init__(self, method: str, inputs: AttentionInputs) -> None:
        length, heads, device = inputs.num_keys, inputs.num_heads, inputs.query.device
        self.inputs = inputs
        self.factor = torch.linspace(0.5, 1.5, heads, device=device).requires_grad_()
        self.offset = torch.zeros(heads, inputs.value.shape[-1], device=device).requires_grad_()
        index = torch.arange(length, device=device)
        image = (index >= length // 16) & (index < length // 16 + length // 4)
        self.edits = EDITS[method](self.factor, self.offset, (index < 4)[None, None], image[None, None])
        self.output_gradient = torch.randn_like(inputs.query)

    def step(self, attention: Attention, inputs: AttentionInputs) -> list[Tensor | None]:
        leaves = [inputs.query, inputs.key, inputs.value, self.factor, self.offset]
        output = attention(inputs, self.edits)
        return list(torch.autograd.grad(output, leaves, self.output_gradient.to(output.dtype), allow_unused=True))

    def errors(self) -> dict[str, float | None]:
        exact = {name: getattr(self.inputs, name).detach().float() for name in ("query", "key", "value")}
        expected = self.step(by_pytorch, replace(self.inputs, **{n: t.requires_grad_() for n, t in exact.items()}))
        found = self.step(by_kernels, self.inputs)
        errors = {}
        for name, ours, exactly in zip(("query", "key", "value", "factor", "offset"), found, expected, strict=True):
            if ours is not None and exactly is not None:
                errors[f"{name}_error"] = rounded(float((ours - exactly).abs().max() / exactly.abs().max()))
        return errors

    def time(self, attention: Attention, milliseconds: int) -> float:
        return float(do_bench(lambda: self.step(attention, self.inputs), rep=milliseconds, return_mode="median"))

    def peak(self, attention: Attention) -> float:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.step(attention, self.inputs)
        return (torch.cuda.max_memory_allocated() - before) / MIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=EDITS, default=list(EDITS), help="these edits alone")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["llama-3.1-8b"], help="model shapes")
    parser.add_argument("--lengths", nargs="+", type=int, metavar="N", help="numbers of keys (default: 2048)")
    parser.add_argument("--commit", help="commit to record, where there is no git")
    parser.add_argument("--smoke", action="store_true", help="a tiny shape on the CPU: tries it, measures nothing")
    parser.add_argument("--milliseconds", type=int, default=300, help="timed, a column")
    parser.add_argument("--check-up-to", type=int, default=2048, metavar="N", help="compare gradients up to N keys")
    parser.add_argument("--out", type=Path, help="default: bench/results/backward.json; none in a smoke run")
    options = parser.parse_args()
    if not options.smoke and not torch.cuda.is_available():
        parser.error("there is no GPU here; --smoke tries the program on the CPU under TRITON_INTERPRET=1")
    device = torch.device("cpu" if options.smoke else "cuda")
    shapes, lengths = (SMOKE_SHAPES, [64]) if options.smoke else (SHAPES, [2048])
    out = options.out or (None if options.smoke else Path("bench/results/backward.json"))
    meta = environment("bench.backward", sys.argv[1:], options.commit)
    results = Results(out, meta, ("method", "model_shape", "n_key"))
    for name in SMOKE_SHAPES if options.smoke else options.shapes:
        for length in options.lengths or lengths:
            for method in options.only:
                case = Case(method, make_inputs(shapes[name], length, device))
                row: Row = {"method": method, "model_shape": name, "n_key": length}
                row |= case.errors() if length <= options.check_up_to else {}
                free_memory()
                if device.type == "cuda":
                    sdpa, ours = (case.time(attention, options.milliseconds) for attention in (by_sdpa, by_kernels))
                    row |= {"sdpa_ms": rounded(sdpa), "ours_ms": rounded(ours), "ratio": rounded(ours / sdpa)}
                    row |= {"sdpa_peak_mib": rounded(case.peak(by_sdpa)), "peak_mib": rounded(case.peak(by_kernels))}
                results.put(row)
                print(row, flush=True)


if __name__ == "__main__":
    main()
