"""Column pass: how much weight each key receives, summed over queries, without the N x M weights.

Given each row's log-sum-exp, a weight is one exponential of one logit. So a program owns a block of keys and streams the
query tiles that can see it; one product of queries and keys is all it costs, for the chosen heads only. Used by ACT's
detection (arXiv 2406.15765), where the mean over the rows that see a key is compared with a threshold.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attn_kernels.edited_attention.edited_flash import _allowed, _batch_stride, _last_contiguous, _padded, load_tile
from attn_kernels.edited_attention.lowering import LoweredEdits, NotLowered
from attn_kernels.edited_attention.tiles import LOG2_E, capped, mapped_logits, paired_visibility, scores
from attn_kernels.inputs import AttentionInputs

# Rows and keys of a tile, warps and pipeline stages.
CONFIG = (64, 64, 4, 3)
# Rows that one program sums over, so that few heads still fill the device.
ROWS_PER_PROGRAM = 1024


@triton.jit
def _column_pass(
    query,
    key,
    log_sum_exp,
    sums,
    counts,
    heads,
    q_b,
    q_h,
    q_n,
    k_b,
    k_h,
    k_m,
    num_heads,
    heads_per_kv,
    num_chosen,
    num_queries,
    num_keys,
    query_offset,
    scaling,
    softcap,
    window,
    key_valid,
    valid_stride,
    mask,
    mask_stride_b,
    mask_stride_h,
    mask_stride_n,
    mask_stride_m,
    query_value,
    key_value,
    query_value_stride,
    key_value_stride,
    order_heads,
    key_codes,
    codes_b,
    codes_h,
    num_codes,
    row_codes,
    row_codes_stride,
    map_coefficients,
    pair_heads,
    rows_scope,
    rows_scope_stride,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_MASK: tl.constexpr,
    MASK_IS_BIAS: tl.constexpr,
    LOWEST: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_VALUES: tl.constexpr,
    HAS_ORDER_HEADS: tl.constexpr,
    HAS_CODES: tl.constexpr,
    HAS_ROW_CODES: tl.constexpr,
    NUM_MAPS: tl.constexpr,
    MAP_KEYS: tl.constexpr,
    MAP_ROWS: tl.constexpr,
    NUM_PAIRS: tl.constexpr,
    PAIR_KEYS: tl.constexpr,
    PAIR_ROWS: tl.constexpr,
    HAS_ROWS_SCOPE: tl.constexpr,
    HAS_HEADS: tl.constexpr,
    COUNT: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS_OF_PROGRAM: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    key_tile_index = tl.program_id(0)
    splits = tl.cdiv(num_queries, ROWS_OF_PROGRAM)
    chosen = tl.program_id(1) // splits
    first_row = tl.program_id(1) % splits * ROWS_OF_PROGRAM
    batch = tl.program_id(2).to(tl.int64)
    keys = key_tile_index * BLOCK_M + tl.arange(0, BLOCK_M)
    start = first_row
    if CAUSAL and not HAS_MASK and not HAS_VALUES and NUM_PAIRS == 0:
        # The first row that sees the first of these keys.
        start = tl.maximum(start, (key_tile_index * BLOCK_M - query_offset) // BLOCK_N * BLOCK_N)
    stop = tl.minimum(first_row + ROWS_OF_PROGRAM, num_queries)
    if start >= stop:
        return
    if HAS_HEADS:
        head = tl.load(heads + chosen).to(tl.int64)
    else:
        head = chosen.to(tl.int64)
    kv_head = head // heads_per_kv
    in_d = tl.arange(0, BLOCK_D)
    inside = keys < num_keys
    key_tile = load_tile(key + batch * k_b + kv_head * k_h, keys.to(tl.int64) * k_m, in_d, D, BLOCK_D, inside, True)
    code = tl.zeros([1, BLOCK_M], tl.int32)
    if HAS_CODES:
        code = tl.load(key_codes + batch * codes_b + head * codes_h + keys, mask=keys < num_codes, other=0)
        code = code.to(tl.int32)[None, :]
    column = tl.zeros([BLOCK_M], tl.float32)
    count = tl.zeros([BLOCK_M], tl.float32)
    for first in tl.range(start, stop, BLOCK_N, num_stages=STAGES):
        rows = first + tl.arange(0, BLOCK_N)
        row_inside = rows < stop
        query_tile = load_tile(
            query + batch * q_b + head * q_h, rows.to(tl.int64) * q_n, in_d, D, BLOCK_D, row_inside, False
        )
        # Rows outside weigh nothing: exp2(-inf).
        lse = tl.load(
            log_sum_exp + (batch * num_heads + head) * num_queries + rows, mask=row_inside, other=float("inf")
        )
        counted = row_inside
        if HAS_ROWS_SCOPE:
            in_scope = tl.load(rows_scope + batch * rows_scope_stride + rows, mask=row_inside, other=0) != 0
            counted = counted & in_scope
        row_code = tl.zeros([BLOCK_N, 1], tl.int32)
        if HAS_ROW_CODES:
            row_code = tl.load(row_codes + batch * row_codes_stride + rows, mask=row_inside, other=0)
            row_code = row_code.to(tl.int32)[:, None]
        logits = capped(scores(query_tile, key_tile, scaling * LOG2_E, PRECISION), softcap, HAS_SOFTCAP)
        visible, valid, bias = _allowed(
            batch,
            head,
            rows,
            keys,
            rows + query_offset,
            num_queries,
            num_keys,
            window,
            key_valid,
            valid_stride,
            mask,
            mask_stride_b,
            mask_stride_h,
            mask_stride_n,
            mask_stride_m,
            query_value,
            key_value,
            query_value_stride,
            key_value_stride,
            order_heads,
            CAUSAL,
            HAS_WINDOW,
            HAS_VALID,
            HAS_MASK,
            MASK_IS_BIAS,
            LOWEST,
            HAS_VALUES,
            HAS_ORDER_HEADS,
        )
        if MASK_IS_BIAS:
            logits += bias
        logits = mapped_logits(logits, code, row_code, head, map_coefficients, num_heads, NUM_MAPS, MAP_KEYS, MAP_ROWS)
        visible = paired_visibility(
            visible, valid, code, row_code, head, pair_heads, num_heads, NUM_PAIRS, PAIR_KEYS, PAIR_ROWS
        )
        visible = visible & counted[:, None]
        # A removed key weighs nothing, also in a row that has nothing else and so no finite log-sum-exp.
        weights = tl.where(visible & (logits > float("-inf")), tl.exp2(logits - lse[:, None] * LOG2_E), 0.0)
        column += tl.sum(weights, 0)
        if COUNT:
            count += tl.sum(visible.to(tl.float32), 0)
    place = (batch * num_chosen + chosen) * num_keys + keys
    tl.atomic_add(sums + place, column, mask=inside)
    if COUNT:
        tl.atomic_add(counts + place, count, mask=inside)


def column_pass(
    inputs: AttentionInputs,
    log_sum_exp: Tensor,
    heads: Tensor | None = None,
    lowered: LoweredEdits | None = None,
    rows: Tensor | None = None,
    mean: bool = False,
) -> Tensor:
    """``(B, h, M)`` float32: the weight that each key receives from the rows of ``rows`` (bool ``(B|1, N)``; None: all).

    ``log_sum_exp`` ``(B, H, N)`` float32, natural, is that of the (edited) logits, sink logits included. ``heads`` (h,) of
    query heads; None: all. ``lowered``: LogitMaps and Orders in force; a Regroup raises ``NotLowered``. ``mean`` divides by
    how many of those rows may see the key, 0 where none may. Sums are added up in no fixed order.
    """
    if lowered is not None and lowered.regroup is not None:
        raise NotLowered("column sums under a Regroup")
    query, key = _last_contiguous(inputs.query), _last_contiguous(inputs.key)
    batch, num_heads, num_queries, head_dim = query.shape
    num_keys = key.shape[2]
    num_chosen = num_heads if heads is None else len(heads)
    totals = torch.zeros(1 + mean, batch, num_chosen, num_keys, dtype=torch.float32, device=query.device)
    if num_chosen == 0:
        return totals[0]
    given = inputs.mask if inputs.mask is not None else inputs.bias
    if given is not None:
        given = given.expand(batch, num_heads, -1, -1)
    valid = inputs.key_valid if inputs.padded else None
    values = None if lowered is None else lowered.order_values
    codes = None if lowered is None or not lowered.edits_logits else lowered.key_codes
    row_codes = None if lowered is None else lowered.row_codes
    block_n, block_m, warps, stages = CONFIG if query.dtype != torch.float32 else (64, 64, 4, 1)
    splits = triton.cdiv(num_queries, ROWS_PER_PROGRAM)
    _column_pass[(triton.cdiv(num_keys, block_m), num_chosen * splits, batch)](
        query,
        key,
        log_sum_exp.contiguous(),
        totals[0],
        totals[-1],
        heads,
        *query.stride()[:3],
        *key.stride()[:3],
        num_heads,
        num_heads // key.shape[1],
        num_chosen,
        num_queries,
        num_keys,
        inputs.query_offset,
        inputs.scaling,
        inputs.softcap or 0.0,
        inputs.window or 0,
        valid,
        0 if valid is None else _batch_stride(valid),
        given,
        *((0, 0, 0, 0) if given is None else given.stride()),
        None if values is None else values[0],
        None if values is None else values[1],
        0 if values is None else _batch_stride(values[0]),
        0 if values is None else _batch_stride(values[1]),
        None if lowered is None else lowered.order_heads,
        codes,
        0 if codes is None else _batch_stride(codes),
        0 if codes is None or codes.shape[1] == 1 else codes.stride(1),
        0 if codes is None else codes.shape[-1],
        row_codes,
        0 if row_codes is None else _batch_stride(row_codes),
        None if lowered is None else lowered.map_coefficients,
        None if lowered is None else lowered.pair_heads,
        rows,
        0 if rows is None else _batch_stride(rows),
        CAUSAL=inputs.causal,
        HAS_WINDOW=inputs.window is not None,
        HAS_VALID=valid is not None,
        HAS_MASK=given is not None,
        MASK_IS_BIAS=inputs.mask is None and inputs.bias is not None,
        LOWEST=0.0 if inputs.bias is None else torch.finfo(inputs.bias.dtype).min / 2,
        HAS_SOFTCAP=inputs.softcap is not None,
        HAS_VALUES=values is not None,
        HAS_ORDER_HEADS=lowered is not None and lowered.order_heads is not None,
        HAS_CODES=codes is not None,
        HAS_ROW_CODES=row_codes is not None,
        NUM_MAPS=0 if lowered is None else lowered.num_maps,
        MAP_KEYS=0 if lowered is None else lowered.map_keys,
        MAP_ROWS=0 if lowered is None else lowered.map_rows,
        NUM_PAIRS=0 if lowered is None else lowered.num_pairs,
        PAIR_KEYS=0 if lowered is None else lowered.pair_keys,
        PAIR_ROWS=0 if lowered is None else lowered.pair_rows,
        HAS_ROWS_SCOPE=rows is not None,
        HAS_HEADS=heads is not None,
        COUNT=mean,
        D=head_dim,
        BLOCK_D=_padded(head_dim),
        BLOCK_N=block_n,
        BLOCK_M=block_m,
        ROWS_OF_PROGRAM=ROWS_PER_PROGRAM,
        PRECISION="ieee",
        STAGES=stages,
        num_warps=warps,
    )
    return totals[0] / totals[1].clamp_(min=1) if mean else totals[0]
