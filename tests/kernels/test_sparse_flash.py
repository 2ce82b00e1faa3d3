"""The sparse flash kernel against dense attention with its visits as a mask: in the interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attn_hooks.last_row import in_last_row, last_row_of
from attn_kernels import AttentionInputs, KeyTiles, PowerOfTwoBlocks, ShardedBlocks, SinkAndWindow, Sparsity
from attn_kernels.patterns import Pattern, Stripes, first_real_key
from attn_kernels.sparse_attention.sparse_flash import sparse_flash
from attn_kernels.sparse_attention.visits import Lists, Visits, lists_of, visits_of
from tests.kernels.triton_device import DEVICE, on_device

# Tiles so small that a toy call has several of them.
SMALL = (16, 16, 4, 1)
SHARDS = ShardedBlocks(16, 1, 3, torch.tensor([0, 2, 1, 0], dtype=torch.int32, device=DEVICE))


@st.composite
def padded_calls(draw: st.DrawFn) -> tuple[AttentionInputs, Tensor | None]:
    """A causal call, and each sample's first real key: GQA, more keys than queries, a window, a softcap, sink logits."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch = draw(st.integers(1, 2))
    heads, kv_heads = draw(st.sampled_from([(2, 1), (3, 3), (4, 2)]))
    num_queries = draw(st.sampled_from([1, 2, 17, 33, 50]))
    num_keys = num_queries + draw(st.sampled_from([0, 0, 1, 20, 41]))
    head_dim, value_dim = draw(st.sampled_from([(8, 8), (5, 3), (24, 16)]))
    left = torch.tensor([draw(st.integers(0, num_keys - 1)) for _ in range(batch)]) * draw(st.integers(0, 1))
    index = torch.arange(num_keys)
    sinks = torch.randn(batch, heads, num_queries, generator=generator)
    inputs = AttentionInputs(
        query=torch.randn(batch, heads, num_queries, head_dim, generator=generator)
        * draw(st.sampled_from([0.3, 1, 20])),
        key=torch.randn(batch, kv_heads, num_keys, head_dim, generator=generator),
        value=torch.randn(batch, kv_heads, num_keys, value_dim, generator=generator),
        scaling=head_dim**-0.5,
        query_index=index[num_keys - num_queries :],
        key_index=index,
        query_position=index[num_keys - num_queries :] - left[:, None],
        key_position=index - left[:, None],
        key_valid=index >= left[:, None],
        window=draw(st.sampled_from([None, None, 1, 7, 30])),
        softcap=draw(st.sampled_from([None, None, 5.0])),
        sink_logits=draw(st.sampled_from([None, sinks, sinks[:1, :, :1]])),
        first_query=num_keys - num_queries,
    )
    return on_device((inputs, left.to(torch.int32) if left.any() else None))


