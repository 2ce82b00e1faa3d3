"""VAR against a literal reading of its sheet: loops over samples, heads, rows and keys, sinks from the residual stream."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, DynamicCache, StaticCache

import attn_hooks
from attn_hooks import VAR, EditError, UnsupportedModelError
from attn_hooks.methods.var import PUBLISHED_DIMS, sink_strength
from tests.hooks import snapshot, vlms
from tests.literal import Literal, literal_attention
from tests.methods.test_shared import decode
from tests.models import IMAGE, left_padded, llama, prompts

PROMPT = 14
DIMS = (0, 5, 9)
SETTINGS: dict[str, Any] = {"dims": DIMS, "tau": 1.5, "summ": 0.1, "rho": 0.4, "p": 0.3}


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def batch(more: int = 0) -> tuple[Tensor, Tensor, list[int], list[list[tuple[int, int]]]]:
    """Three left-padded prompts with two images, none and one; their first real tokens and images."""
    lengths = (PROMPT, 9, 7)
    ids, mask = left_padded(lengths)
    images = [[(2, 6), (8, 10)], [], [(9, 12)]]
    for row, spans in enumerate(images):
        for start, stop in spans:
            ids[row, start:stop] = IMAGE
    if more:
        ids = torch.cat([ids, prompts(3, more + 1, seed=3)[:, 1:]], 1)
        mask = torch.cat([mask, torch.ones(3, more, dtype=torch.long)], 1)
    return ids, mask, [PROMPT - length for length in lengths], images


@contextmanager
def entering(model: Any) -> Iterator[dict[int, Tensor]]:
    """What each decoder layer was given last."""
    seen: dict[int, Tensor] = {}
    handles = [
        layer.register_forward_pre_hook(lambda _module, args, index=index: seen.update({index: args[0]}))
        for index, layer in enumerate(model.model.layers)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def literal_var(
    edit: VAR, first_real: list[int], images: list[list[tuple[int, int]]], hidden: dict[int, Tensor], gates: set[bool]
) -> Literal:
    """On weights ``(B, H, N, N)``. ``gates`` gets whether rows with an image and sinks were edited."""
    is_code = edit.faithful == "code"

    def weights(a: Tensor, layer: int) -> Tensor:
        if not 2 <= layer <= (4 if is_code else 3):
            return a
        edited = a.clone()
        for b, start in enumerate(first_real):
            v = [j for begin, stop in images[b] for j in range(begin, stop)]
            sinks = []
            for j in range(start, PROMPT):
                x = hidden[layer][b, j].tolist()
                rms = math.sqrt(sum(value * value for value in x) / len(x) + 1e-6)
                if max(abs(x[d]) / rms for d in edit.dims or ()) > edit.tau:
                    sinks.append(j)
            for i in range(start, a.shape[2]):
                if is_code:
                    in_scope = bool(set(sinks) & set(v))
                else:
                    after = any(i >= stop for _, stop in images[b]) and i not in v
                    in_scope = after and any(j in v and j <= i for j in sinks)
                if not in_scope:
                    continue
                for h in range(a.shape[1]):
                    row = [float(weight) for weight in a[b, h, i]]
                    a_v, a_vs = sum(row[j] for j in v), sum(row[j] for j in v if j in sinks)
                    a_vn = a_v - a_vs
                    enough = a_vs <= edit.rho * a_v if is_code else a_vn >= edit.rho * a_v
                    gates.add(a_v >= edit.summ and enough)
                    if not (a_v >= edit.summ and enough) or a_vn <= 0:
                        continue
                    freed = (1 - edit.p) * sum(row[j] for j in sinks)
                    for j in range(a.shape[3]):
                        if j in sinks:
                            edited[b, h, i, j] = edit.p * row[j]
                        elif j in v:
                            edited[b, h, i, j] = row[j] * (1 + freed / a_vn)
        torch.testing.assert_close(edited.sum(-1), a.sum(-1), rtol=1e-12, atol=1e-12)
        return edited

    return Literal(weights=weights)


@pytest.mark.parametrize(
    "edit",
    [
        VAR(**SETTINGS),
        VAR(**SETTINGS | {"p": 0.0, "rho": 0.0, "summ": 0.0}),
        VAR(**SETTINGS, faithful="code"),
        VAR(**SETTINGS | {"rho": 0.3}, faithful="code"),
    ],
    ids=str,
)
def test_prefill_and_decode_are_the_sheet(edit: VAR) -> None:
    """Sinks stay those of the prompt. One prompt has no image, one two, and text between them."""
    model = llama()
    ids, mask, first_real, images = batch(more=4)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    gates: set[bool] = set()
    with entering(model) as hidden, literal_attention(model, literal_var(edit, first_real, images, hidden, gates)):
        expected = model(ids, attention_mask=mask, position_ids=positions).logits
    assert gates == {True} if edit.summ == 0 else {True, False}
    with attn_hooks.editing(model, edit):
        inputs = {"attention_mask": mask[:, :PROMPT], "position_ids": positions[:, :PROMPT]}
        prefill = model(ids[:, :PROMPT], **inputs).logits
        cache = DynamicCache(config=model.config)
        stepwise = decode(model, ids, PROMPT, cache, attention_mask=mask)
    real = mask[:, :PROMPT].bool()
    torch.testing.assert_close(prefill[real], expected[:, :PROMPT][real], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(stepwise, expected[:, PROMPT - 1 :], rtol=1e-9, atol=1e-9)


def test_a_prompt_without_image_and_rows_before_it_are_untouched() -> None:
    model = llama()
    ids, mask, _, _ = batch()
    before = model(ids, attention_mask=mask).logits
    with attn_hooks.editing(model, VAR(**SETTINGS | {"summ": 0.0, "rho": 0.0})):
        after = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(after[1, 5:], before[1, 5:], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(after[0, :6], before[0, :6], rtol=1e-12, atol=1e-12)
    assert (after[0, 10:] - before[0, 10:]).abs().max() > 1e-6


def test_two_turns_equal_one_forward_where_sinks_are_looked_for() -> None:
    """A prompt in two parts, each with an image; kept at the first part's sinks it is something else."""
    model = llama()
    ids, _mask, _, _ = batch()
    ids = ids[:1]
    edits = {rule: VAR(**SETTINGS, later_tokens=rule) for rule in ("extend", "keep")}
    with attn_hooks.editing(model, edits["extend"]):
        whole = model(ids).logits[:, 7:]
    parts = {}
    for rule, edit in edits.items():
        cache = DynamicCache(config=model.config)
        with attn_hooks.editing(model, edit):
            model(ids[:, :7], past_key_values=cache)
            parts[rule] = model(ids[:, 7:], past_key_values=cache).logits
    torch.testing.assert_close(parts["extend"], whole, rtol=1e-9, atol=1e-9)
    assert (parts["keep"] - whole).abs().max() > 1e-6


