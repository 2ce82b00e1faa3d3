"""What an edit costs one attention call on a GPU: prefill and decode, as a ratio to the best SDPA backend of that shape.

    python -m bench.edits [--precompile 12] [--budget-seconds 300] [--only var,act] [--lengths 2048,8192] [--out FILE]

How it is measured. All columns of a row take turns in one loop; each turn first overwrites a buffer larger than the L2
cache, then takes the next of up to four copies of the inputs, and CUDA events stand around the call alone. Before the
first event the device waits until the host is ahead, so that ``*_ms`` is device time even where Python launches more
slowly than the device computes; the host's own time for a call is in ``*_host_us``, and for decode ``*_graph_ms`` is the
replay of a CUDA graph. Medians. ``ours`` starts with edits that are lowered already, as the engine does it once a
sequence (``lower_ms``), except for ACT's prefill, which detects its sinks inside the timed region.

What is measured. Random q, k, v with a planted pattern (see ``plant``): a first key and seven others that act as sinks,
an image with a third of the mass, so that gates are open and ACT finds sinks. ``*_max_error`` is the largest difference
from attention in float32 on sampled rows and heads, ``effect`` the largest change that the edit makes there. A wrong
result has no ratio.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from attn_kernels import (
    AttentionInputs,
    Gate,
    HeadAffine,
    LogitMap,
    Order,
    Primitive,
    Regroup,
    Tap,
    edited_attention,
    head_affine,
    read_taps,
)
from attn_kernels.edited_attention import column_pass, dispatch
from bench.render import edits_summary
from bench.shapes import (
    MIB,
    SHAPES,
    SMOKE_SHAPES,
    AttentionShape,
    Budget,
    Results,
    Row,
    add_common_options,
    device_is_lost,
    environment,
    free_memory,
    go_on_in_a_fresh_process,
    rounded,
    short,
)

Phase = Literal["prefill", "decode"]
Index: TypeAlias = slice | Tensor

PREFILL_LENGTHS, DECODE_LENGTHS = (8192, 2048, 640, 32768), (8192, 1024, 65536)
PREFILL_LENGTHS_OF_BATCH_8 = (2048, 640)
SMOKE_PREFILL_LENGTHS, SMOKE_DECODE_LENGTHS = (64, 96), (128,)
IMAGE_KEYS = 576
ROWS_AFTER_LATE_IMAGE = 64
LARGEST_INPUTS = 60 * 2**30
# Inputs rotate over copies as long as all of them stay below this.
ROTATING_BYTES = 2 * 2**30
L2_FLUSH_BYTES = 256 * MIB
EAGER_UP_TO = 8192
FLEX_SHAPE, FLEX_LENGTHS = "llama-3.1-8b", (2048, 8192)
ACT_HEADS_SHARE = 0.18
# An output is wrong if it is off by more than this share of the largest value; bfloat16 itself gives 0.004.
WRONG_ABOVE = 0.02
SLEEP_CYCLES_PER_US, LONGEST_SLEEP_US = 1900, 2000


# The call


@dataclass(frozen=True)
class Layout:
    """Where things stand among the keys, as (start, stop)."""

    image: tuple[int, int]
    span: tuple[int, int]  # highlighted by PASTA
    question: tuple[int, int]
    sinks: tuple[int, ...]
    image_stands_out: bool = True


@dataclass(frozen=True)
class Case:
    """One attention call's sizes."""

    model_shape: str
    shape: AttentionShape
    phase: Phase
    batch: int
    num_keys: int

    @property
    def num_queries(self) -> int:
        return self.num_keys if self.phase == "prefill" else 1

    @property
    def bytes_of_inputs(self) -> int:
        rows = self.shape.heads * self.num_queries + 2 * self.shape.kv_heads * self.num_keys
        return 2 * self.batch * self.shape.head_dim * rows

    def __str__(self) -> str:
        return f"{self.model_shape} {self.phase} batch {self.batch}, {self.num_keys} keys"


