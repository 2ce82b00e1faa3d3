"""XAttention's scores: antidiagonal sums of runs of queries and keys, as the log-sum-exp of each block of keys.

Source: Xu et al., XAttention, arXiv 2503.16428. The sum over a cell's antidiagonal is a product of vectors of ``stride`` tokens. A
program multiplies a tile of query runs with a tile of key runs, token by token of the run, and leaves one number for each run of
queries and block of keys, and no score. From these a second kernel takes the softmax, and sums over each block's runs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attn_kernels.edited_attention.edited_flash import LOWEST_MAXIMUM
from attn_kernels.edited_attention.launch import ceil_div, last_contiguous, launch, padded_size, power_of_two
from attn_kernels.edited_attention.tiles import LOG2_E, scores

RUNS_OF_BLOCK = (1, 2, 4, 8, 16, 32, 64, 128)
# So many numbers are in memory at once.
MOST_NUMBERS = 2**26
# So many of them a program looks at together.
NUMBERS_OF_TILE = 4096


@triton.jit
def _antidiagonal(
    query,
    key,
    found,
    first_rows,
    first_keys,
    query_in_run,
    key_in_run,
    q_b,
    q_h,
    q_n,
    k_b,
    k_h,
    k_m,
    f_b,
    f_h,
    f_i,
    heads_per_kv,
    first_head,
    num_queries,
    num_keys,
    query_runs,
    key_runs,
    query_offset,
    window,
    scale,
    HAS_WINDOW: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    STRIDE: tl.constexpr,
    RUNS_OF_BLOCK: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    BLOCKS: tl.constexpr = BLOCK_J // RUNS_OF_BLOCK
    batch = tl.program_id(2).to(tl.int64)
    head = (tl.program_id(1) + first_head).to(tl.int64)
    tiles = tl.cdiv(key_runs, BLOCK_J)
    i = tl.program_id(0) // tiles * BLOCK_I + tl.arange(0, BLOCK_I)
    first_j = tl.program_id(0) % tiles * BLOCK_J
    j = first_j + tl.arange(0, BLOCK_J)
    first_row, first_key = 0, 0
    position = query_offset + i * STRIDE
    if HAS_PADDING:
        first_row = tl.load(first_rows + batch).to(tl.int32)
        first_key = tl.load(first_keys + batch).to(tl.int32)
        position = query_offset + first_row - first_key + i * STRIDE
    highest_position = query_offset + first_row - first_key + (tl.program_id(0) // tiles + 1) * BLOCK_I * STRIDE - 1
    in_d = tl.arange(0, BLOCK_D)
    sums = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
    if first_j * STRIDE <= highest_position:
        query_base = query + batch * q_b + head * q_h
        key_base = key + batch * k_b + head // heads_per_kv * k_h
        for s in tl.range(0, STRIDE, num_stages=STAGES):
            row = first_row + i * STRIDE + STRIDE - 1 - s
            column = first_key + j * STRIDE + s
            query_tile = tl.load(
                query_base + row[:, None].to(tl.int64) * q_n + in_d[None, :],
                mask=(row < num_queries)[:, None] & (in_d[None, :] < D),
                other=0.0,
            )
            key_tile = tl.load(
                key_base + column[None, :].to(tl.int64) * k_m + in_d[:, None],
                mask=(column < num_keys)[None, :] & (in_d[:, None] < D),
                other=0.0,
            )
            sums += scores(query_tile, key_tile, 1.0, PRECISION)
    seen = j[None, :] * STRIDE <= (position + STRIDE - 1)[:, None]
    if HAS_WINDOW:
        seen = seen & (j[None, :] * STRIDE + STRIDE - 1 > (position - window)[:, None])
    if HAS_PADDING:
        real_query = tl.load(query_in_run + batch * query_runs + i, mask=i < query_runs, other=0)
        real_key = tl.load(key_in_run + batch * key_runs + j, mask=j < key_runs, other=0)
        seen = seen & (real_query != 0)[:, None] & (real_key != 0)[None, :]
    else:
        seen = seen & (i * STRIDE < num_queries)[:, None] & (j * STRIDE < num_keys)[None, :]
    sums = tl.where(seen, sums * (scale * LOG2_E), float("-inf"))
    cells = tl.reshape(sums, (BLOCK_I, BLOCKS, RUNS_OF_BLOCK))
    highest = tl.max(cells, 2)
    bounded = tl.where(highest == float("-inf"), 0.0, highest)
    mass = bounded + tl.log2(tl.sum(tl.exp2(cells - bounded[:, :, None]), 2))
    block = first_j // RUNS_OF_BLOCK + tl.arange(0, BLOCKS)
    tl.store(
        found + batch * f_b + tl.program_id(1) * f_h + i[:, None].to(tl.int64) * f_i + block[None, :],
        mass,
        mask=(i < query_runs)[:, None] & (block < key_runs // RUNS_OF_BLOCK)[None, :],
    )


@triton.jit
def _mass_of_blocks(
    found,
    mass,
    f_b,
    f_h,
    f_i,
    m_b,
    m_h,
    m_t,
    first_head,
    blocks,
    RUNS_OF_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The softmax over blocks of keys of log2 masses ``found``, summed over the runs of a block of queries."""
    tile = tl.program_id(0).to(tl.int64)
    run = tl.arange(0, RUNS_OF_BLOCK)
    found += tl.program_id(2).to(tl.int64) * f_b + tl.program_id(1).to(tl.int64) * f_h
    found += (tile * RUNS_OF_BLOCK + run[:, None]) * f_i
    mass += tl.program_id(2).to(tl.int64) * m_b + (tl.program_id(1) + first_head).to(tl.int64) * m_h + tile * m_t
    highest = tl.full([RUNS_OF_BLOCK], LOWEST_MAXIMUM, tl.float32)
    total = tl.zeros([RUNS_OF_BLOCK], tl.float32)
    for begin in range(0, blocks, BLOCK):
        block = begin + tl.arange(0, BLOCK)[None, :]
        part = tl.load(found + block, mask=(run[:, None] >= 0) & (block < blocks), other=float("-inf"))
        new_highest = tl.maximum(highest, tl.max(part, 1))
        total = total * tl.exp2(highest - new_highest) + tl.sum(tl.exp2(part - new_highest[:, None]), 1)
        highest = new_highest
    # Runs of padding see nothing.
    scale = tl.where(total > 0, 1 / tl.where(total > 0, total, 1.0), 0.0)
    for begin in range(0, blocks, BLOCK):
        block = begin + tl.arange(0, BLOCK)
        inside = block < blocks
        part = tl.load(found + block[None, :], mask=(run[:, None] >= 0) & inside[None, :], other=float("-inf"))
        tl.store(mass + block, tl.sum(tl.exp2(part - highest[:, None]) * scale[:, None], 0), mask=inside)


