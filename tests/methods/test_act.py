"""ACT against a literal reading of its sheet: loops over samples, heads, rows and keys."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import attn_hooks
from attn_hooks import ACT, AttentionCall, EditError, TokenKind, TokenLayout
from attn_kernels import AttentionInputs, Regroup
from tests.literal import Literal, literal_attention
from tests.methods.test_shared import decode
from tests.models import left_padded, llama, prompts


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def rules(edit: ACT) -> tuple[str, str]:
    """The threshold and the sink that is spared."""
    by_source = {"paper": ("relative", "position0"), "code": ("absolute", "first_detected")}[edit.faithful]
    return edit.threshold or by_source[0], edit.keep_first or by_source[1]


def literal_act(first_real: list[int], prompt: int, edit: ACT, layers: range):
    """Steps A and B on weights ``(B, H, N, N)``; only the prompt's rows and columns decide what is a sink."""

    def weights(a: Tensor, layer: int) -> Tensor:
        if layer not in layers:
            return a
        edited = a.clone()
        for b, start in enumerate(first_real):
            length = prompt - start
            for h in range(a.shape[1]):
                if edit.heads is not None and (layer, h) not in edit.heads:
                    continue
                found = []
                for j in range(start, prompt):
                    column_mean = sum(float(a[b, h, i, j]) for i in range(j, prompt)) / (prompt - j)
                    limit = edit.alpha / length if rules(edit)[0] == "relative" else edit.absolute
                    if column_mean > limit:
                        found.append(j)
                sinks = [j for j in found if j != start] if rules(edit)[1] == "position0" else found[1:]
                for i in range(start, a.shape[2]):
                    sink_mass = sum(float(a[b, h, i, j]) for j in sinks)
                    for j in range(start, a.shape[3]):
                        grow = (1 - edit.beta * sink_mass) / (1 - sink_mass) if sink_mass < 1 else 1.0
                        edited[b, h, i, j] = a[b, h, i, j] * (edit.beta if j in sinks else grow)
        return edited

    return Literal(weights=weights)


EDITS = [
    ACT(beta=0.4, alpha=1.3),
    ACT(beta=0.0, alpha=1.1),
    ACT(beta=0.4, alpha=1.3, heads=((2, 0), (2, 3), (3, 1))),
    ACT(beta=0.4, faithful="code", absolute=0.15),
    ACT(beta=0.4, alpha=1.3, layers=(0, 4)),
    ACT(beta=0.4, alpha=1.3, keep_first="first_detected"),
    ACT(beta=0.4, threshold="absolute", absolute=0.15),
]


@pytest.mark.parametrize("edit", EDITS, ids=str)
def test_prefill_is_the_sheet(edit: ACT) -> None:
    model = llama()
    ids, mask = left_padded()
    layers = range(2, 4) if edit.layers is None else range(0, 5, 4)
    literal = literal_act([0, 5, 10], 14, edit, layers)
    with literal_attention(model, literal):
        expected = model(ids, attention_mask=mask).logits
    with attn_hooks.editing(model, edit):
        edited = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(edited[mask.bool()], expected[mask.bool()], rtol=1e-9, atol=1e-9)


def test_decode_uses_the_sinks_of_the_prompt() -> None:
    """A decode step equals its row of a prefill in which S comes from the prompt's rows alone."""
    edit = ACT(beta=0.2, alpha=1.2)
    model, ids = llama(), prompts(2, 20)
    with literal_attention(model, literal_act([0, 0], 14, edit, range(2, 4))):
        expected = model(ids).logits[:, 13:]
    with attn_hooks.editing(model, edit):
        stepwise = decode(model, ids, 14, DynamicCache(config=model.config))
    torch.testing.assert_close(stepwise, expected, rtol=1e-9, atol=1e-9)


