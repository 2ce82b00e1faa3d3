"""EAH against a literal reading of its sheet: columns by loops, one head's weights for all, each head's own values."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import attn_hooks
from attn_hooks import EAH, PASTA, Edit, EditError
from tests.literal import Literal, literal_attention
from tests.methods.test_shared import decode
from tests.models import FAMILIES, IMAGE, gpt_oss, left_padded, llama, prompts

PROMPT, MORE = 14, 4
LENGTHS = (PROMPT, 9, 6)
IMAGES = [[2, 3, 4, 8], [], [9, 10]]  # key positions with left padding


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def batch() -> tuple[Tensor, Tensor]:
    """Left-padded prompts with two images, none and one, and four more tokens."""
    ids, mask = left_padded(LENGTHS)
    for row, places in enumerate(IMAGES):
        ids[row, places] = IMAGE
    return torch.cat([ids, prompts(3, MORE + 1, seed=3)[:, 1:]], 1), torch.cat([mask, torch.ones(3, MORE).long()], 1)


def literal_eah(edit: EAH, first_real: list[int], window: int | None, chosen: list[int]) -> Literal:
    """``chosen`` gets h* of each sample and layer, -1 for none."""
    is_code = edit.faithful == "code"
    threshold = edit.threshold if edit.threshold is not None else 0.0008 if is_code else 0.002
    layers = edit.layers if edit.layers is not None else range(5) if is_code else (1,)
    decode_rule = edit.decode or ("none" if is_code else "keep")

    def weights(a: Tensor, layer: int) -> Tensor:
        if layer not in layers:
            return a
        edited = a.clone()
        for b in range(len(first_real)):
            best, most = -1, 0
            for h in range(a.shape[1]):
                sinks = 0
                for j in IMAGES[b]:
                    rows = range(j, PROMPT if window is None else min(PROMPT, j + window))
                    received = sum(float(a[b, h, i, j]) for i in rows if i != j)
                    sinks += received / len(rows) > threshold
                if sinks > most:
                    best, most = h, sinks
            if is_code and best == 0:
                best = -1
            chosen.append(best)
            if best >= 0:
                stop = PROMPT if decode_rule == "none" else a.shape[2]
                edited[b, :, :stop] = a[b, best, :stop]
        return edited

    return Literal(weights=weights)


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize(
    "edit",
    [
        EAH(threshold=0.07, layers=(1, 3)),
        EAH(threshold=0.05, decode="none"),
        EAH(),
        EAH(threshold=0.07, faithful="code"),
        EAH(faithful="code", decode="keep", layers=(2,)),
    ],
    ids=str,
)
def test_prefill_and_decode_are_the_sheet(edit: EAH, family: str) -> None:
    """Each sample has a head of its own, or none."""
    model = FAMILIES[family]()
    ids, mask = batch()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    chosen: list[int] = []
    window = 6 if family == "mistral" else None
    literal = literal_eah(edit, [PROMPT - length for length in LENGTHS], window, chosen)
    with literal_attention(model, literal):
        expected = model(ids, attention_mask=mask, position_ids=positions).logits
    assert chosen[1] == -1
    real = mask[:, :PROMPT].bool()
    with attn_hooks.editing(model, edit):
        prefill = model(ids[:, :PROMPT], attention_mask=mask[:, :PROMPT], position_ids=positions[:, :PROMPT]).logits
        stepwise = decode(model, ids, PROMPT, DynamicCache(config=model.config), attention_mask=mask)
    torch.testing.assert_close(prefill[real], expected[:, :PROMPT][real], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(stepwise, expected[:, PROMPT - 1 :], rtol=1e-9, atol=1e-9)


def test_heads_are_told_apart() -> None:
    """The settings of the test above choose several heads."""
    model, chosen = llama(), list[int]()
    ids, mask = batch()
    with literal_attention(model, literal_eah(EAH(threshold=0.07, layers=(0, 1, 2, 3, 4)), [0, 5, 8], None, chosen)):
        model(ids, attention_mask=mask)
    assert len(set(chosen)) > 2


def test_learned_sinks_go_with_the_head() -> None:
    """gpt-oss adds a sink logit of its own to each head: one head's map has that head's."""
    model = gpt_oss()
    model.set_attn_implementation("eager")
    ids, mask = batch()
    chosen: list[int] = []
    edit = EAH(threshold=0.06, layers=(1, 3))  # its layers of full attention
    with literal_attention(model, literal_eah(edit, [PROMPT - length for length in LENGTHS], None, chosen)):
        expected = model(ids, attention_mask=mask).logits[:, :PROMPT]
    assert max(chosen) > 0
    ids, mask = ids[:, :PROMPT], mask[:, :PROMPT]
    with attn_hooks.editing(model, edit):
        edited = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(edited[mask.bool()], expected[mask.bool()], rtol=2e-5, atol=2e-5)


def test_other_edits_see_the_map_that_is_lent() -> None:
    """PASTA on head 3 edits that head's copy of the map of head 0."""
    model, ids = llama(), prompts(1, image=True)
    pasta = PASTA(spans=(((2, 5),),), alpha=0.05, heads=((1, 3),))

    def logits(s: Tensor, layer: int) -> Tensor:
        if layer != 1:
            return s
        lent = s[:, :1].expand_as(s).clone()
        lent[:, 3, :, [j for j in range(PROMPT) if not 2 <= j < 5]] += math.log(0.05)
        return lent

    with literal_attention(model, Literal(logits=logits)):
        expected = model(ids).logits
    for edits in ((EAH(threshold=0.0), pasta), (pasta, EAH(threshold=0.0))):
        with attn_hooks.editing(model, *edits):
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-9, atol=1e-9)


