"""Edits of one long span of keys and of few others, on top of attention that the vendor computed.

An image's keys all get the same edit, be it a LogitMap or the mass that a Regroup gives them. They are read where they lie,
as plain attention reads them, into an accumulator of their own; the other keys, few, are gathered. When all masses are known,
the gate is resolved and the parts are put together. A long run of keys that no edit touches is the vendor's business, whose
output and log-sum-exp are one more part. Nothing is ever subtracted.

* ``edit_first_keys``: the run is all keys after the last touched one. For the vendor that is less than without an edit.
* ``edit_last_rows_``: edits act on the last rows alone, and the run is the longest one that all of these rows see.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from attn_kernels.edited_attention.edited_flash import LOWEST_MAXIMUM, accumulate, load_tile, load_whole_tile
from attn_kernels.edited_attention.launch import (
    batch_stride,
    ceil_div,
    last_contiguous,
    launch,
    multiprocessors,
    padded_size,
)
from attn_kernels.edited_attention.lowering import LoweredEdits
from attn_kernels.edited_attention.tiles import (
    LOG2_E,
    SMALLEST_TARGET_IN_KERNEL,
    has_bit,
    map_of_rows,
    mapped_logits,
    matmul,
    scores,
    with_affine,
)
from attn_kernels.edited_attention.tiles import NO_BIT as NO_BIT_IN_KERNEL
from attn_kernels.inputs import AttentionInputs

# Rows and keys of a tile, warps, pipeline stages: of many rows, and of so few that not all multiprocessors had a program.
CONFIG = (64, 64, 4, 3)
CONFIG_OF_FEW_ROWS = (16, 64, 4, 3)
# The other keys are gathered by every program, in tiles.
MOST_OTHERS = 256


@triton.jit
def _span_step(
    logits,
    value_tile,
    to_log2,
    row_scale,
    row_absolute,
    row_bias,
    accumulator,
    total,
    highest,
    HAS_MAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of the span from the products of queries and keys, minus infinity where a key is not shown."""
    if HAS_MAP:
        logits *= to_log2
        edited = row_scale * logits + row_absolute * tl.abs(logits) + row_bias
        edited = tl.where(logits > float("-inf"), edited, float("-inf"))
        return accumulate(edited, 1.0, value_tile, accumulator, total, highest, PRECISION)
    return accumulate(logits, to_log2, value_tile, accumulator, total, highest, PRECISION)