def test_assisted_generation_with_the_prompts_sinks_is_greedy() -> None:
    model, assistant = attn_hooks.wrap(llama(), VAR(**SETTINGS, later_tokens="keep")), llama(num_hidden_layers=1)
    ids = prompts(1, PROMPT, image=True)
    settings = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, assistant_model=assistant, **settings), model.generate(ids, **settings))


def test_a_cache_filled_without_it_and_a_prompt_without_image_are_refused() -> None:
    model, ids = llama(), prompts(image=True)
    cache = model(ids[:, :8], use_cache=True).past_key_values
    attn_hooks.wrap(model, VAR(**SETTINGS))
    with pytest.raises(EditError, match="no-prefill"):
        model(ids[:, 8:9], past_key_values=cache)
    with pytest.raises(EditError, match="no-image-in-prompt"):
        model(prompts())


def test_phi_does_not_overflow_in_half_precision() -> None:
    hidden = torch.ones(1, 1, 64, dtype=torch.float16)
    hidden[..., 7] = 3000.0
    expected = 3000 / math.sqrt((3000.0**2 + 63) / 64)
    assert float(sink_strength(hidden, (3, 7))) == pytest.approx(expected, rel=1e-6)


# The hidden states' way to the edit


def test_offloaded_by_accelerate() -> None:
    ids = prompts(image=True)
    expected = attn_hooks.wrap(llama(), VAR(**SETTINGS))(ids).logits
    model = cpu_offload(llama(), execution_device=torch.device("cpu"))
    before = snapshot.take(model)
    attn_hooks.unwrap(attn_hooks.wrap(model, VAR(**SETTINGS)))
    assert snapshot.changes(before, model) == []
    assert torch.equal(attn_hooks.wrap(model, VAR(**SETTINGS))(ids).logits, expected)


