"""Random attention calls and random edits, small and awkward on purpose."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from attn_kernels import (
    AttentionInputs,
    Gate,
    HeadAffine,
    KeyTiles,
    LogitMap,
    Order,
    PowerOfTwoBlocks,
    Primitive,
    Ranking,
    Regroup,
    SinkAndWindow,
    Sparsity,
)


@st.composite
def attention_inputs(draw: st.DrawFn, window: bool = True) -> AttentionInputs:
    """A causal call: GQA or MQA or neither, left and right padding, one query or many, more keys than queries."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch = draw(st.integers(1, 3))
    num_kv_heads = draw(st.sampled_from([1, 2, 3]))
    num_heads = num_kv_heads * draw(st.sampled_from([1, 2, 3]))
    num_queries = draw(st.sampled_from([1, 2, 5, 9]))
    num_keys = num_queries + draw(st.sampled_from([0, 0, 1, 4]))
    head_dim, value_dim = draw(st.sampled_from([(4, 4), (5, 3), (8, 8)]))
    spread = draw(st.sampled_from([0.3, 1.0, 20.0]))
    key_index = torch.arange(num_keys)
    query_index = key_index[num_keys - num_queries :]
    left = torch.tensor([draw(st.integers(0, num_keys - 1)) for _ in range(batch)])
    right = torch.tensor([draw(st.integers(0, 1)) for _ in range(batch)])
    valid = (key_index >= left[:, None]) & (key_index < num_keys - right[:, None])
    as_mask = draw(st.sampled_from(["none", "mask", "bias"]))
    window_size = draw(st.sampled_from([None, None, 1, 3])) if window else None
    inputs = AttentionInputs(
        query=torch.randn(batch, num_heads, num_queries, head_dim, generator=generator) * spread,
        key=torch.randn(batch, num_kv_heads, num_keys, head_dim, generator=generator),
        value=torch.randn(batch, num_kv_heads, num_keys, value_dim, generator=generator),
        scaling=head_dim**-0.5,
        query_index=query_index,
        key_index=key_index,
        query_position=query_index - left[:, None],
        key_position=key_index - left[:, None],
        key_valid=valid,
        window=window_size,
        softcap=draw(st.sampled_from([None, None, 5.0])),
        sink_logits=draw(
            st.sampled_from(
                [
                    None,
                    torch.randn(1, num_heads, 1, generator=generator),
                    torch.randn(batch, num_heads, num_queries, generator=generator),
                ]
            )
        ),
    )
    if as_mask == "none":
        return inputs
    allowed = inputs.visible(slice(0, num_queries))
    fields = {name: getattr(inputs, name) for name in inputs.__dataclass_fields__} | {"window": None}
    if as_mask == "mask":
        return AttentionInputs(**fields | {"mask": allowed})
    slope = torch.randn(allowed.shape, generator=generator)
    return AttentionInputs(**fields | {"bias": torch.where(allowed, slope, torch.finfo(torch.float32).min)})


def _bools(draw: st.DrawFn, shape: tuple[int, ...]) -> Tensor:
    """Empty, full and mixed selections alike."""
    share = draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))
    return torch.rand(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**31)))) < share


def _groups(draw: st.DrawFn, inputs: AttentionInputs) -> Tensor:
    per_sample = draw(st.sampled_from([1, inputs.query.shape[0]]))
    per_head = draw(st.sampled_from([1, inputs.num_heads]))
    return _bools(draw, (per_sample, per_head, inputs.num_keys))


def _heads(draw: st.DrawFn, inputs: AttentionInputs) -> Tensor | None:
    return _bools(draw, (inputs.num_heads,)) if draw(st.booleans()) else None


def _rows(draw: st.DrawFn, inputs: AttentionInputs) -> Tensor | None:
    return _bools(draw, (inputs.query.shape[0], inputs.num_queries)) if draw(st.booleans()) else None