def test_later_turns_keep_the_first_prompts_sinks_on_request() -> None:
    edit = ACT(beta=0.2, alpha=1.2, later_tokens="keep")
    model, ids = llama(), prompts(2, 20)
    with literal_attention(model, literal_act([0, 0], 14, edit, range(2, 4))):
        expected = model(ids).logits[:, 14:]
    cache = DynamicCache(config=model.config)
    with attn_hooks.editing(model, edit):
        model(ids[:, :14], past_key_values=cache)
        later = model(ids[:, 14:], past_key_values=cache).logits
    torch.testing.assert_close(later, expected, rtol=1e-9, atol=1e-9)


def test_heads_that_are_not_selected_stay_on_the_models_backend() -> None:
    """Bit for bit: what layer 2 gets for them is the backend's own output. A kernel on a GPU computes all heads alike."""
    model, ids = llama(dtype=torch.float32), prompts()
    outputs = {}

    def keep_input(_module, args, name):
        outputs[name] = args[0].detach().clone()

    projection = model.model.layers[2].self_attn.o_proj
    for name, edits in {"plain": (), "edited": (ACT(beta=0.0, alpha=1.1, heads=((2, 1),)),)}.items():
        handle = projection.register_forward_pre_hook(lambda module, args, name=name: keep_input(module, args, name))
        with attn_hooks.editing(model, *edits):
            model(ids)
        handle.remove()
    plain, edited = (outputs[name].view(3, 14, 4, 8) for name in ("plain", "edited"))
    tolerance = 1e-5 if plain.is_cuda else 0.0
    torch.testing.assert_close(plain[:, :, [0, 2, 3]], edited[:, :, [0, 2, 3]], rtol=tolerance, atol=tolerance)
    assert not torch.equal(plain[:, :, 1], edited[:, :, 1])


def test_the_codes_decode_is_refused() -> None:
    model = attn_hooks.wrap(llama(), ACT(faithful="code"))
    ids = prompts()
    model.generate(ids, max_new_tokens=1, do_sample=False)
    with pytest.raises(EditError, match="act is not defined for decode"):
        model.generate(ids, max_new_tokens=2, do_sample=False)


def test_a_cache_filled_without_it_is_refused() -> None:
    model, ids = llama(), prompts()
    cache = model(ids[:, :8], use_cache=True).past_key_values
    attn_hooks.wrap(model, "act")
    with pytest.raises(EditError, match="no-prefill"):
        model(ids[:, 8:9], past_key_values=cache)


@pytest.mark.parametrize("faithful", ["paper", "code"])
def test_planted_sinks_are_found(faithful: str) -> None:
    """Keys 5 and 11 carry a direction that every query has: each takes most of the rows from then on.

    The first token carries it, too; it is never a sink of its own accord, and the code's rule spares it as the first found.
    """
    length, direction = 40, torch.zeros(8)
    direction[0] = 4.0
    query = torch.randn(1, 2, length, 8) * 0.3 + direction
    key = torch.randn(1, 1, length, 8) * 0.3
    key[:, :, [0, 5, 11]] += direction
    index = torch.arange(length)
    inputs = AttentionInputs(
        query=query,
        key=key,
        value=torch.randn(1, 1, length, 8),
        scaling=8**-0.5,
        query_index=index,
        key_index=index,
        query_position=index[None],
        key_position=index[None],
        key_valid=torch.ones(1, length, dtype=torch.bool),
    )
    call = AttentionCall(
        inputs=inputs,
        model="planted",
        layer=2,
        num_layers=5,
        heads=range(2),
        phase="prefill",
        layout=TokenLayout(torch.full((1, length), TokenKind.TEXT, dtype=torch.uint8)),
        image_token_id=None,
        key_kinds=torch.full((1, length), TokenKind.TEXT, dtype=torch.uint8),
        prompt_length=length,
        state={},
    )
    (regroup,) = ACT(faithful=faithful).primitives(call)
    assert isinstance(regroup, Regroup)
    for head in range(2):
        assert regroup.source[0, head].nonzero().flatten().tolist() == [5, 11]