def layout_of(num_keys: int, method: str) -> Layout:
    """LLaVA's prompt: 35 tokens, 576 of the image, text; with a late image only 64 tokens of text follow it."""
    late_image = method in LATE_IMAGE
    is_small = num_keys < 640
    image_keys = num_keys // 2 if is_small else IMAGE_KEYS
    start = num_keys // 8 if is_small else 35
    stop = start + image_keys
    if late_image:
        stop = num_keys - (num_keys // 8 if is_small else ROWS_AFTER_LATE_IMAGE)
        start = max(1, stop - image_keys)
    highlighted = 8 if is_small else 64
    span_start = min(stop + 8, num_keys - highlighted - highlighted // 2)
    in_image = [start + (2 * place + 1) * (stop - start) // 12 for place in range(6)]
    return Layout(
        image=(start, stop),
        span=(span_start, span_start + highlighted),
        question=(num_keys - highlighted, num_keys),
        sinks=(0, *in_image, stop + 3),
        image_stands_out=method not in FLAT_IMAGE,
    )


def make_inputs(case: Case, device: torch.device, dtype: torch.dtype, seed: int) -> AttentionInputs:
    """Random tensors, laid out as transformers hands them over."""
    generator = torch.Generator(device).manual_seed(seed)
    shape, batch = case.shape, case.batch
    make = functools.partial(torch.randn, generator=generator, device=device, dtype=dtype)
    key_index = torch.arange(case.num_keys, device=device)
    query_index = key_index[case.num_keys - case.num_queries :]
    return AttentionInputs(
        query=make(batch, case.num_queries, shape.heads, shape.head_dim).transpose(1, 2),
        key=make(batch, shape.kv_heads, case.num_keys, shape.head_dim),
        value=make(batch, shape.kv_heads, case.num_keys, shape.head_dim),
        scaling=shape.head_dim**-0.5,
        query_index=query_index,
        key_index=key_index,
        query_position=query_index[None],
        key_position=key_index[None],
        key_valid=torch.ones(1, case.num_keys, dtype=torch.bool, device=device),
        first_query=case.num_keys - case.num_queries,
        padded=False,
    )


def plant(inputs: AttentionInputs, layout: Layout) -> None:
    """Gives the last row about this mass: key 0 0.25, the other seven sinks 0.10, the image 0.35, all else 0.30.

    An image that does not stand out shares the last two: at 8192 tokens each of its keys would pass for a sink to ACT.
    Channel 0 of every query holds sqrt(D), so channel 0 of a key is added to its logit as it is.
    """
    num_keys = inputs.num_keys
    image = layout.image[1] - layout.image[0] - sum(layout.image[0] <= sink < layout.image[1] for sink in layout.sinks)
    rest = max(1, num_keys - image - len(layout.sinks))
    bias = torch.zeros(num_keys)
    if layout.image_stands_out:
        bias[slice(*layout.image)] = math.log(0.35 / 0.30 * rest / max(1, image))
    share_per_key = 0.30 / rest if layout.image_stands_out else 0.65 / (rest + image)
    # Sinks have short keys: their logits vary little from row to row. Other keys' weights average to exp(1/2).
    for place, sink in enumerate(layout.sinks):
        share = 0.25 if place == 0 else 0.10 / (len(layout.sinks) - 1)
        bias[sink] = math.log(share / share_per_key) + 0.5
        inputs.key[:, :, sink] *= 0.1
    inputs.query[..., 0] = inputs.query.shape[-1] ** 0.5
    inputs.key[..., 0] = bias.to(inputs.key)


# The edits


def _keys(inputs: AttentionInputs, *spans: tuple[int, int]) -> Tensor:
    """Key group ``(1, 1, M)``."""
    index = inputs.key_index
    chosen = torch.zeros_like(index, dtype=torch.bool)
    for start, stop in spans:
        chosen |= (index >= start) & (index < stop)
    return chosen[None, None]


def _at(inputs: AttentionInputs, keys: Sequence[int]) -> Tensor:
    return _keys(inputs, *[(key, key + 1) for key in keys])


def _rows_from(inputs: AttentionInputs, first: int) -> Tensor:
    """Row scope ``(1, N)``: the rows from place ``first`` on."""
    return (inputs.query_index >= first)[None]


def _every(inputs: AttentionInputs, step: int) -> Tensor:
    """Head selection ``(H,)``: heads 0, ``step``, ..."""
    return torch.arange(inputs.num_heads, device=inputs.query.device) % step == 0


def var(inputs: AttentionInputs, layout: Layout) -> list[Primitive]:
    """VAR, arXiv 2503.03321, eq. 6 to 8: sinks keep 0.6, the image's other keys get the rest, on rows after the image.

    The gate as published, with rho 0.5: the image holds at least 0.2 of the mass, and its sinks at most half of that.
    """
    sinks, image = _at(inputs, layout.sinks), _keys(inputs, layout.image)
    gate = Gate(of=image, at_least=0.2, share=image & sinks, at_most=0.5)
    rows = _rows_from(inputs, layout.image[1])
    return [Regroup(sinks, keep=0.6, target=image & ~sinks, gate=gate, rows=rows)]


def act_heads(inputs: AttentionInputs) -> list[int]:
    """18 % of the heads, evenly spread."""
    number = max(1, round(ACT_HEADS_SHARE * inputs.num_heads))
    return [place * inputs.num_heads // number for place in range(number)]


def act(inputs: AttentionInputs, layout: Layout) -> list[Primitive]:
    """ACT, arXiv 2406.15765, eq. 3 and 4: sinks of 18 % of the heads keep 0.4.

    Here with known sinks, the planted ones but for key 0 and one more that differs by head, as decode has them from the
    prompt. The prefill detects: ``run_act``.
    """
    chosen = act_heads(inputs)
    source = torch.zeros(inputs.query.shape[0], inputs.num_heads, inputs.num_keys, dtype=torch.bool)
    for place, head in enumerate(chosen):
        left_out = layout.sinks[1 + place % (len(layout.sinks) - 1)]
        source[:, head, [sink for sink in layout.sinks[1:] if sink != left_out]] = True
    heads = torch.zeros(inputs.num_heads, dtype=torch.bool)
    heads[chosen] = True
    return [Regroup(source.to(inputs.query.device), keep=0.4, heads=heads.to(inputs.query.device))]


def pasta(inputs: AttentionInputs, layout: Layout) -> list[Primitive]:
    """PASTA, arXiv 2311.02262, eq. 2, alpha 0.01, every fourth head.

    The paper adds log(alpha) outside the span. Softmax gives the same weights for minus log(alpha) on the span, and this
    form touches 64 keys instead of all others.
    """
    return [LogitMap(_keys(inputs, layout.span), bias=-math.log(0.01), heads=_every(inputs, 4))]


def pasta_outside(inputs: AttentionInputs, layout: Layout) -> list[Primitive]:
    """The same in the paper's own form: log(alpha) on every key outside the span."""
    return [LogitMap(~_keys(inputs, layout.span), bias=math.log(0.01), heads=_every(inputs, 4))]


def pai(inputs: AttentionInputs, layout: Layout) -> list[Primitive]:
    """PAI, arXiv 2407.21771, eq. 3, alpha 0.5: ``s + 0.5 |s|`` on the image in the last row."""
    rows = _rows_from(inputs, int(inputs.num_keys) - 1)
    return [LogitMap(_keys(inputs, layout.image), absolute=0.5, rows=rows)]


def pai_all_rows(inputs: AttentionInputs, layout: Layout) -> list[Primitive]:
    """PAI's map on all rows after the image."""
    return [LogitMap(_keys(inputs, layout.image), absolute=0.5, rows=_rows_from(inputs, layout.image[1]))]


def mma(inputs: AttentionInputs, layout: Layout) -> list[Primitive]:
    """MMA (modality-mutual attention), arXiv 2503.02597: image rows see the question that follows them."""
    index = inputs.query_index
    rows = ((index >= layout.image[0]) & (index < layout.image[1]))[None]
    return [Order(allow=((rows, _keys(inputs, layout.question)[0]),))]


def affine(inputs: AttentionInputs, layout: Layout) -> list[Primitive]:
    """Gain and offset on one head of eight: the form of ITI, arXiv 2306.03341, and LoFiT, arXiv 2406.01563."""
    chosen = _every(inputs, 8)
    gain = torch.where(chosen, 1.5, 1.0)
    step = torch.linspace(-0.5, 0.5, inputs.value.shape[-1], device=gain.device)
    return [HeadAffine(gain=gain, offset=torch.where(chosen[:, None], step, 0.0))]


def two_regroups(inputs: AttentionInputs, layout: Layout) -> list[Primitive]:
    """VAR, then ACT's equation with sinks known beforehand: the second acts on what the first has left."""
    return [*var(inputs, layout), Regroup(_at(inputs, layout.sinks), keep=0.4, heads=_every(inputs, 4))]


def three(inputs: AttentionInputs, layout: Layout) -> list[Primitive]:
    """VAR, PASTA and head gains together."""
    return [*var(inputs, layout), *pasta(inputs, layout), *affine(inputs, layout)]


EDITS: dict[str, Callable[[AttentionInputs, Layout], list[Primitive]]] = {
    "var": var,
    "var-suffix": var,
    "act": act,
    "pasta": pasta,
    "pai": pai,
    "pai-all-rows": pai_all_rows,
    "mma": mma,
    "head-affine": affine,
    "three": three,
    "three-suffix": three,
}
# Not in the table unless named by --only.
FURTHER_EDITS = {"pasta-outside": pasta_outside, "two-regroups": two_regroups}
LATE_IMAGE, FLAT_IMAGE = {"var-suffix", "three-suffix"}, {"act"}
# In decode these are the same as another method, or nothing.
PREFILL_ONLY = {"var-suffix", "three-suffix", "pai-all-rows", "mma"}


# The columns


class Ours:
    """The call under test: output, path and edits."""

    def __init__(self, method: str, inputs: AttentionInputs, layout: Layout, detects: bool) -> None:
        self.detects = detects
        self.edits = (EDITS | FURTHER_EDITS)[method](inputs, layout)
        self.lowered: Any = None
        self.note: str | None = None
        self.heads = act_heads(inputs)
        self.head_index = torch.tensor(self.heads, device=inputs.query.device)
        self.head_mask = torch.zeros(inputs.num_heads, dtype=torch.bool, device=inputs.query.device)
        self.head_mask[self.head_index] = True
        # Layers share it. The first key is spared.
        self.bound = torch.full((inputs.num_keys,), 5 / inputs.num_keys, device=inputs.query.device)
        self.bound[0] = float("inf")

    def lower(self, inputs: AttentionInputs) -> float | None:
        """Lowers once for all calls; milliseconds of the second time, the first one warms up."""
        from attn_kernels.edited_attention.lowering import NotLowered, lower

        if self.detects:
            return None
        elapsed = 0.0
        try:
            for _ in range(2):
                _synchronize(inputs)
                start = time.perf_counter()
                self.lowered = lower(inputs, self.edits)
                if self.lowered.edits_weights:
                    _ = self.lowered.listed
                _synchronize(inputs)
                elapsed = time.perf_counter() - start
        except NotLowered as reason:
            self.note = f"not lowered: {reason}"
            return None
        return elapsed * 1e3

    def run(self, inputs: AttentionInputs) -> tuple[Tensor, Any, list[Primitive]]:
        if self.detects:
            return self.run_act(inputs)
        output, path = dispatch.run(inputs, self.edits, lowered=self.lowered)
        return output, path, self.edits

    def run_act(self, inputs: AttentionInputs) -> tuple[Tensor, Any, list[Primitive]]:
        """ACT's prefill: plain attention, column means of the chosen heads, sinks, and the edit on that output."""
        vendor, means = self._column_means(inputs)
        found = means > self.bound
        source = found.new_zeros(inputs.query.shape[0], inputs.num_heads, inputs.num_keys)
        source.index_copy_(1, self.head_index, found)
        edits: list[Primitive] = [Regroup(source, keep=0.4, heads=self.head_mask)]
        output, path = dispatch.run(inputs, edits, vendor=vendor)
        return output, path, edits

    def _column_means(self, inputs: AttentionInputs) -> tuple[tuple[Tensor, Tensor] | None, Tensor]:
        """Plain attention with its log-sum-exp where there is a kernel for the columns, and means ``(B, h, M)``."""
        if not inputs.query.is_cuda:
            received: list[Tensor] = []
            read_taps(inputs, [Tap("column_mean", received.append, heads=self.head_mask)])
            return None, received[0]

        output, log_sum_exp = dispatch.vendor_attention(inputs)
        means = column_pass.column_pass(inputs, log_sum_exp, heads=self.head_index, mean=True)
        if means.shape[1] != len(self.heads):
            means = means[:, self.head_index]
        return (output, log_sum_exp), means


def sdpa(inputs: AttentionInputs) -> Tensor:
    return functional.scaled_dot_product_attention(
        inputs.query,
        inputs.key,
        inputs.value,
        is_causal=inputs.num_queries > 1,
        scale=inputs.scaling,
        enable_gqa=inputs.num_heads != inputs.key.shape[1],
    )


class Eager:
    """The published way: all N x M weights, the edit made on the slice of them that it concerns."""

    def __init__(self, inputs: AttentionInputs, edits: Sequence[Primitive], detects: bool, heads: list[int]) -> None:
        self.edits, self.detects = edits, detects
        self.heads = torch.tensor(heads, device=inputs.query.device)
        visible = inputs.visible(slice(0, inputs.num_queries))
        for edit in edits:
            if isinstance(edit, Order):
                for rows, keys in edit.allow:
                    visible = visible | (rows[:, None, :, None] & keys[:, None, None, :])
        lowest = torch.finfo(inputs.query.dtype).min
        self.mask = torch.where(visible, 0.0, lowest).to(inputs.query.dtype) if inputs.num_queries > 1 else None
        self.seen = visible.sum(-2)
        self.places: dict[int, tuple[Index, Index, dict[str, Index]]] = {}
        for edit in edits:
            if isinstance(edit, LogitMap | Regroup) and not detects:
                self.places[id(edit)] = _places(inputs, edit)

    def __call__(self, inputs: AttentionInputs) -> Tensor:
        groups = inputs.num_heads // inputs.key.shape[1]
        key, value = inputs.key.repeat_interleave(groups, 1), inputs.value.repeat_interleave(groups, 1)
        logits = (inputs.query @ key.transpose(2, 3)).mul_(inputs.scaling)
        for edit in self.edits:
            if isinstance(edit, LogitMap):
                heads, rows, groups_of = self.places[id(edit)]
                where = (slice(None), heads, rows, groups_of["keys"])
                part = logits[where]
                logits[where] = edit.scale * part + edit.absolute * part.abs() + edit.bias
        if self.mask is not None:
            logits = logits + self.mask
        weights = logits.softmax(-1, dtype=torch.float32)
        del logits
        if self.detects:
            self._calibrate(weights)
        else:
            for edit in self.edits:
                if isinstance(edit, Regroup):
                    self._regroup(edit, weights)
        return head_affine(weights.to(value.dtype) @ value, self.edits, inputs.query)

    def _calibrate(self, weights: Tensor) -> None:
        part = weights[:, self.heads]
        sinks = part.sum(2) / self.seen > 5 / weights.shape[-1]
        sinks[..., 0] = False
        weights[:, self.heads] = _kept(part, sinks[:, :, None], 0.4)

    def _regroup(self, edit: Regroup, weights: Tensor) -> None:
        heads, rows, groups = self.places[id(edit)]
        if "source" not in groups:
            chosen = torch.arange(weights.shape[1], device=weights.device)[heads] if isinstance(heads, slice) else heads
            weights[:, chosen] = _kept(weights[:, chosen], edit.source[:, chosen, None], edit.keep)
            return
        part = weights[:, heads, rows]
        mass = {name: part[..., keys].sum(-1, keepdim=True) for name, keys in groups.items()}
        acts = mass["target"] > 0
        if edit.gate is not None:
            acts &= (mass["of"] >= edit.gate.at_least) & (mass["share"] <= edit.gate.at_most * mass["of"])
        freed = torch.where(acts, (1 - edit.keep) * mass["source"], 0.0)
        part[..., groups["target"]] *= 1 + freed / mass["target"].clamp(min=1e-9)
        part[..., groups["source"]] *= torch.where(acts, edit.keep, 1.0)
        if isinstance(heads, Tensor) or isinstance(rows, Tensor):
            weights[:, heads, rows] = part  # it was a copy


def _kept(weights: Tensor, sinks: Tensor, keep: float | Tensor) -> Tensor:
    """ACT's equation 4 on ``(B, h, N, M)``."""
    mass = torch.where(sinks, weights, 0.0).sum(-1, keepdim=True)
    return weights * torch.where(sinks, keep, (1 - keep * mass) / (1 - mass).clamp(min=1e-6))


def _places(inputs: AttentionInputs, edit: LogitMap | Regroup) -> tuple[Index, Index, dict[str, Index]]:
    """Heads, rows and key groups of an edit as slices where they are regular: what a script would write."""
    heads: Index = slice(None) if edit.heads is None else _as_index(edit.heads)
    rows: Index = slice(None) if edit.rows is None else _as_index(edit.rows[0])
    if isinstance(edit, LogitMap):
        return heads, rows, {"keys": _as_index(edit.keys[0, 0])}
    if edit.source.shape[1] > 1:
        return heads, rows, {}
    groups = {"source": edit.source, "target": ~edit.source if edit.target is None else edit.target & ~edit.source}
    if edit.gate is not None:
        groups |= {"of": edit.gate.of, "share": edit.gate.of if edit.gate.share is None else edit.gate.share}
    return heads, rows, {name: _as_index(group[0, 0]) for name, group in groups.items()}


def _as_index(chosen: Tensor) -> Index:
    places = chosen.nonzero().squeeze(-1)
    if len(places) == 0:
        return slice(0, 0)
    first, last = int(places[0]), int(places[-1])
    step = (last - first) // max(1, len(places) - 1) or 1
    is_regular = len(places) == len(range(first, last + 1, step)) and bool((places.diff() == step).all())
    return slice(first, last + 1, step) if is_regular else places


def flex_column(method: str, inputs: AttentionInputs, layout: Layout) -> Callable[[AttentionInputs], Tensor] | None:
    """``flex_attention`` compiled for this edit; None where a score_mod and a block mask cannot say it."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    first_row = inputs.num_keys - inputs.num_queries
    image_start, image_stop = layout.image
    span_start, span_stop = layout.span
    question_start = layout.question[0]
    last_row = inputs.num_keys - 1
    bias = -math.log(0.01)

    def on_span(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return torch.where((k >= span_start) & (k < span_stop) & (h % 4 == 0), score + bias, score)

    def on_image(score: Tensor, q: Tensor, k: Tensor, first: int) -> Tensor:
        edited = (k >= image_start) & (k < image_stop) & (q + first_row >= first)
        return torch.where(edited, score + 0.5 * score.abs(), score)

    def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q >= k

    def causal_or_question(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) | ((q >= image_start) & (q < image_stop) & (k >= question_start))

    score_mods: dict[str, Any] = {
        "pasta": on_span,
        "pai": lambda score, b, h, q, k: on_image(score, q, k, last_row),
        "pai-all-rows": lambda score, b, h, q, k: on_image(score, q, k, image_stop),
        "mma": None,
    }
    if method not in score_mods:
        return None
    block_mask = None
    if inputs.num_queries > 1:
        mask_mod = causal_or_question if method == "mma" else causal
        block_mask = create_block_mask(
            mask_mod, None, None, inputs.num_queries, inputs.num_keys, device=str(inputs.query.device)
        )
    attention: Any = flex_attention
    if inputs.query.is_cuda:
        torch._dynamo.reset()
        attention = torch.compile(flex_attention, dynamic=False)
    enable_gqa = inputs.num_heads != inputs.key.shape[1]
    return lambda call: attention(
        call.query,
        call.key,
        call.value,
        score_mod=score_mods[method],
        block_mask=block_mask,
        scale=call.scaling,
        enable_gqa=enable_gqa,
    )


# Time and memory


@dataclass
class Column:
    """One way to compute the call. ``around`` is entered outside the timed region."""

    call: Callable[[AttentionInputs], Any]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    milliseconds: list[float] = field(default_factory=list)
    estimate: float = 0.0
    host_us: float | None = None
    peak_mib: float | None = None

    @property
    def median(self) -> float | None:
        return statistics.median(self.milliseconds) if self.milliseconds else None


class Clock:
    """Times calls by CUDA events behind an overwritten L2 cache; on a CPU by the wall clock."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_gpu = device.type == "cuda"
        self.flush = torch.empty(L2_FLUSH_BYTES // 4 if self.is_gpu else 1, dtype=torch.int32, device=device)

    def start(self, column: Column, inputs: AttentionInputs) -> Callable[[], float]:
        """Queues one call; what it returns waits and tells the milliseconds."""
        with column.around():
            if not self.is_gpu:
                begin = time.perf_counter()
                column.call(inputs)
                elapsed = (time.perf_counter() - begin) * 1e3
                return lambda: elapsed
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self.flush.zero_()
            if column.host_us is not None:
                torch.cuda._sleep(int(min(1.5 * column.host_us + 50, LONGEST_SLEEP_US) * SLEEP_CYCLES_PER_US))
            before.record()
            column.call(inputs)
            after.record()
        return lambda: float(before.elapsed_time(after))

    def synchronize(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize()

    def probe(self, column: Column, inputs: AttentionInputs) -> None:
        """Warms up and finds the peak memory, the host's time for a call, and roughly the device's."""
        with column.around():
            self.synchronize()
            if self.is_gpu:
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
            output = column.call(inputs)
            self.synchronize()
            if self.is_gpu:
                column.peak_mib = (torch.cuda.max_memory_allocated() - before) / MIB
            del output
        column.estimate = self._after(self.start(column, inputs))
        if column.estimate < 100:
            column.estimate = min(column.estimate, *(self._after(self.start(column, inputs)) for _ in range(2)))
        if column.estimate < 200 and self.is_gpu:
            calls = 10 if column.estimate < 5 else 1
            with column.around():
                begin = time.perf_counter()
                for _ in range(calls):
                    column.call(inputs)
                column.host_us = (time.perf_counter() - begin) / calls * 1e6
            self.synchronize()
            column.estimate = self._after(self.start(column, inputs))

    def _after(self, elapsed: Callable[[], float]) -> float:
        self.synchronize()
        return elapsed()

    def repetitions(self, column: Column) -> int:
        """At least ten or 50 ms; fewer where one call takes long."""
        if not self.is_gpu:
            return 2
        at_least = 10 if column.estimate < 20 else 5 if column.estimate < 100 else 2 if column.estimate < 1000 else 1
        return max(at_least, min(100, int(50 / max(column.estimate, 1e-3))))

    def interleave(self, columns: dict[str, Column], copies: Sequence[AttentionInputs], errors: dict[str, str]) -> None:
        """Times all columns in turns; one that fails is out, with its reason in ``errors``."""
        remaining = {name: self.repetitions(column) for name, column in columns.items()}
        if self.is_gpu:
            # Warmed up by the probe already; this brings the clocks and all copies into the same state.
            for column in columns.values():
                for turn in range(5 if column.estimate < 5 else 0):
                    self.start(column, copies[turn % len(copies)])
        turn = 0
        while remaining:
            queued: list[tuple[str, Callable[[], float]]] = []
            for name in list(remaining):
                try:
                    queued.append((name, self.start(columns[name], copies[turn % len(copies)])))
                except Exception as problem:
                    errors[name] = short(problem)
                    columns[name].milliseconds.clear()
                    del remaining[name]
                    continue
                remaining[name] -= 1
                if remaining[name] <= 0:
                    del remaining[name]
            self.synchronize()
            for name, elapsed in queued:
                columns[name].milliseconds.append(elapsed())
            turn += 1


def graphed(column: Column, copies: Sequence[AttentionInputs]) -> Column:
    """The same call as the replay of a CUDA graph, one graph a copy of the inputs."""
    graphs: dict[int, torch.cuda.CUDAGraph] = {}
    kept = []
    for inputs in copies:
        graph = torch.cuda.CUDAGraph()
        with column.around():
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                column.call(inputs)
            torch.cuda.current_stream().wait_stream(aside)
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                kept.append(column.call(inputs))
        graphs[id(inputs)] = graph
    return Column(lambda inputs: (graphs[id(inputs)].replay(), kept), host_us=20.0, estimate=column.estimate)


def _synchronize(inputs: AttentionInputs) -> None:
    if inputs.query.is_cuda:
        torch.cuda.synchronize()


# Errors


@dataclass(frozen=True)
class Sample:
    """Some rows and heads of the last sample."""

    rows: Tensor
    heads: Tensor

    def of(self, output: Tensor) -> Tensor:
        return output[-1:, self.heads][:, :, self.rows].float()

    def exact(self, inputs: AttentionInputs, edits: Sequence[Primitive]) -> Tensor:
        """The edited output there in float32, by the tested PyTorch path."""
        last = slice(inputs.query.shape[0] - 1, inputs.query.shape[0])
        kv_heads = inputs.kv_head_of[self.heads]
        few = replace(
            inputs,
            query=inputs.query[last, self.heads][:, :, self.rows],
            key=inputs.key[last, kv_heads],
            value=inputs.value[last, kv_heads].float(),
            query_index=inputs.query_index[self.rows],
            query_position=inputs.query_position[:, self.rows],
            first_query=None,
        )
        restricted = [self._restricted(edit) for edit in edits]
        weights = [edit for edit in restricted if not isinstance(edit, HeadAffine)]
        return head_affine(edited_attention(few, weights), restricted, few.query)

    def _restricted(self, edit: Any) -> Primitive:
        changed: dict[str, Any] = {}
        if getattr(edit, "rows", None) is not None:
            changed["rows"] = self._rows_of(edit.rows)
        if getattr(edit, "heads", None) is not None:
            changed["heads"] = edit.heads[self.heads]
        for name in ("source", "target", "keys"):
            group = getattr(edit, name, None)
            if group is not None:
                group = group[-1:]
                changed[name] = group if group.shape[1] == 1 else group[:, self.heads]
        if isinstance(edit, Order):
            changed["allow"] = tuple((self._rows_of(rows), keys[-1:]) for rows, keys in edit.allow)
        if isinstance(edit, HeadAffine):
            for name in ("gain", "offset", "replace"):
                if getattr(edit, name) is not None:
                    changed[name] = getattr(edit, name)[self.heads]
        restricted: Primitive = replace(edit, **changed)
        return restricted

    def _rows_of(self, rows: Tensor) -> Tensor:
        return rows[-1:, self.rows]


def sample_of(inputs: AttentionInputs, layout: Layout) -> Sample:
    """Rows before, in and after the image, and the last; the first head, which every edit selects, and three others."""
    number, first = inputs.num_queries, inputs.num_keys - inputs.num_queries
    start, stop = layout.image
    wanted = [0, start // 2, (start + stop) // 2, stop - 1, stop, (stop + number) // 2, number - 33, number - 1]
    rows = sorted({row for row in (place - first for place in wanted) if 0 <= row < number} | {number - 1})
    heads = sorted({0, 1, inputs.num_heads // 2, inputs.num_heads - 1})
    device = inputs.query.device
    return Sample(torch.tensor(rows, device=device), torch.tensor(heads, device=device))


def _distance(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).abs().max())


# Rows


class Bench:
    """Measures case by case and keeps what several rows share."""

    def __init__(self, options: argparse.Namespace, results: Results, budget: Budget) -> None:
        self.options, self.results, self.budget = options, results, budget
        self.device = torch.device("cpu" if options.smoke else "cuda")
        self.dtype = torch.float32 if options.smoke else torch.bfloat16
        self.clock = Clock(self.device)

    def methods(self, phase: str) -> list[str]:
        named = self.options.only or list(EDITS)
        return [name for name in named if phase == "prefill" or name not in PREFILL_ONLY]

    def cases(self) -> Iterator[Case]:
        smoke, options = self.options.smoke, self.options
        prefill, decode = (SMOKE_PREFILL_LENGTHS, SMOKE_DECODE_LENGTHS) if smoke else (PREFILL_LENGTHS, DECODE_LENGTHS)
        late = prefill[:1] if smoke else PREFILL_LENGTHS_OF_BATCH_8
        shapes = SMOKE_SHAPES if smoke else SHAPES
        listed = [("prefill", 1, prefill), ("decode", 1, decode), ("prefill", 8, late), ("decode", 8, decode)]
        phase: Any
        for phase, batch, lengths in listed:
            for length in lengths:
                for name, shape in shapes.items():
                    case = Case(name, shape, phase, batch, length)
                    wanted = (
                        (options.shapes is None or name in options.shapes)
                        and (options.phases is None or phase in options.phases)
                        and (options.batches is None or batch in options.batches)
                        and (options.lengths is None or length in options.lengths)
                    )
                    if wanted:
                        yield case

    def run(self) -> None:
        for case in self.cases():
            todo = [name for name in self.methods(case.phase) if not self.results.has(self.row_of(case, name))]
            if not todo or str(case) in self.results.meta.get("lost", []):
                continue
            largest = LARGEST_INPUTS
            if self.clock.is_gpu:
                largest = min(largest, int(0.6 * torch.cuda.mem_get_info()[1]))
            if case.bytes_of_inputs > largest:
                self.results.note("skipped", f"{case}: inputs of {case.bytes_of_inputs / 2**30:.0f} GiB")
                continue
            try:
                self.run_case(case, todo)
            except Exception as problem:
                self.results.note("skipped", f"{case}: {short(problem)}")
                if device_is_lost():
                    # Or the fresh process would meet the same again.
                    self.results.note("lost", str(case))
                self.go_on_if_lost()
            free_memory()

    def go_on_if_lost(self) -> None:
        if device_is_lost():
            print("the device is lost to this process; going on in a fresh one", flush=True)
            go_on_in_a_fresh_process("bench.edits", sys.argv[1:], self.budget)

    def run_case(self, case: Case, methods: Sequence[str]) -> None:
        if self.budget.left < 5:
            self.results.note("skipped", f"{case}: out of time")
            return
        bytes_of_inputs = case.bytes_of_inputs * self.dtype.itemsize // 2
        number = max(1, min(4, ROTATING_BYTES // bytes_of_inputs))
        copies = [make_inputs(case, self.device, self.dtype, seed) for seed in range(number)]
        planted: Layout | None = None
        backend: tuple[str, Column] | None = None
        for method in methods:
            row = self.row_of(case, method)
            if self.budget.left < 5:
                self.results.note("skipped", f"{case}, {method}: out of time")
                continue
            layout = layout_of(case.num_keys, method)
            if layout != planted:
                for inputs in copies:
                    plant(inputs, layout)
                planted = layout
            backend = backend or self.best_sdpa(copies[0])
            try:
                self.fill(row, case, method, copies, layout, backend)
            except Exception as problem:
                row["errors"]["row"] = short(problem)
            self.results.put(row)
            self.go_on_if_lost()
            print(_line(row), flush=True)

    def row_of(self, case: Case, method: str) -> Row:
        names = ("sdpa_ms", "ours_ms", "ratio", "flex_ms", "eager_ms", "peak_mib", "sdpa_peak_mib", "path")
        return {
            "method": method,
            "model_shape": case.model_shape,
            "phase": case.phase,
            "batch": case.batch,
            "n_query": case.num_queries,
            "n_key": case.num_keys,
            **dict.fromkeys(names),
            "errors": {},
            "notes": {},
        }

    def best_sdpa(self, inputs: AttentionInputs) -> tuple[str, Column]:
        """The fastest SDPA backend that takes the call."""
        if not self.clock.is_gpu:
            return "cpu", Column(sdpa)
        backends = {
            "cudnn": SDPBackend.CUDNN_ATTENTION,
            "flash": SDPBackend.FLASH_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION,
        }
        columns: dict[str, Column] = {}
        for name, backend in backends.items():
            column = Column(sdpa, functools.partial(sdpa_kernel, backend))
            try:
                self.clock.probe(column, inputs)
            except Exception:
                # Not for this shape: efficient attention has no grouped heads.
                self.go_on_if_lost()
                continue
            columns[name] = column
        self.clock.interleave(columns, [inputs], {})
        name = min(columns, key=lambda name: columns[name].median or math.inf)
        return name, columns[name]

    def fill(
        self,
        row: Row,
        case: Case,
        method: str,
        copies: Sequence[AttentionInputs],
        layout: Layout,
        backend: tuple[str, Column],
    ) -> None:
        """Measures every column of a row."""
        errors, inputs = row["errors"], copies[0]
        detects = method == "act" and case.phase == "prefill"
        ours = Ours(method, inputs, layout, detects)
        row["sdpa_backend"] = backend[0]
        row["inputs_mib"] = rounded(case.bytes_of_inputs / MIB)
        columns = {"sdpa": Column(sdpa, backend[1].around)}
        try:
            row["lower_ms"] = rounded(ours.lower(inputs))
            columns["ours"] = Column(lambda call: ours.run(call)[0])
        except Exception as problem:
            errors["ours"] = short(problem)
        if ours.note:
            row["notes"]["ours"] = ours.note
        self.add_eager(row, columns, ours, inputs, case)
        self.add_flex(row, columns, method, inputs, layout, case)
        for name in list(columns):
            try:
                self.clock.probe(columns[name], inputs)
            except Exception as problem:
                errors[name] = short(problem)
                if device_is_lost():
                    raise
            if name in errors:
                # Here, where the exception holds no tensors any more.
                del columns[name]
                free_memory()
        self.check(row, columns, ours, inputs, layout)
        self.clock.interleave(columns, copies, errors)
        self.write_times(row, columns)
        if "graph" in self.options.columns and case.phase == "decode" and self.clock.is_gpu:
            self.add_graphs(row, columns, copies)

    def add_eager(self, row: Row, columns: dict[str, Column], ours: Ours, inputs: AttentionInputs, case: Case) -> None:
        if "eager" not in self.options.columns:
            return
        if case.phase == "prefill" and case.num_keys > EAGER_UP_TO:
            row["notes"]["eager"] = f"not run above {EAGER_UP_TO} tokens"
            return
        try:
            columns["eager"] = Column(Eager(inputs, ours.edits, ours.detects, ours.heads))
        except Exception as problem:
            row["errors"]["eager"] = short(problem)

    def add_flex(
        self,
        row: Row,
        columns: dict[str, Column],
        method: str,
        inputs: AttentionInputs,
        layout: Layout,
        case: Case,
    ) -> None:
        if "flex" not in self.options.columns:
            return
        if not self.options.smoke and not is_for_flex(case):
            row["notes"]["flex"] = f"compiled for {FLEX_SHAPE}, batch 1, {FLEX_LENGTHS} keys alone"
            return
        if self.budget.left < 30 and not self.options.smoke:
            row["notes"]["flex"] = "no time left to compile"
            return
        try:
            flex = flex_column(method, inputs, layout)
        except Exception as problem:
            row["errors"]["flex"] = short(problem)
            return
        if flex is None:
            row["notes"]["flex"] = "score_mod and block mask cannot say it"
        else:
            columns["flex"] = Column(flex)

    def check(self, row: Row, columns: dict[str, Column], ours: Ours, inputs: AttentionInputs, layout: Layout) -> None:
        """Errors against float32 on sampled rows; a wrong column is named in ``errors``."""
        sample = sample_of(inputs, layout)
        plain = sample.exact(inputs, [])
        edited: Tensor | None = None
        if "ours" in columns:
            output, path, edits = ours.run(inputs)
            row["path"] = getattr(path, "name", path)
            row["why"] = getattr(path, "why", None)
            # ACT's sinks are those that this run found.
            edited = sample.exact(inputs, edits)
            self._compare(row, "ours", sample.of(output), edited)
            del output
        if edited is None:
            edited = sample.exact(inputs, ours.edits)
        row["effect"] = rounded(_distance(edited, plain), 3)
        for name in ("sdpa", "eager", "flex"):
            # Without ours, nobody has said which sinks ACT's prefill finds.
            if name in columns and (name == "sdpa" or "ours" in columns or not ours.detects):
                with columns[name].around():
                    output = columns[name].call(inputs)
                self._compare(row, name, sample.of(output), plain if name == "sdpa" else edited)
                del output

    def _compare(self, row: Row, name: str, found: Tensor, exact: Tensor) -> None:
        error = _distance(found, exact)
        row[f"{name}_max_error"] = rounded(error, 3)
        if not error <= WRONG_ABOVE * float(exact.abs().max()):
            row["errors"][f"{name}_wrong"] = f"off by {error:.2g} where the largest value is {exact.abs().max():.2g}"

    def write_times(self, row: Row, columns: dict[str, Column]) -> None:
        times = {name: column.median for name, column in columns.items()}
        for name in ("sdpa", "ours", "flex", "eager"):
            row[f"{name}_ms"] = rounded(times.get(name))
            if name in columns and columns[name].host_us is not None:
                row[f"{name}_host_us"] = rounded(columns[name].host_us, 3)
        row["repetitions"] = {name: len(column.milliseconds) for name, column in columns.items()}
        for name, key in (("ours", "peak_mib"), ("sdpa", "sdpa_peak_mib"), ("eager", "eager_peak_mib")):
            row[key] = rounded(columns[name].peak_mib) if name in columns else None
        row["ratio"] = self._ratio(row, times.get("ours"), times.get("sdpa"))

    def _ratio(self, row: Row, ours: float | None, sdpa_ms: float | None) -> float | None:
        if ours is None or sdpa_ms is None or "ours_wrong" in row["errors"]:
            return None
        return rounded(ours / sdpa_ms)

    def add_graphs(self, row: Row, columns: dict[str, Column], copies: Sequence[AttentionInputs]) -> None:
        """Decode as a CUDA graph: what it costs where the host launches nothing."""
        replays: dict[str, Column] = {}
        for name in ("sdpa", "ours"):
            if name not in columns:
                continue
            try:
                replays[name] = graphed(columns[name], copies)
            except Exception as problem:
                row["errors"][f"{name}_graph"] = short(problem)
                if device_is_lost():
                    raise
        self.clock.interleave(replays, copies, row["errors"])
        times = {name: column.median for name, column in replays.items()}
        for name, median in times.items():
            row[f"{name}_graph_ms"] = rounded(median)
        row["graph_ratio"] = self._ratio(row, times.get("ours"), times.get("sdpa"))


def is_for_flex(case: Case) -> bool:
    return case.model_shape == FLEX_SHAPE and case.batch == 1 and case.num_keys in FLEX_LENGTHS


def _line(row: Row) -> str:
    numbers = " ".join(f"{name} {row[name]}" for name in ("sdpa_ms", "ours_ms", "ratio", "eager_ms") if row[name])
    problems = f" {row['errors']}" if row["errors"] else ""
    return f"{row['method']:13}{row['model_shape']} {row['phase']} B{row['batch']} M{row['n_key']} {numbers}{problems}"


# Kernels compiled ahead, by many processes


def compile_ahead(options: argparse.Namespace, budget: Budget) -> float:
    """Fills Triton's and inductor's caches from ``options.precompile`` processes; seconds that it took."""
    start = time.perf_counter()
    environment_of_children = os.environ | {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "bench.edits", *sys.argv[1:], f"--compile-only={part}/{options.precompile}"],
            env=environment_of_children,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for part in range(options.precompile)
    ]
    stop = time.time() + min(150.0, budget.left / 2)
    for child in children:
        try:
            child.wait(timeout=max(0.1, stop - time.time()))
        except subprocess.TimeoutExpired:
            child.kill()
    return time.perf_counter() - start


def compile_part(bench: Bench, part: int, parts: int) -> None:
    """Runs each of this part's methods and shapes once, so that its kernels are in the cache."""
    jobs: dict[tuple[str, str, str], list[Case]] = {}
    for case in bench.cases():
        for method in bench.methods(case.phase):
            if "flex" in bench.options.columns and is_for_flex(case):
                jobs.setdefault((f"flex {case.phase} {case.num_keys}", case.model_shape, method), []).append(case)
            jobs.setdefault(("ours", case.model_shape, method), []).append(case)
    for place, ((what, _, method), cases) in enumerate(sorted(jobs.items(), key=lambda job: job[0])):
        if place % parts != part:
            continue
        for case in cases:
            if case.bytes_of_inputs > ROTATING_BYTES // 2:
                continue
            layout = layout_of(case.num_keys, method)
            inputs = make_inputs(case, bench.device, bench.dtype, 0)
            try:
                if what == "ours":
                    ours = Ours(method, inputs, layout, method == "act" and case.phase == "prefill")
                    ours.lower(inputs)
                    ours.run(inputs)
                else:
                    flex = flex_column(method, inputs, layout)
                    if flex is not None:
                        flex(inputs)
            except Exception as problem:
                print(f"{method} {case}: {short(problem)}", flush=True)
                if device_is_lost():
                    return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser)
    parser.add_argument("--batches", type=lambda text: [int(part) for part in text.split(",")], metavar="N,M")
    parser.add_argument(
        "--columns",
        type=lambda text: text.split(","),
        default=["eager", "flex", "graph"],
        metavar="A,B",
        help="beside SDPA and ours: eager, flex, graph",
    )
    parser.add_argument("--precompile", type=int, default=0, metavar="N", help="compile first, in N processes")
    parser.add_argument("--compile-only", metavar="I/N", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="default: bench/results/edits-h200.json; none in a smoke run")
    options = parser.parse_args()
    if not options.smoke and not torch.cuda.is_available():
        parser.error("there is no GPU here; --smoke tries the program on the CPU")
    unknown = set(options.only or ()) - set(EDITS) - set(FURTHER_EDITS)
    if unknown:
        known = ", ".join(sorted({*EDITS, *FURTHER_EDITS}))
        parser.error(f"no such method: {', '.join(sorted(unknown))}; there are {known}")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    budget = Budget(options.budget_seconds, options.started)
    meta = environment("bench.edits", sys.argv[1:], options.commit)
    out = options.out or (None if options.smoke else Path("bench/results/edits-h200.json"))
    results = Results(out, meta, ("method", "model_shape", "phase", "batch", "n_query", "n_key"))
    with torch.no_grad():
        if options.compile_only:
            part, parts = options.compile_only.split("/")
            compile_part(Bench(options, results, budget), int(part), int(parts))
            return
        if options.resume:
            results.resume()
        elif options.precompile:
            meta["compiled_ahead_seconds"] = rounded(compile_ahead(options, budget), 3)
        Bench(options, results, budget).run()
    results.write()
    print(edits_summary(results.rows))
    for what in ("skipped", "lost"):
        for note in results.meta.get(what, []):
            print(f"{what}: {note}")


if __name__ == "__main__":
    main()
