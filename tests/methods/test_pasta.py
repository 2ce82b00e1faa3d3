"""PASTA against its equation, in each mode, with padding, beams and the helper that finds spans."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import attn_hooks
from attn_hooks import PASTA, EditError
from tests.literal import Literal, literal_attention
from tests.methods.test_shared import decode
from tests.models import left_padded, llama, prompts

SPANS = (((1, 3), (5, 6)), ((2, 4),), ((1, 2),))


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def literal_pasta(edit: PASTA, first_real: list[int], prompt: int) -> Literal:
    def logits(s: Tensor, layer: int) -> Tensor:
        edited = s.clone()
        for b, start in enumerate(first_real):
            for h in range(s.shape[1]):
                if edit.heads is not None and (layer, h) not in edit.heads:
                    continue
                for j in range(start, prompt):
                    inside = any(begin <= j - start < stop for begin, stop in edit.spans[b])
                    if edit.mode == "exclude":
                        bias = 0.0 if inside else math.log(edit.alpha)
                    elif edit.mode == "include":
                        # log(alpha) on the spans, less log(alpha) on every prompt key
                        bias = (math.log(edit.alpha) if inside else 0.0) - math.log(edit.alpha)
                    else:
                        bias = math.log(edit.alpha)
                    edited[b, h, :, j] += bias
        return edited

    return Literal(logits=logits)


@pytest.mark.parametrize("heads", [None, ((0, 1), (3, 2))], ids=["all-heads", "two-heads"])
@pytest.mark.parametrize("mode", ["exclude", "include", "generation"])
def test_prefill_and_decode_are_the_equation(mode: str, heads: tuple[tuple[int, int], ...] | None) -> None:
    edit = PASTA(spans=SPANS, alpha=0.05, mode=mode, heads=heads)
    model = llama()
    ids, mask = left_padded()
    ids, mask = torch.cat([ids, prompts(3, 5, seed=3)[:, 1:]], 1), torch.cat([mask, torch.ones(3, 4).long()], 1)
    with literal_attention(model, literal_pasta(edit, [0, 5, 10], 14)):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        expected = model(ids, attention_mask=mask, position_ids=positions).logits[:, 13:]
    with attn_hooks.editing(model, edit):
        stepwise = decode(model, ids, 14, DynamicCache(config=model.config), attention_mask=mask)
    torch.testing.assert_close(stepwise, expected, rtol=1e-9, atol=1e-9)


def test_one_list_of_spans_serves_every_prompt() -> None:
    model, ids = llama(), prompts(3)
    shared, repeated = PASTA(spans=SPANS[:1]), PASTA(spans=SPANS[:1] * 3)
    with attn_hooks.editing(model, shared):
        expected = model(ids).logits
    with attn_hooks.editing(model, repeated):
        assert torch.equal(model(ids).logits, expected)


def test_beams_of_one_prompt_share_its_spans() -> None:
    """Two prompts with spans of their own, beamed together, give what each gives alone."""
    model, ids = llama(), prompts(2)
    settings = {"num_beams": 2, "max_new_tokens": 4, "do_sample": False}
    with attn_hooks.editing(model, PASTA(spans=SPANS[:2], alpha=0.05)):
        together = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    for row in range(2):
        with attn_hooks.editing(model, PASTA(spans=SPANS[row : row + 1], alpha=0.05)):
            alone = model.generate(ids[row : row + 1], attention_mask=torch.ones(1, 14).long(), **settings)
        assert torch.equal(together[row], alone[0])


def test_spans_for_another_number_of_prompts_are_refused() -> None:
    model = attn_hooks.wrap(llama(), PASTA(spans=SPANS[:2]))
    with pytest.raises(EditError, match=r"2 samples and the batch has 3.*spans-batch"):
        model(prompts(3))


def test_heads_as_pasta_writes_them() -> None:
    assert PASTA(spans=SPANS, heads={"3": [1, 2], 4: [0]}).heads == ((3, 1), (3, 2), (4, 0))


def test_a_span_beyond_its_prompt_is_refused() -> None:
    model = attn_hooks.wrap(llama(), PASTA(spans=(((3, 15),),)))
    with pytest.raises(EditError, match=r"\(3, 15\) ends after prompt 0, which has 14 tokens") as refused:
        model(prompts(1))
    assert refused.value.code == "span-out-of-prompt"