@triton.jit
def _logits_of_others(
    query_tile,
    key_base,
    k_m,
    keys,
    codes,
    rows,
    row_code,
    head,
    num_keys,
    in_d,
    to_log2,
    map_coefficients,
    num_heads,
    CAUSAL: tl.constexpr,
    NUM_MAPS: tl.constexpr,
    MAP_KEYS: tl.constexpr,
    MAP_ROWS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Edited logits (R, C) of gathered ``keys`` (C,) with their ``codes``."""
    inside = keys < num_keys
    key_tile = load_tile(key_base, keys.to(tl.int64) * k_m, in_d, D, BLOCK_D, inside, True)
    visible = inside[None, :] & (rows[:, None] >= 0)
    if CAUSAL:
        visible = visible & (keys[None, :] <= rows[:, None])
    logits = tl.where(visible, scores(query_tile, key_tile, to_log2, PRECISION), float("-inf"))
    return mapped_logits(
        logits, codes[None, :], row_code, head, map_coefficients, num_heads, NUM_MAPS, MAP_KEYS, MAP_ROWS
    )


@triton.jit
def _span_flash(
    query,
    key,
    value,
    output,
    given,
    given_log_sum_exp,
    heads,
    q_b,
    q_h,
    q_n,
    k_b,
    k_h,
    k_m,
    v_b,
    v_h,
    v_m,
    o_b,
    o_h,
    o_n,
    g_b,
    g_h,
    g_n,
    num_heads,
    heads_per_kv,
    num_queries,
    num_keys,
    first_row,
    first_given,
    scaling,
    span_start,
    span_stop,
    span_bias,
    span_bias_b,
    others,
    others_b,
    num_others,
    key_codes,
    codes_b,
    num_codes,
    row_codes,
    row_codes_stride,
    map_coefficients,
    regroup,
    gain,
    gain_b,
    offset,
    offset_b,
    CAUSAL: tl.constexpr,
    GIVEN_PARTS: tl.constexpr,
    HAS_HOLES: tl.constexpr,
    HAS_ROW_CODES: tl.constexpr,
    NUM_MAPS: tl.constexpr,
    MAP_KEYS: tl.constexpr,
    MAP_ROWS: tl.constexpr,
    SPAN_TERM: tl.constexpr,
    SPAN_CODE: tl.constexpr,
    SPAN_IS_TARGET: tl.constexpr,
    ONE_TILE: tl.constexpr,
    HAS_REGROUP: tl.constexpr,
    SOURCE: tl.constexpr,
    TARGET: tl.constexpr,
    GATE_OF: tl.constexpr,
    GATE_SHARE: tl.constexpr,
    REGROUP_ROW: tl.constexpr,
    HAS_AFFINE: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    AFFINE_ROW: tl.constexpr,
    HAS_HEADS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    # The longest programs, those of the last rows, start first.
    row_tile = tl.num_programs(0) - 1 - tl.program_id(0)
    batch = tl.program_id(2).to(tl.int64)
    if HAS_HEADS:
        head = tl.load(heads + tl.program_id(1)).to(tl.int64)
    else:
        head = tl.program_id(1).to(tl.int64)
    kv_head = head // heads_per_kv
    first_of_tile = first_row + row_tile * BLOCK_N
    rows = first_of_tile + tl.arange(0, BLOCK_N)
    row_inside = rows < num_queries
    in_d = tl.arange(0, BLOCK_D)
    in_dv = tl.arange(0, BLOCK_DV)
    in_m = tl.arange(0, BLOCK_M)
    query_tile = tl.load(
        query + batch * q_b + head * q_h + rows[:, None].to(tl.int64) * q_n + in_d[None, :],
        mask=row_inside[:, None] & (in_d[None, :] < D),
        other=0.0,
    )
    row_code = tl.zeros([BLOCK_N, 1], tl.int32)
    if HAS_ROW_CODES:
        row_code = tl.load(row_codes + batch * row_codes_stride + rows, mask=row_inside, other=0).to(tl.int32)[:, None]
    key_base = key + batch * k_b + kv_head * k_h
    value_base = value + batch * v_b + kv_head * v_h
    bias_base = span_bias + batch * span_bias_b
    to_log2 = scaling * LOG2_E

    # Read ahead: whatever is needed after the span.
    others_base = others + batch * others_b
    other_keys = tl.load(others_base + in_m, mask=in_m < num_others, other=num_keys)
    other_codes = tl.load(key_codes + batch * codes_b + other_keys, mask=other_keys < num_codes, other=0).to(tl.int32)
    highest = tl.full([BLOCK_N], LOWEST_MAXIMUM, tl.float32)
    rest_total = tl.zeros([BLOCK_N], tl.float32)
    if GIVEN_PARTS > 0:
        given_row = rows - first_given
        has_given = row_inside & (given_row >= 0)
        given_lse_at = given_log_sum_exp + (batch * num_heads + head) * (num_queries - first_given) + given_row
        given_lse_b = num_heads * (num_queries - first_given)
    for part in tl.static_range(GIVEN_PARTS):
        lse = tl.load(given_lse_at + part * given_lse_b, mask=has_given, other=float("-inf")) * LOG2_E
        new_highest = tl.maximum(highest, lse)
        rest_total = rest_total * tl.exp2(highest - new_highest) + tl.exp2(lse - new_highest)
        highest = new_highest

    # The span.
    row_scale, row_absolute, row_bias = map_of_rows(row_code, head, map_coefficients, num_heads, SPAN_TERM, MAP_ROWS)
    span_accumulator = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    span_total = tl.zeros([BLOCK_N], tl.float32)
    span_highest = tl.full([BLOCK_N], LOWEST_MAXIMUM, tl.float32)
    stop = span_stop
    inner_stop = span_stop
    if CAUSAL:
        stop = tl.minimum(stop, first_of_tile + BLOCK_N)
        inner_stop = tl.minimum(inner_stop, first_of_tile + 1)
    inner_stop = span_start + tl.maximum(inner_stop - span_start, 0) // BLOCK_M * BLOCK_M
    in_key_tile = in_m * k_m
    in_value_tile = in_m * v_m
    for first in tl.range(span_start, inner_stop, BLOCK_M, num_stages=STAGES):
        key_tile = load_whole_tile(key_base + first * k_m.to(tl.int64), in_key_tile, in_d, D, BLOCK_D, True)
        logits = scores(query_tile, key_tile, 1.0, PRECISION)
        if HAS_HOLES:
            logits += tl.load(bias_base + first - span_start + in_m)[None, :]
        value_tile = load_whole_tile(value_base + first * v_m.to(tl.int64), in_value_tile, in_dv, DV, BLOCK_DV, False)
        span_accumulator, span_total, span_highest, _, _ = _span_step(
            logits,
            value_tile,
            to_log2,
            row_scale,
            row_absolute,
            row_bias,
            span_accumulator,
            span_total,
            span_highest,
            SPAN_TERM != NO_BIT_IN_KERNEL,
            PRECISION,
        )
    for first in tl.range(inner_stop, stop, BLOCK_M, num_stages=1):
        keys = first + in_m
        inside = keys < stop
        key_tile = load_tile(key_base, keys.to(tl.int64) * k_m, in_d, D, BLOCK_D, inside, True)
        shown = inside[None, :] & row_inside[:, None]
        if CAUSAL:
            shown = shown & (keys[None, :] <= rows[:, None])
        logits = tl.where(shown, scores(query_tile, key_tile, 1.0, PRECISION), float("-inf"))
        if HAS_HOLES:
            logits += tl.load(bias_base + keys - span_start, mask=inside, other=0.0)[None, :]
        value_tile = load_tile(value_base, keys.to(tl.int64) * v_m, in_dv, DV, BLOCK_DV, inside, False)
        span_accumulator, span_total, span_highest, _, _ = _span_step(
            logits,
            value_tile,
            to_log2,
            row_scale,
            row_absolute,
            row_bias,
            span_accumulator,
            span_total,
            span_highest,
            SPAN_TERM != NO_BIT_IN_KERNEL,
            PRECISION,
        )

    # The other keys: their masses by class, measured from the highest logit of all so far.
    given_highest = highest
    highest = tl.maximum(highest, span_highest)
    others_total = tl.zeros([BLOCK_N], tl.float32)
    source_total = tl.zeros([BLOCK_N], tl.float32)
    target_total = tl.zeros([BLOCK_N], tl.float32)
    of_total = tl.zeros([BLOCK_N], tl.float32)
    share_total = tl.zeros([BLOCK_N], tl.float32)
    logits = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for place in tl.range(0, num_others, BLOCK_M, num_stages=1):
        logits = _logits_of_others(
            query_tile, key_base, k_m, other_keys, other_codes, rows, row_code, head, num_keys, in_d, to_log2,
            map_coefficients, num_heads, CAUSAL, NUM_MAPS, MAP_KEYS, MAP_ROWS, D, BLOCK_D, PRECISION,
        )  # fmt: skip
        new_highest = tl.maximum(highest, tl.max(logits, 1))
        shrink = tl.exp2(highest - new_highest)
        highest = new_highest
        weights = tl.exp2(logits - highest[:, None])
        others_total = others_total * shrink + tl.sum(weights, 1)
        if HAS_REGROUP:
            is_source = has_bit(other_codes, SOURCE)[None, :]
            source_total = source_total * shrink + tl.sum(tl.where(is_source, weights, 0.0), 1)
            if TARGET != NO_BIT_IN_KERNEL:
                is_target = has_bit(other_codes, TARGET)[None, :] & (is_source == 0)
                target_total = target_total * shrink + tl.sum(tl.where(is_target, weights, 0.0), 1)
            if GATE_OF != NO_BIT_IN_KERNEL:
                in_gate = has_bit(other_codes, GATE_OF)[None, :]
                of_total = of_total * shrink + tl.sum(tl.where(in_gate, weights, 0.0), 1)
                if GATE_SHARE != NO_BIT_IN_KERNEL:
                    in_gate = has_bit(other_codes, GATE_SHARE)[None, :]
                    share_total = share_total * shrink + tl.sum(tl.where(in_gate, weights, 0.0), 1)
        if not ONE_TILE:
            at = place + BLOCK_M + in_m
            other_keys = tl.load(others_base + at, mask=at < num_others, other=num_keys)
            other_codes = tl.load(key_codes + batch * codes_b + other_keys, mask=other_keys < num_codes, other=0).to(
                tl.int32
            )

    # Everything from one maximum.
    span_shrink = tl.exp2(span_highest - highest)
    span_total = span_total * span_shrink
    given_weight = rest_total * tl.exp2(given_highest - highest)
    everything = given_weight + span_total + others_total
    whole = tl.where(everything > 0, everything, 1.0)
    keep = 1.0
    rest_factor = tl.full([BLOCK_N], 1.0, tl.float32)
    target_factor = tl.full([BLOCK_N], 1.0, tl.float32)
    acts = row_inside
    if HAS_REGROUP:
        keep = tl.load(regroup + head)
        if GATE_OF != NO_BIT_IN_KERNEL:
            if has_bit(SPAN_CODE, GATE_OF):
                of_total += span_total
            acts = acts & (of_total >= tl.load(regroup + num_heads + head) * whole)
            if GATE_SHARE != NO_BIT_IN_KERNEL:
                if has_bit(SPAN_CODE, GATE_SHARE):
                    share_total += span_total
                acts = acts & (share_total <= tl.load(regroup + 2 * num_heads + head) * of_total)
        if REGROUP_ROW != NO_BIT_IN_KERNEL:
            acts = acts & (tl.sum(has_bit(row_code, REGROUP_ROW).to(tl.int32), 1) != 0)
        freed = (1 - keep) * source_total
        if TARGET != NO_BIT_IN_KERNEL:
            if SPAN_IS_TARGET:
                target_total += span_total
            acts = acts & (target_total > SMALLEST_TARGET_IN_KERNEL * whole)
            target_factor = tl.where(acts, 1 + freed / tl.where(target_total > 0, target_total, 1.0), 1.0)
        else:
            # Summed up, not what is left of everything: a source may hold nearly all.
            remaining = given_weight + span_total + (others_total - source_total)
            acts = acts & (remaining > SMALLEST_TARGET_IN_KERNEL * whole)
            rest_factor = tl.where(acts, 1 + freed / tl.where(remaining > 0, remaining, 1.0), 1.0)

    # The parts together.
    span_factor = rest_factor
    if SPAN_IS_TARGET:
        span_factor = target_factor
    accumulator = span_accumulator * (span_factor * span_shrink / whole)[:, None]
    for part in tl.static_range(GIVEN_PARTS):
        given_tile = tl.load(
            given + (batch + part) * g_b + head * g_h + given_row[:, None].to(tl.int64) * g_n + in_dv[None, :],
            mask=has_given[:, None] & (in_dv[None, :] < DV),
            other=0.0,
        ).to(tl.float32)
        lse = tl.load(given_lse_at + part * given_lse_b, mask=has_given, other=float("-inf")) * LOG2_E
        accumulator += given_tile * (rest_factor * tl.exp2(lse - highest) / whole)[:, None]
    for place in tl.range(0, num_others, BLOCK_M, num_stages=1):
        if not ONE_TILE:
            at = place + in_m
            other_keys = tl.load(others_base + at, mask=at < num_others, other=num_keys)
            other_codes = tl.load(key_codes + batch * codes_b + other_keys, mask=other_keys < num_codes, other=0).to(
                tl.int32
            )
            logits = _logits_of_others(
                query_tile, key_base, k_m, other_keys, other_codes, rows, row_code, head, num_keys, in_d, to_log2,
                map_coefficients, num_heads, CAUSAL, NUM_MAPS, MAP_KEYS, MAP_ROWS, D, BLOCK_D, PRECISION,
            )  # fmt: skip
        weights = tl.exp2(logits - highest[:, None])
        factor = (rest_factor / whole)[:, None]
        if HAS_REGROUP:
            is_source = has_bit(other_codes, SOURCE)[None, :]
            if TARGET != NO_BIT_IN_KERNEL:
                factor = tl.where(has_bit(other_codes, TARGET)[None, :], (target_factor / whole)[:, None], factor)
            factor = tl.where(is_source, (tl.where(acts, keep, 1.0) / whole)[:, None], factor)
        value_tile = load_tile(
            value_base, other_keys.to(tl.int64) * v_m, in_dv, DV, BLOCK_DV, other_keys < num_keys, False
        )
        accumulator = matmul((weights * factor).to(value_tile.dtype), value_tile, accumulator, PRECISION)

    if HAS_AFFINE:
        accumulator = with_affine(
            accumulator,
            row_code,
            head,
            batch,
            gain,
            gain_b,
            offset,
            offset_b,
            in_dv,
            HAS_OFFSET,
            AFFINE_ROW,
            DV,
        )
    tl.store(
        output + batch * o_b + head * o_h + rows[:, None].to(tl.int64) * o_n + in_dv[None, :],
        accumulator.to(output.dtype.element_ty),
        mask=row_inside[:, None] & (in_dv[None, :] < DV),
    )


def edit_first_keys(inputs: AttentionInputs, lowered: LoweredEdits, rest: tuple[Tensor, Tensor]) -> Tensor:
    """Output ``(B, H, N, Dv)`` of a causal call with as many queries as keys.

    ``rest``: output ``(B, H, R, Dv)`` and log-sum-exp ``(B, H, R)`` (float32, natural, contiguous) of plain attention of the
    last R queries to the last R keys, which no edit touches.
    """
    batch, heads, num_queries, _ = inputs.query.shape
    output = inputs.value.new_empty(batch, num_queries, heads, inputs.value.shape[3]).transpose(1, 2)
    first = num_queries - rest[0].shape[2]
    assert lowered.span is not None
    _launch(
        inputs,
        lowered,
        output,
        rest,
        first,
        lowered.span.others_without(first, num_queries, num_queries),
        0,
        None,
        CONFIG,
    )
    return output


def edit_last_rows_(
    inputs: AttentionInputs,
    lowered: LoweredEdits,
    output: Tensor,
    first_row: int,
    run: tuple[int, int],
    of_run: tuple[Tensor, Tensor] | None,
    heads: Tensor | None = None,
) -> None:
    """Writes the rows from ``first_row`` on of ``output`` ``(B, H, N, Dv)``, for a call of as many queries as keys.

    ``of_run``: output ``(B, H, R, Dv)`` and log-sum-exp ``(B, H, R)`` of plain attention of these rows to the keys of ``run``,
    (first, one past the last), which no edit touches and all of these rows see; None if it is empty. Of a single sample it
    may be P parts of the run, ``(P, H, R, Dv)`` and ``(P, H, R)``. ``heads`` (h,) int32 restricts the work to some heads.
    """
    assert lowered.span is not None
    others = lowered.span.others_without(run[0], run[1], inputs.num_keys)
    num_heads = inputs.num_heads if heads is None else len(heads)
    programs = ceil_div(inputs.num_queries - first_row, CONFIG[0]) * num_heads * len(inputs.query)
    config = CONFIG if programs >= multiprocessors(inputs.query.device) else CONFIG_OF_FEW_ROWS
    _launch(inputs, lowered, output, of_run, first_row, others, first_row, heads, config)


def _launch(
    inputs: AttentionInputs,
    lowered: LoweredEdits,
    output: Tensor,
    given: tuple[Tensor, Tensor] | None,
    first_given: int,
    others: Tensor,
    first_row: int,
    heads: Tensor | None,
    config: tuple[int, int, int, int],
) -> None:
    query, key, value = (last_contiguous(tensor) for tensor in (inputs.query, inputs.key, inputs.value))
    batch, num_heads, num_queries, head_dim = query.shape
    value_dim = value.shape[3]
    span = lowered.span
    assert span is not None
    block_n, block_m, warps, stages = config
    codes, rows, regroup = lowered.key_codes, lowered.row_codes, lowered.regroup
    gain, offset = lowered.gain, lowered.offset
    grid = (ceil_div(num_queries - first_row, block_n), num_heads if heads is None else len(heads), batch)
    launch(
        _span_flash,
        grid,
        (
            query,
            key,
            value,
            output,
            *((None, None) if given is None else given),
            heads,
            *query.stride()[:3],
            *key.stride()[:3],
            *value.stride()[:3],
            *output.stride()[:3],
            *((0, 0, 0) if given is None else given[0].stride()[:3]),
            num_heads,
            num_heads // key.shape[1],
            num_queries,
            key.shape[2],
            first_row,
            first_given,
            inputs.scaling,
            span.start,
            span.stop,
            span.bias,
            batch_stride(span.bias),
            others,
            batch_stride(others),
            others.shape[1],
            codes,
            batch_stride(codes),
            codes.shape[-1],
            rows,
            batch_stride(rows),
            lowered.map_coefficients,
            None if regroup is None else regroup.coefficients,
            gain,
            batch_stride(gain),
            offset,
            batch_stride(offset),
        ),
        {
            "CAUSAL": inputs.causal,
            "GIVEN_PARTS": 0 if given is None else given[0].shape[0] // batch,
            "HAS_HOLES": span.has_holes,
            "HAS_ROW_CODES": rows is not None,
            **lowered.map_constants,
            "SPAN_TERM": span.term,
            "SPAN_CODE": span.code,
            "SPAN_IS_TARGET": span.is_target,
            "ONE_TILE": others.shape[1] <= block_m,
            **lowered.regroup_constants,
            **lowered.affine_constants,
            "HAS_HEADS": heads is not None,
            "D": head_dim,
            "DV": value_dim,
            "BLOCK_D": padded_size(head_dim),
            "BLOCK_DV": padded_size(value_dim),
            "BLOCK_N": block_n,
            "BLOCK_M": block_m,
            "PRECISION": "ieee",
            "STAGES": stages,
        },
        warps,
    )
