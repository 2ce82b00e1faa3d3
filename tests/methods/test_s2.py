"""S2-Attention against its predicate, written as loops, and its union rule."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import attn_hooks
from attn_hooks import S2Attention
from attn_kernels import ShardedBlocks
from attn_kernels.sparse_attention.sparsity import pattern_refusal
from tests.literal import Literal, literal_attention
from tests.models import FAMILIES, SIZES, left_padded, llama, prompts

FIRST_REAL = [0, 5, 10]
HEADS, KV_HEADS = SIZES["num_attention_heads"], SIZES["num_key_value_heads"]


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def sees(edit: S2Attention, head: int, i: int, j: int) -> bool:
    r, c = i // edit.block, j // edit.block
    h, count = (head // (HEADS // KV_HEADS), KV_HEADS) if edit.shards == "key_heads" else (head, HEADS)
    return r - c < edit.local_blocks or (c + h * max(1, edit.stride // count)) % edit.stride == 0


def literal(edit: S2Attention) -> Literal:
    def logits(s: Tensor, layer: int) -> Tensor:
        edited = s.clone()
        for b, start in enumerate(FIRST_REAL):
            for h in range(s.shape[1]):
                named = (edit.heads is None or (layer, h) in edit.heads) and layer in (edit.layers or range(5))
                for i in range(start, s.shape[2]):
                    for j in range(start, i + 1):
                        if named and not sees(edit, h, i - start, j - start):
                            edited[b, h, i, j] = -torch.inf
        return edited

    return Literal(logits=logits)


EDITS = [
    S2Attention(block=1, local_blocks=1, stride=2),
    S2Attention(block=2, local_blocks=2, stride=2, layers=(1, 3)),
    S2Attention(block=1, local_blocks=1, stride=4, shards="query_heads"),
    S2Attention(block=2, local_blocks=1, stride=5, heads={0: [0, 1, 2], 4: [3]}),
    S2Attention(block=1, local_blocks=1, stride=9, shards="query_heads", heads={2: [1, 3]}),
]


@pytest.mark.parametrize("edit", EDITS, ids=str)
def test_prefill_is_the_formula(edit: S2Attention) -> None:
    """Three prompts padded on the left, grouped heads."""
    model = llama()
    ids, mask = left_padded()
    with literal_attention(model, literal(edit)):
        expected = model(ids, attention_mask=mask).logits
    with attn_hooks.editing(model, edit):
        edited = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(edited[mask.bool()], expected[mask.bool()], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(edited[mask.bool()], model(ids, attention_mask=mask).logits[mask.bool()])


@pytest.mark.parametrize("family", FAMILIES)
def test_decode_selects_as_the_prompt_does(family: str) -> None:
    """Also where a sliding cache has dropped keys."""
    model, ids = FAMILIES[family](), prompts(2, 24)
    with attn_hooks.editing(model, S2Attention(block=2, local_blocks=1, stride=2)):
        whole = model(ids).logits
        cache = DynamicCache(config=model.config)
        steps = [model(ids[:, :9], past_key_values=cache).logits]
        steps += [model(ids[:, at : at + 1], past_key_values=cache).logits for at in range(9, 24)]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-5)


def test_padding_on_the_right_changes_nothing() -> None:
    model, ids = llama(), prompts(2, 20)
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    with attn_hooks.editing(model, S2Attention(block=2, local_blocks=1, stride=2)):
        together, alone = model(ids, attention_mask=mask).logits, model(ids[1:, :12]).logits
    torch.testing.assert_close(together[1, :12], alone[0])


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 6, 8])
def test_heads_together_see_every_block_or_the_edit_is_refused(stride: int) -> None:
    model = llama()
    for shards, count in (("key_heads", KV_HEADS), ("query_heads", HEADS)):
        edit = S2Attention(block=1, local_blocks=1, stride=stride, shards=shards)
        phases = torch.tensor([edit.phase(head, HEADS, KV_HEADS) for head in range(HEADS)])
        block = torch.arange(24)
        seen = ShardedBlocks(1, 1, stride, phases).visible(torch.tensor([[[24]]]), block).any(0).flatten()
        assert bool(seen.all()) == (stride <= count)
        if stride <= count:
            attn_hooks.unwrap(attn_hooks.wrap(model, edit))
            continue
        with pytest.raises(attn_hooks.EditError, match=f"see {count} of every {stride} far blocks") as caught:
            attn_hooks.wrap(model, edit)
        assert ("shards='query_heads'" in str(caught.value)) == (shards == "key_heads")
        # Heads that are not edited see the rest.
        heads = {layer: [0, 1] for layer in range(5)}
        attn_hooks.unwrap(attn_hooks.wrap(model, edit.model_copy(update={"heads": S2Attention(heads=heads).heads})))


def test_far_blocks_are_as_many_as_the_stride_says() -> None:
    pattern = ShardedBlocks(4, 3, 5, torch.arange(5))
    visible = pattern.visible(torch.arange(200)[None, :, None], torch.arange(200))
    for head in range(5):
        first = -head % 5
        for row in range(200):
            far = visible[head, row, : (row // 4 - 2) * 4] if row // 4 > 2 else visible[head, row, :0]
            assert far.sum() == 4 * max(0, -(-(row // 4 - 2 - first) // 5))


@pytest.mark.parametrize(
    "edit", [S2Attention(stride=1), S2Attention(stride=2), S2Attention(block=3, stride=2)], ids=str
)
def test_identities(edit: S2Attention) -> None:
    """Stride 1, and prompts within the local blocks, down to one token."""
    model = llama()
    for length in (1, 2, 14):
        ids = prompts(2, length)
        plain = model(ids).logits
        with attn_hooks.editing(model, edit):
            torch.testing.assert_close(model(ids).logits, plain)


@pytest.mark.parametrize("parameter", ["block", "local_blocks", "stride"])
def test_nothing_is_refused(parameter: str) -> None:
    with pytest.raises(attn_hooks.EditError, match=f"s2.*{parameter}"):
        S2Attention(**{parameter: 0})


def test_which_blocks_have_a_kernel() -> None:
    phases = torch.zeros(1, dtype=torch.int32)
    assert pattern_refusal(ShardedBlocks(48, 1, 2, phases)) is None
    assert pattern_refusal(ShardedBlocks(40, 1, 2, phases)) == (
        "1 local blocks of 40 and one in 2 further back: no multiple of 16 keys"
    )