def expected(inputs: AttentionInputs, visited: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp in float64 of the keys where ``visited`` ``(B, H, N, M)`` holds; 0 where there are none."""
    inputs = on_device(inputs, "cpu")
    group = inputs.num_heads // inputs.key.shape[1]
    key, value = (part.double().repeat_interleave(group, 1) for part in (inputs.key, inputs.value))
    logits = inputs.query.double() @ key.transpose(-1, -2) * inputs.scaling
    if inputs.softcap is not None:
        logits = inputs.softcap * torch.tanh(logits / inputs.softcap)
    logits = logits.masked_fill(~visited.cpu(), -torch.inf)
    if inputs.sink_logits is not None:
        sinks = inputs.sink_logits.double().expand(logits.shape[:3])
        logits = torch.cat([logits, sinks[..., None]], -1)
    log_sum_exp = logits.logsumexp(-1)
    weights = (logits - log_sum_exp.nan_to_num(neginf=0.0)[..., None]).exp()
    return weights[..., : key.shape[2]] @ value, log_sum_exp


def patterned(inputs: AttentionInputs, pattern: Pattern, dense_rows: int = 0) -> Tensor:
    shown = pattern.visible(inputs.query_position[:, None, :, None], inputs.key_position[:, None, None, :])
    dense = torch.arange(inputs.num_queries, device=shown.device) >= inputs.num_queries - dense_rows
    visible = inputs.visible(slice(0, inputs.num_queries)) & (shown | dense[:, None])
    return visible.expand(inputs.query.shape[0], inputs.num_heads, -1, -1)


def compare(inputs: AttentionInputs, found: tuple[Tensor, Tensor | None], wanted: tuple[Tensor, Tensor]) -> None:
    """Log-sum-exps of real rows alone: in rows of padding a sink logit may be left out."""
    output, log_sum_exp = found
    assert log_sum_exp is not None
    torch.testing.assert_close(output.double().cpu(), wanted[0], rtol=2e-3, atol=2e-3)
    real = inputs.query_valid.cpu()[:, None].expand(wanted[1].shape)
    torch.testing.assert_close(log_sum_exp.double().cpu()[real], wanted[1][real], rtol=2e-3, atol=2e-3)


PATTERNS = st.one_of(
    st.builds(SinkAndWindow, st.integers(0, 40), st.integers(1, 40)),
    st.builds(PowerOfTwoBlocks, st.sampled_from([1, 3, 4, 16, 32]), st.integers(1, 4), st.integers(0, 3)),
)


@given(padded_calls(), PATTERNS)
@settings(max_examples=80, deadline=None)
def test_static_patterns_equal_their_mask(case: tuple[AttentionInputs, Tensor | None], pattern: Pattern) -> None:
    inputs, first_keys = case
    found = sparse_flash(inputs, pattern, first_keys=first_keys, with_log_sum_exp=True, config=SMALL)
    compare(inputs, found, expected(inputs, patterned(inputs, pattern)))


@given(padded_calls(), st.builds(SinkAndWindow, st.integers(0, 40), st.integers(1, 40)), st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_last_rows_are_dense(
    case: tuple[AttentionInputs, Tensor | None], pattern: SinkAndWindow, dense_rows: int
) -> None:
    """Also where they begin inside a tile."""
    inputs, first_keys = case
    found = sparse_flash(
        inputs, pattern, first_keys=first_keys, with_log_sum_exp=True, config=SMALL, dense_rows=dense_rows
    )
    wanted = patterned(inputs, pattern, dense_rows)
    real = inputs.query_valid[:, None, :, None]
    shown = Sparsity(pattern, dense_rows=dense_rows).shown(inputs, slice(0, inputs.num_queries))
    visible = inputs.visible(slice(0, inputs.num_queries)) & shown
    assert torch.equal(wanted & real, (visible & real).expand_as(wanted))
    compare(inputs, found, expected(inputs, wanted))


def test_dense_rows_of_another_pattern_are_refused() -> None:
    with pytest.raises(TypeError, match="no kernel has dense rows under"):
        sparse_flash(plain_call(16, 16, 8), PowerOfTwoBlocks(16, 1, 1), dense_rows=2)


def random_visits(inputs: AttentionInputs, list_heads: int, seed: int) -> Visits:
    """Some key tiles, whole where every query sees them, and some single keys of the other tiles."""
    generator = torch.Generator().manual_seed(seed)
    batch, size = inputs.query.shape[0], SMALL[0]
    tiles, key_tiles = -(-inputs.num_queries // size), -(-inputs.num_keys // size)
    shape = (batch, list_heads, tiles, key_tiles)
    chosen = torch.rand(shape, generator=generator) < 0.4
    seen = torch.zeros(batch, 1, tiles * size, key_tiles * size, dtype=torch.bool)
    visible = inputs.visible(slice(0, inputs.num_queries)).cpu().expand(batch, 1, -1, -1)
    for sample, first_key in enumerate(first_real_key(inputs).expand(batch).tolist()):
        first_row = max(0, first_key - inputs.query_offset)
        own = visible[sample, :, first_row:, first_key:]
        # Rows beyond the last do not matter.
        seen[sample, :, own.shape[1] :] = True
        seen[sample, :, : own.shape[1], : own.shape[2]] = own
        seen[sample, :, :, own.shape[2] :] = False
    by_all = seen.unflatten(3, (key_tiles, size)).unflatten(2, (tiles, size)).all(-1).all(3)
    by_tile = chosen.repeat_interleave(size, 3)
    seen_by_all = seen.unflatten(2, (tiles, size)).all(3)
    columns = (torch.rand(by_tile.shape, generator=generator) < 0.4) & seen_by_all & ~by_tile
    return on_device(Visits(size, size, lists_of(chosen & by_all), lists_of(chosen & ~by_all), lists_of(columns)))


@given(padded_calls(), st.sampled_from(["all", "kv", "query"]), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_lists_equal_their_mask(case: tuple[AttentionInputs, Tensor | None], heads: str, seed: int) -> None:
    inputs, first_keys = case
    list_heads = {"all": 1, "kv": inputs.key.shape[1], "query": inputs.num_heads}[heads]
    visits = random_visits(inputs, list_heads, seed)
    assert visits.counted(inputs).max() <= 1
    found = sparse_flash(inputs, visits, first_keys=first_keys, with_log_sum_exp=True, config=SMALL)
    compare(inputs, found, expected(inputs, visits.visited(inputs)))


@given(padded_calls(), st.booleans(), st.floats(0, 1), st.sampled_from([None, 0.1, 0.5, 1.0]), st.integers(0, 2**31))
@settings(max_examples=80, deadline=None)
def test_chosen_tiles_and_columns_equal_their_mask(
    case: tuple[AttentionInputs, Tensor | None], by_head: bool, share: float, column_share: float | None, seed: int
) -> None:
    """Chosen without regard to what the model hides, and columns without regard to the tiles."""
    inputs, first_keys = case
    list_heads = inputs.num_heads if by_head else 1
    shape = (inputs.query.shape[0], list_heads, -(-inputs.num_queries // SMALL[0]), -(-inputs.num_keys // SMALL[1]))
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(shape, generator=generator) < share
    columns = None
    if column_share is not None and inputs.window is None:
        # In any order; some are none.
        order = torch.rand(*shape[:2], inputs.num_keys + 3, generator=generator).argsort(-1)
        columns = order[..., : round(column_share * inputs.num_keys)].to(DEVICE)
    tiles = KeyTiles(chosen.to(DEVICE), *SMALL[:2], columns)
    visits = visits_of(tiles, inputs, first_keys)
    assert visits.counted(inputs).max() <= 1
    found = sparse_flash(inputs, visits, first_keys=first_keys, with_log_sum_exp=True, config=SMALL)
    shown = Sparsity(tiles).shown(inputs, slice(0, inputs.num_queries))
    visible = inputs.visible(slice(0, inputs.num_queries)) & shown
    compare(inputs, found, expected(inputs, visible.expand(-1, inputs.num_heads, -1, -1)))
    last = in_last_row(Sparsity(tiles), inputs)
    assert isinstance(last, Sparsity)
    of_last_row = last.shown(last_row_of(inputs), slice(0, 1)) & inputs.key_valid[:, None, None]
    assert torch.equal(of_last_row, (shown & inputs.key_valid[:, None, None])[:, :, -1:].expand_as(of_last_row))


@given(padded_calls(), st.booleans(), st.floats(0, 1), st.floats(0, 1), st.integers(1, 3), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_stripes_of_some_tiles_equal_their_mask(
    case: tuple[AttentionInputs, Tensor | None], by_head: bool, share: float, kept_share: float, tiles: int, seed: int
) -> None:
    """Drawn without regard to what the model hides, to causality and to the tiles."""
    inputs, first_keys = replace(case[0], window=None), case[1]
    number_of_tiles = -(-inputs.num_queries // SMALL[0])
    shape = (inputs.query.shape[0], inputs.num_heads if by_head else 1)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(*shape, number_of_tiles, -(-inputs.num_keys // SMALL[1]), generator=generator) < share
    kept = torch.rand(*shape, -(-number_of_tiles // tiles), inputs.num_keys, generator=generator) < kept_share
    key_tiles = KeyTiles(chosen.to(DEVICE), *SMALL[:2], Stripes(kept.to(DEVICE), tiles))
    visits = visits_of(key_tiles, inputs, first_keys)
    assert visits.counted(inputs).max() <= 1
    found = sparse_flash(inputs, visits, first_keys=first_keys, with_log_sum_exp=True, config=SMALL)
    shown = Sparsity(key_tiles).shown(inputs, slice(0, inputs.num_queries))
    visible = inputs.visible(slice(0, inputs.num_queries)) & shown
    compare(inputs, found, expected(inputs, visible.expand(-1, inputs.num_heads, -1, -1)))
    last = in_last_row(Sparsity(key_tiles), inputs)
    assert isinstance(last, Sparsity)
    of_last_row = last.shown(last_row_of(inputs), slice(0, 1)) & inputs.key_valid[:, None, None]
    assert torch.equal(of_last_row, (shown & inputs.key_valid[:, None, None])[:, :, -1:].expand_as(of_last_row))


@given(
    padded_calls(),
    st.sampled_from([16, 32, 48]),
    st.integers(1, 3),
    st.integers(1, 5),
    st.lists(st.integers(0, 7), min_size=4, max_size=4),
)
@settings(max_examples=80, deadline=None)
def test_sharded_blocks_equal_their_mask(
    case: tuple[AttentionInputs, Tensor | None], block: int, local_blocks: int, stride: int, phases: list[int]
) -> None:
    """Rows of one tile that lie in two blocks among them."""
    inputs, first_keys = case
    of_heads = torch.tensor(phases[: inputs.num_heads], dtype=torch.int32, device=DEVICE)
    pattern = ShardedBlocks(block, local_blocks, stride, of_heads)
    found = sparse_flash(inputs, pattern, first_keys=first_keys, with_log_sum_exp=True, config=SMALL)
    compare(inputs, found, expected(inputs, patterned(inputs, pattern)))


@given(padded_calls(), st.booleans(), st.sampled_from([16, 48, 64, 160]), st.floats(0, 1), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_blocks_chosen_by_query_equal_their_mask(
    case: tuple[AttentionInputs, Tensor | None], by_head: bool, block: int, share: float, seed: int
) -> None:
    """Drawn without regard to what the model hides; rows that choose nothing among them."""
    inputs, first_keys = case
    shape = (
        inputs.query.shape[0],
        inputs.num_heads if by_head else 1,
        inputs.num_queries,
        -(-inputs.num_keys // block),
    )
    chosen = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share
    tiles = KeyTiles(chosen.to(DEVICE), 1, block)
    visits = visits_of(tiles, inputs, first_keys)
    assert visits.counted(inputs).max() <= 1
    found = sparse_flash(inputs, visits, first_keys=first_keys, with_log_sum_exp=True)
    shown = Sparsity(tiles).shown(inputs, slice(0, inputs.num_queries))
    visible = (inputs.visible(slice(0, inputs.num_queries)) & shown).expand(-1, inputs.num_heads, -1, -1)
    real = inputs.query_valid[:, None, :, None]
    assert torch.equal(visits.visited(inputs) & real, visible & real)
    compare(inputs, found, expected(inputs, visible))
    last = in_last_row(Sparsity(tiles), inputs)
    assert isinstance(last, Sparsity)
    of_last_row = last.shown(last_row_of(inputs), slice(0, 1)) & inputs.key_valid[:, None, None]
    assert torch.equal(of_last_row, (shown & inputs.key_valid[:, None, None])[:, :, -1:].expand_as(of_last_row))


def plain_call(num_queries: int, num_keys: int, head_dim: int, dtype: torch.dtype = torch.float32) -> AttentionInputs:
    generator = torch.Generator().manual_seed(7)
    index = torch.arange(num_keys)
    return on_device(
        AttentionInputs(
            *(
                torch.randn(1, heads, size, head_dim, generator=generator).to(dtype)
                for heads, size in ((4, num_queries), (2, num_keys), (2, num_keys))
            ),
            scaling=head_dim**-0.5,
            query_index=index[num_keys - num_queries :],
            key_index=index,
            query_position=index[None, num_keys - num_queries :],
            key_position=index[None],
            key_valid=torch.ones(1, num_keys, dtype=torch.bool),
            first_query=num_keys - num_queries,
            padded=False,
        )
    )


@pytest.mark.parametrize("pattern", [SinkAndWindow(4, 40), PowerOfTwoBlocks(16, 2, 1), SHARDS], ids=str)
def test_a_prompt_in_chunks_is_the_prompt(pattern: Pattern) -> None:
    whole = plain_call(130, 130, 16)
    output, _ = sparse_flash(whole, pattern, config=SMALL)
    for first, stop in ((0, 47), (47, 48), (48, 130)):
        fields = {name: getattr(whole, name) for name in whole.__dataclass_fields__}
        fields |= {
            "query": whole.query[:, :, first:stop],
            "key": whole.key[:, :, :stop],
            "value": whole.value[:, :, :stop],
            "query_index": whole.query_index[first:stop],
            "key_index": whole.key_index[:stop],
            "query_position": whole.query_position[:, first:stop],
            "key_position": whole.key_position[:, :stop],
            "key_valid": whole.key_valid[:, :stop],
            "first_query": first,
        }
        chunk, _ = sparse_flash(AttentionInputs(**fields), pattern, config=SMALL)
        torch.testing.assert_close(chunk, output[:, :, first:stop], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "pattern", [SinkAndWindow(4, 40), PowerOfTwoBlocks(16, 2, 1), replace(SHARDS, phases=0 * SHARDS.phases)], ids=str
)
def test_no_row_reads_what_it_does_not_visit(pattern: Pattern) -> None:
    """Keys and values that no row visits, or that lie in the future of a row, may be anything."""
    inputs = plain_call(97, 97, 16)
    before, _ = sparse_flash(inputs, pattern, config=SMALL)
    row = 60
    hidden = ~patterned(inputs, pattern)[0, 0, row]
    inputs.key[:, :, hidden] = 1e4
    inputs.value[:, :, hidden] = 1e4
    after, _ = sparse_flash(inputs, pattern, config=SMALL)
    assert torch.equal(after[:, :, row], before[:, :, row])


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_head_sizes_and_dtypes(head_dim: int, dtype: torch.dtype) -> None:
    inputs, pattern = plain_call(200, 200, head_dim, dtype), SinkAndWindow(4, 70)
    output, _ = sparse_flash(inputs, pattern)
    wanted, _ = expected(inputs, patterned(inputs, pattern))
    torch.testing.assert_close(output.double().cpu(), wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lists_of_real_tiles(head_dim: int, dtype: torch.dtype) -> None:
    """Every second key tile in full, three columns of the first that is left out, and the diagonal."""
    inputs, size = plain_call(256, 256, head_dim, dtype), 64
    tile = torch.arange(4)
    past = tile[:, None] > tile
    whole = past & (tile % 2 == 0)
    columns = torch.zeros(4, 256, dtype=torch.bool)
    columns[2:, [64, 70, 127]] = True
    lists = [lists_of(chosen[None, None]) for chosen in (whole, tile[:, None] == tile, columns)]
    visits = on_device(Visits(size, size, lists[0], lists[1], lists[2]))
    output, _ = sparse_flash(inputs, visits)
    wanted, _ = expected(inputs, visits.visited(inputs))
    torch.testing.assert_close(output.double().cpu(), wanted, rtol=2e-2, atol=2e-2)


def test_some_heads_leave_the_others_output() -> None:
    inputs = plain_call(40, 40, 16)
    output = torch.full((1, 4, 40, 16), 3.0, device=DEVICE)
    heads = torch.tensor([1, 3], dtype=torch.int32, device=DEVICE)
    sparse_flash(inputs, SinkAndWindow(1, 8), heads=heads, output=output, config=SMALL)
    every, _ = sparse_flash(inputs, SinkAndWindow(1, 8), config=SMALL)
    assert torch.equal(output[:, [1, 3]], every[:, [1, 3]])
    assert (output[:, [0, 2]] == 3.0).all()


def list_of(entry: int) -> Lists:
    return Lists(
        *(torch.tensor([[[place]]], dtype=torch.int32) for place in (0, 1)), torch.tensor([entry], dtype=torch.int32)
    )


def test_lists_that_overlap_are_told() -> None:
    """What the oracle counts: a tile and a column of it are the same key twice."""
    inputs = plain_call(16, 16, 8)
    tile = list_of(0)
    column = list_of(3)
    counted = Visits(16, 16, part=tile, columns=column).counted(inputs)
    assert counted[..., 3].eq(2).all()
    assert counted.sum() == 4 * 16 * 17


def test_a_pattern_that_no_kernel_knows_is_refused() -> None:
    class Mine:
        def visible(self, query_position: Tensor, key_position: Tensor) -> Tensor:
            return query_position >= key_position

    with pytest.raises(TypeError, match="no kernel knows the pattern"):
        sparse_flash(plain_call(16, 16, 8), Mine())