def antidiagonal_block_mass(
    query: Tensor,
    key: Tensor,
    scaling: float,
    stride: int,
    block: int,
    query_offset: int,
    window: int | None = None,
    padding: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """m of XAttention: the softmax over runs of keys, summed over the runs of query blocks and key blocks.

    Args:
        query, key: ``(B, H, N, D)`` and ``(B, K, M, D)`` in one dtype; keys of padding are 0.
        scaling: of a query and a key; the stride's share is taken here.
        stride, block: tokens of a run, and of a block; ``block // stride`` is one of ``RUNS_OF_BLOCK``.
        query_offset: place of the first query among the keys.
        window: the model's own, or None.
        padding: places of each sample's first real query and key ``(B,)``, and which runs counted from there have real queries
            ``(B, runs)`` and keys ``(B, runs)`` bool; None: all are real.

    Returns:
        ``(B, H, T, U)`` float32, 0 where a block of queries sees nothing of a block of keys.
    """
    query, key = last_contiguous(query), last_contiguous(key)
    batch, num_heads, num_queries, head_dim = query.shape
    runs_of_block = block // stride
    query_runs, key_runs = (ceil_div(size, block) * runs_of_block for size in (num_queries, key.shape[2]))
    block_d = padded_size(head_dim)
    block_i, block_j, warps, stages = _config(query.dtype, block_d)
    block_j = max(block_j, runs_of_block)
    of_padding: tuple[Tensor | None, ...] = (None,) * 4
    if padding is not None:
        of_padding = tuple(part.to(torch.int32).expand(batch, *part.shape[1:]).contiguous() for part in padding)
    shape = (ceil_div(num_queries, block), ceil_div(key.shape[2], block))
    at_once = max(1, MOST_NUMBERS // (batch * query_runs * shape[1]))
    mass = torch.empty(batch, num_heads, *shape, dtype=torch.float32, device=query.device)
    block_u = max(16, min(power_of_two(shape[1]), NUMBERS_OF_TILE // runs_of_block))
    for first_head in range(0, num_heads, at_once):
        heads = min(at_once, num_heads - first_head)
        found = torch.empty(batch, heads, query_runs, shape[1], dtype=torch.float32, device=query.device)
        launch(
            _antidiagonal,
            (ceil_div(query_runs, block_i) * ceil_div(key_runs, block_j), heads, batch),
            (
                query,
                key,
                found,
                *of_padding,
                *query.stride()[:3],
                *key.stride()[:3],
                *found.stride()[:3],
                num_heads // key.shape[1],
                first_head,
                num_queries,
                key.shape[2],
                query_runs,
                key_runs,
                query_offset,
                window or 0,
                scaling / stride,
            ),
            {
                "HAS_WINDOW": window is not None,
                "HAS_PADDING": padding is not None,
                "STRIDE": stride,
                "RUNS_OF_BLOCK": runs_of_block,
                "D": head_dim,
                "BLOCK_D": block_d,
                "BLOCK_I": block_i,
                "BLOCK_J": block_j,
                "PRECISION": "ieee",
                "STAGES": stages,
            },
            warps,
        )
        launch(
            _mass_of_blocks,
            (shape[0], heads, batch),
            (found, mass, *found.stride()[:3], *mass.stride()[:3], first_head, shape[1]),
            {"RUNS_OF_BLOCK": runs_of_block, "BLOCK": block_u},
            4,
        )
    return mass


def _config(dtype: torch.dtype, block_d: int) -> tuple[int, int, int, int]:
    """Runs of queries and keys of a tile, warps, stages. float32 needs twice the shared memory."""
    if dtype == torch.float32:
        return 32, 32, 4, 1
    return (128, 128, 8, 3) if block_d <= 128 else (64, 128, 8, 2)