def test_only_layers_that_read_hidden_states_get_a_hook() -> None:
    model = llama()
    with attn_hooks.editing(model, VAR(**SETTINGS), "sink_scale"):
        assert [len(layer._forward_pre_hooks) for layer in model.model.layers] == [0, 0, 1, 1, 0]
    assert not any(layer._forward_pre_hooks for layer in model.model.layers)


def test_decode_compiles_in_one_graph() -> None:
    model, ids = attn_hooks.wrap(llama(), VAR(**SETTINGS)), prompts(2, PROMPT + 3, image=True)
    eager = decode(model, ids, PROMPT, StaticCache(config=model.config, max_cache_len=32))
    cache = StaticCache(config=model.config, max_cache_len=32)
    step = torch.compile(model.forward, fullgraph=True, backend="eager")
    model(ids[:, :PROMPT], past_key_values=cache)
    for place in range(PROMPT, PROMPT + 3):
        logits = step(ids[:, place : place + 1], past_key_values=cache).logits[:, -1]
        torch.testing.assert_close(logits, eager[:, place - PROMPT + 1], rtol=1e-9, atol=1e-9)


def test_a_compiled_prompt_breaks_off_and_gives_the_same() -> None:
    model, ids = attn_hooks.wrap(llama(), VAR(**SETTINGS)), prompts(image=True)
    expected = model(ids).logits
    torch.testing.assert_close(
        torch.compile(model.forward, backend="eager")(ids).logits, expected, rtol=1e-9, atol=1e-9
    )


def test_gradient_checkpointing() -> None:
    model, ids = attn_hooks.wrap(llama().train(), VAR(**SETTINGS)), prompts(image=True)
    gradients = []
    with torch.enable_grad():
        for checkpoints in (False, True):
            if checkpoints:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            model.zero_grad()
            model(ids, use_cache=False).logits.sum().backward()
            gradients.append(model.model.embed_tokens.weight.grad.clone())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-9)


def test_a_layer_that_is_not_called_is_refused() -> None:
    model = attn_hooks.wrap(llama(), VAR(**SETTINGS))
    layer = model.model.layers[2]
    model.model.layers[2] = torch.nn.Module()
    model.model.layers[2].forward = layer.forward  # its hooks do not run
    with pytest.raises(UnsupportedModelError, match="layer 2 of LlamaForCausalLM could not be seen") as refused:
        model(prompts(image=True))
    assert refused.value.code == "no-layer-input"


# Sink dimensions by backbone


@pytest.mark.parametrize("backbone", PUBLISHED_DIMS, ids=str)
def test_the_published_dims_go_by_the_backbones_shape(backbone: Any) -> None:
    text = {
        "model_type": backbone.model_types[0],
        "hidden_size": backbone.hidden_size,
        "num_attention_heads": backbone.hidden_size // 128,
        "num_hidden_layers": backbone.layers,
        "num_key_value_heads": backbone.kv_heads,
        "intermediate_size": 64,
        "vocab_size": backbone.vocabulary[0],
    }
    if text["model_type"] == "qwen2_vl":
        text["model_type"] = "qwen2_vl_text"
        config = CONFIG_MAPPING["qwen2_vl"](text_config=text, vision_config=vlms.QWEN_VISION, image_token_id=90)
    else:
        config = CONFIG_MAPPING["llava"](text_config=text, vision_config=vlms.CLIP, image_token_index=90)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    info = attn_hooks.inspect_model(model.to_empty(device="cpu"))
    assert VAR()._dims_of(info) == PUBLISHED_DIMS[backbone]


def test_unknown_dims_are_refused_and_point_to_the_command() -> None:
    with pytest.raises(EditError, match=r"llama, 32 wide, 5 layers.*attn-hooks find-sinks") as refused:
        attn_hooks.wrap(llama(), "var")
    assert refused.value.code == "unknown-sink-dims"
    with pytest.raises(EditError, match="32 is beyond the hidden states"):
        attn_hooks.wrap(llama(), VAR(dims=(32,)))
    with pytest.raises(EditError, match="needs-image"):
        attn_hooks.wrap(llama(image_token_id=None), VAR(dims=(1,)))