@st.composite
def primitives(draw: st.DrawFn, inputs: AttentionInputs, kinds: tuple[type, ...]) -> Primitive:
    """One primitive of one of ``kinds`` that fits ``inputs``."""
    kind = draw(st.sampled_from(kinds))
    heads = _heads(draw, inputs)
    batch, num_heads = inputs.query.shape[0], inputs.num_heads
    factor = st.floats(-2.0, 2.0, width=32)
    if kind is LogitMap:
        per_head = torch.linspace(-1.0, 1.5, num_heads)
        return LogitMap(
            _groups(draw, inputs),
            scale=draw(st.sampled_from([1.0, draw(factor), per_head])),
            absolute=draw(st.sampled_from([0.0, draw(factor), per_head])),
            bias=draw(st.sampled_from([0.0, draw(factor), per_head, -torch.inf])),
            heads=heads,
            rows=_rows(draw, inputs),
        )
    if kind is Order:
        pairs = ((_bools(draw, (batch, inputs.num_queries)), _bools(draw, (batch, inputs.num_keys))),)
        reversed_order = draw(st.booleans())
        return Order(
            query_value=-inputs.query_position if reversed_order else None,
            key_value=-inputs.key_position if reversed_order else None,
            allow=draw(st.sampled_from([(), pairs])),
            deny=draw(st.sampled_from([(), pairs])),
            heads=heads,
        )
    if kind is Sparsity:
        queries, keys = draw(st.sampled_from([(2, 3), (16, 16)]))
        by_head = draw(st.sampled_from([1, num_heads]))
        size = (
            draw(st.sampled_from([1, batch])),
            by_head,
            -(-inputs.num_queries // queries),
            -(-inputs.num_keys // keys),
        )
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        columns = torch.randperm(inputs.num_keys + 1, generator=generator)[: draw(st.integers(0, 3))].expand(
            *size[:2], -1
        )
        tiles = KeyTiles(_bools(draw, size), queries, keys, draw(st.sampled_from([None, columns])))
        static = [SinkAndWindow(1, 2), SinkAndWindow(0, 1), PowerOfTwoBlocks(2, 1, 1)]
        return Sparsity(draw(st.sampled_from([*static, tiles])), heads=heads)
    if kind is Regroup:
        gate = Gate(_groups(draw, inputs), 0.2, _groups(draw, inputs), 0.5) if draw(st.booleans()) else None
        return Regroup(
            _groups(draw, inputs),
            keep=draw(st.sampled_from([0.0, 0.4, 1.0, torch.linspace(0.0, 1.0, num_heads)])),
            target=draw(st.sampled_from([None, _groups(draw, inputs)])),
            gate=gate,
            heads=heads,
            rows=_rows(draw, inputs),
        )
    if kind is Ranking:
        kv_heads, width = inputs.key.shape[1], inputs.query.shape[-1]
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        along = torch.randn(batch, kv_heads, width, generator=generator)
        where = _bools(draw, (batch,)) if draw(st.booleans()) else None
        ranking = Ranking(along, draw(st.integers(0, num_heads + 1)), draw(factor), where)
        return HeadAffine(gain=ranking, rows=_rows(draw, inputs))
    assert kind is HeadAffine
    return HeadAffine(
        gain=draw(st.sampled_from([None, torch.linspace(-1.0, 2.0, num_heads), torch.ones(batch, num_heads) * 3])),
        offset=draw(st.sampled_from([None, torch.ones(num_heads, inputs.value.shape[-1])])),
        replace=_heads(draw, inputs),
        rows=_rows(draw, inputs),
    )


ALL_KINDS = (LogitMap, Order, Sparsity, Regroup, HeadAffine, Ranking)


@st.composite
def calls_with_edits(
    draw: st.DrawFn, kinds: tuple[type, ...] = ALL_KINDS, most: int = 3
) -> tuple[AttentionInputs, list[Primitive]]:
    """A call and up to ``most`` primitives in any listing order."""
    inputs = draw(attention_inputs())
    return inputs, [draw(primitives(inputs, kinds)) for _ in range(draw(st.integers(1, most)))]