def test_without_a_sink_nothing_changes_and_nothing_is_left() -> None:
    model, ids = llama(), prompts(image=True)
    before = model(ids).logits
    with attn_hooks.editing(model, EAH(threshold=1.0)):
        assert torch.equal(model(ids).logits, before)
    with attn_hooks.editing(model, EAH(threshold=0.0)):
        assert (model(ids).logits - before).abs().max() > 1e-6
        (done,) = attn_hooks.report(model).edits
    assert (done.calls, done.layers, done.heads) == ({"prefill": 1}, (1,), 4)
    assert torch.equal(model(ids).logits, before)


def test_assisted_generation_with_the_prompts_head_is_greedy() -> None:
    model, assistant = attn_hooks.wrap(llama(), EAH(later_tokens="keep")), llama(num_hidden_layers=1)
    ids = prompts(1, PROMPT, image=True)
    settings = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, assistant_model=assistant, **settings), model.generate(ids, **settings))


def test_gradients_flow_through_the_lent_map() -> None:
    model, ids = llama(), prompts(1, image=True)
    literal_model = llama()
    gradients: list[Any] = []
    with torch.enable_grad():
        with attn_hooks.editing(model, EAH(threshold=0.0)):
            model(ids).logits.square().sum().backward()
        gradients.append(model.model.layers[1].self_attn.k_proj.weight.grad)
        take = Literal(weights=lambda a, layer: a[:, :1].expand_as(a) if layer == 1 else a)
        with literal_attention(literal_model, take):
            literal_model(ids).logits.square().sum().backward()
        gradients.append(literal_model.model.layers[1].self_attn.k_proj.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-8, atol=1e-8)


class _OwnRouting(EAH):
    """Of another package."""

    method = "own_routing"


def test_what_is_refused() -> None:
    model, ids = llama(), prompts(image=True)
    cache = model(ids[:, :8], use_cache=True).past_key_values
    with pytest.raises(EditError, match="eah and own_routing cannot stand together"):
        attn_hooks.wrap(model, EAH(), _OwnRouting())
    attn_hooks.wrap(model, "eah")
    with pytest.raises(EditError, match="no-prefill"):
        model(ids[:, 8:9], past_key_values=cache)
    with pytest.raises(EditError, match="no-image-in-prompt"):
        model(prompts())

    class Unfinished(EAH):
        attends_as = Edit.attends_as

    attn_hooks.wrap(model, Unfinished())
    with pytest.raises(NotImplementedError, match="Unfinished defines no routing"):
        model(ids)
