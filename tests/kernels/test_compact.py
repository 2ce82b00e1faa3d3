"""The lists of touched keys made in one launch against the readable version."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attn_kernels import AttentionInputs
from attn_kernels.edited_attention import compact
from attn_kernels.edited_attention.compact import list_touched_keys
from attn_kernels.edited_attention.lowering import NO_BIT, LoweredEdits, RegroupTerm, list_keys, lower
from tests.kernels.triton_device import on_device


def lowered_codes(codes: Tensor, source: int = NO_BIT, target: int = NO_BIT) -> LoweredEdits:
    """Edits of these codes ``(b, h, m)``; a Regroup if there is a source."""
    index, head = torch.arange(1), torch.zeros(1, 1, 1, 4)
    inputs = AttentionInputs(head, head, head, 1.0, index, index, index[None], index[None], index[None] == 0)
    regroup = None
    if source != NO_BIT:
        regroup = RegroupTerm(source, target, NO_BIT, NO_BIT, NO_BIT, torch.zeros(3, 1))
    return replace(lower(inputs, []), key_codes=codes, regroup=regroup)


def assert_same_lists(lowered: LoweredEdits) -> None:
    expected, found = list_keys(lowered), list_touched_keys(on_device(lowered))
    for name in ("indices", "counts", "tile_flags"):
        assert getattr(found, name).shape == getattr(expected, name).shape
        assert getattr(found, name).dtype == getattr(expected, name).dtype
    assert torch.equal(found.counts.cpu(), expected.counts)
    assert torch.equal(found.tile_flags.cpu(), expected.tile_flags)
    listed = torch.arange(expected.indices.shape[-1]) < expected.counts[..., None]
    assert torch.equal(found.indices.cpu()[listed], expected.indices[listed])


def random_codes(shape: tuple[int, int, int], share: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(1, 256, shape, generator=generator).to(torch.uint8)
    return torch.where(torch.rand(shape, generator=generator) < share, codes, 0).to(torch.uint8)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_equals_the_readable_lists(data: st.DataObject) -> None:
    shape = (data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)), data.draw(st.integers(0, 700)))
    share = data.draw(st.sampled_from([0.0, 0.01, 0.5, 0.99, 1.0]))
    codes = random_codes(shape, share, data.draw(st.integers(0, 2**31)))
    source = data.draw(st.sampled_from([NO_BIT, 0, 3, 7]))
    target = NO_BIT if source == NO_BIT else data.draw(st.sampled_from([NO_BIT, 0, 5, 7]))
    # Small programs, so that a row has several of them and one counts several blocks before its own.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compact, "OWN_KEYS", data.draw(st.sampled_from([64, 128])))
        patch.setattr(compact, "COUNTED_KEYS", data.draw(st.sampled_from([64, 256])))
        assert_same_lists(lowered_codes(codes, source, target))


@pytest.mark.parametrize("num_keys", [1, 64, compact.OWN_KEYS, compact.OWN_KEYS + 1, 3 * compact.COUNTED_KEYS + 77])
@pytest.mark.parametrize("source", [NO_BIT, 1])
def test_many_keys_with_the_sizes_in_use(num_keys: int, source: int) -> None:
    target = NO_BIT if source == NO_BIT else 2
    assert_same_lists(lowered_codes(random_codes((1, 2, num_keys), 0.4, num_keys), source, target))


def test_all_keys_in_one_list_and_whole_tiles() -> None:
    codes = torch.full((1, 1, 2048), 2, dtype=torch.uint8)
    for source in (NO_BIT, 0, 1):
        assert_same_lists(lowered_codes(codes, source))


def test_codes_of_any_strides() -> None:
    codes = random_codes((2, 300, 3), 0.5, 0).transpose(1, 2)
    assert_same_lists(lowered_codes(codes, 0, 1))
    assert_same_lists(lowered_codes(codes[:1, :1].expand(2, 3, -1), 0, 1))


def test_too_many_keys_for_the_counts_are_refused() -> None:
    codes = torch.zeros(1, dtype=torch.uint8).expand(1, 1, 2**compact.COUNT_BITS)
    with pytest.raises(ValueError, match="at most"):
        list_touched_keys(lowered_codes(codes, 0))
