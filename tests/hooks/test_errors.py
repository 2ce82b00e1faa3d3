"""Each error through the public API: its code, its class, and the names that its message must hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MptConfig,
    MptForCausalLM,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import attn_hooks
import attn_hooks.registry
from attn_hooks import (
    ACT,
    PASTA,
    Ablate,
    AttnHooksError,
    EditError,
    HeadAffine,
    PowerAttention,
    SinkScale,
    Streaming,
    UnsupportedArgumentError,
    UnsupportedModelError,
    build_edit,
    find_spans,
    load_edits,
    save_edits,
    wrap,
)
from tests.hooks.tiny import (
    ACTING_EDITS,
    NUM_HEADS,
    NUM_LAYERS,
    gain_at,
    logits,
    padded_batch,
    prompt,
    tiny_config,
    tiny_llama,
)

SMALL = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}


def _mamba() -> nn.Module:
    return MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4, **SMALL))


def _bert() -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return BertModel(BertConfig(vocab_size=64, **sizes))


NO_INTERFACE: dict[str, Callable[[], nn.Module]] = {
    "BloomForCausalLM": lambda: BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=4, **SMALL)),
    "FalconForCausalLM": lambda: FalconForCausalLM(
        FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **SMALL)
    ),
    "GPTJForCausalLM": lambda: GPTJForCausalLM(GPTJConfig(n_embd=32, n_layer=2, n_head=4, rotary_dim=4, **SMALL)),
    "MptForCausalLM": lambda: MptForCausalLM(MptConfig(d_model=32, n_layers=2, n_heads=4, **SMALL)),
}


def assert_error(
    caught: pytest.ExceptionInfo[AttnHooksError], code: str, kind: type[AttnHooksError], *named: object
) -> None:
    """The class, the code at the message's end, and everything that the user must find in it."""
    message = str(caught.value)
    assert caught.value.code == code
    assert type(caught.value) is kind
    assert isinstance(caught.value, ValueError)
    assert message.endswith(f"[{code}]")
    missing = [str(name) for name in named if str(name) not in message]
    assert not missing, f"{missing} not in: {message}"


# Models that cannot be edited


@pytest.mark.parametrize("name", NO_INTERFACE)
def test_no_attention_interface(name: str) -> None:
    with pytest.raises(AttnHooksError) as caught:
        wrap(NO_INTERFACE[name](), "streaming")
    attention = name.removesuffix("ForCausalLM") + "Attention"
    assert_error(caught, "no-attention-interface", UnsupportedModelError, name, attention)


def test_no_attention_at_all() -> None:
    with pytest.raises(AttnHooksError) as caught:
        wrap(_mamba(), "streaming")
    assert_error(caught, "no-attention-interface", UnsupportedModelError, "MambaForCausalLM", "no attention module")


def test_no_causal_attention() -> None:
    with pytest.raises(AttnHooksError) as caught:
        wrap(_bert(), "streaming")
    assert_error(caught, "no-causal-attention", UnsupportedModelError, "BertModel", "not causal")


@pytest.mark.parametrize("backend", ["flex_attention", "flash_attention_2", "flash_attention_3", "paged|eager"])
def test_unsupported_backend(backend: str) -> None:
    model = tiny_llama()
    # Set beside set_attn_implementation, which wants the package behind each name installed.
    model.config._attn_implementation_internal = backend
    with pytest.raises(AttnHooksError) as caught:
        wrap(model, "streaming")
    assert_error(caught, "unsupported-backend", UnsupportedModelError, "LlamaForCausalLM", backend, "'sdpa'")
    assert model.config._attn_implementation == backend


def test_backend_branch() -> None:
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, reorder_and_upcast_attn=True, **SMALL)
    config._attn_implementation = "eager"
    with pytest.raises(AttnHooksError) as caught:
        wrap(GPT2LMHeadModel(config), "streaming")
    assert_error(caught, "backend-branch", UnsupportedModelError, "GPT2LMHeadModel", "GPT2Attention")


def test_backend_drops() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = Gemma2ForCausalLM(Gemma2Config(**sizes, head_dim=8, intermediate_size=48, **SMALL))
    # As transformers up to 5.17 chooses by itself; later ones refuse it.
    model.config._attn_implementation_internal = "sdpa"
    with pytest.raises(AttnHooksError) as caught:
        wrap(model, "streaming")
    assert_error(caught, "backend-drops", UnsupportedModelError, "Gemma2ForCausalLM", "softcap", "'sdpa'", "'eager'")
    model.config._attn_implementation_internal = "eager"
    assert torch.isfinite(logits(wrap(model, "streaming"))).all()


def test_meta_device() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(tiny_config())
    with pytest.raises(AttnHooksError) as caught:
        wrap(model, "streaming")
    assert_error(caught, "meta-device", UnsupportedModelError, "LlamaForCausalLM", "from_pretrained")


def test_one_parameter_left_on_meta() -> None:
    model = tiny_llama()
    model.model.layers[1].self_attn.q_proj.to("meta")
    with pytest.raises(AttnHooksError) as caught:
        wrap(model, "streaming")
    assert_error(caught, "meta-device", UnsupportedModelError, "LlamaForCausalLM")


@pytest.mark.parametrize("given", ["model", None, {"model": 1}], ids=repr)
def test_not_a_model(given: Any) -> None:
    for call in (lambda: wrap(given, "streaming"), lambda: attn_hooks.explain(given, "streaming")):
        with pytest.raises(AttnHooksError) as caught:
            call()
        assert_error(caught, "not-a-model", UnsupportedModelError, type(given).__name__)


@pytest.mark.parametrize("what", ["report", "save"])
def test_not_wrapped(what: str, tmp_path: Path) -> None:
    model = tiny_llama()
    with pytest.raises(AttnHooksError) as caught:
        attn_hooks.report(model) if what == "report" else save_edits(model, tmp_path / "edits")
    assert_error(caught, "not-wrapped", AttnHooksError, "LlamaForCausalLM", what)
    assert not (tmp_path / "edits").exists()


# Edits that do not fit


@pytest.mark.parametrize(
    ("given", "nearest"),
    [("streeming", "streaming"), ("sinkscale", "sink_scale"), ("PASTA", "pasta"), ("xyzzy", "act")],
)
def test_unknown_method(given: str, nearest: str) -> None:
    for form in (given, {"method": given}):
        with pytest.raises(AttnHooksError) as caught:
            wrap(tiny_llama(), form)
        assert_error(caught, "unknown-method", EditError, repr(given), nearest)


BAD_PARAMETERS: dict[str, tuple[Callable[[], object], tuple[str, ...]]] = {
    "above the range": (lambda: ACT(beta=1.5), ("act", "beta", "1.5", "less than or equal to 1")),
    "below the range": (lambda: SinkScale(scale=-0.1), ("sink_scale", "scale", "-0.1")),
    "not a number": (lambda: ACT(beta=float("nan")), ("act", "beta", "nan")),
    "infinite": (lambda: SinkScale(scale=float("inf")), ("sink_scale", "scale", "inf")),
    "infinite threshold": (lambda: ACT(alpha=float("inf")), ("act", "alpha", "inf")),
    "unknown": (lambda: Streaming(windows=3), ("streaming", "windows", "3")),
    "unknown in a mapping": (lambda: build_edit({"method": "streaming", "windows": 3}), ("streaming", "windows")),
    "wrong type": (lambda: Streaming(window="wide"), ("streaming", "window", "'wide'")),
    "a fraction for a count": (lambda: PowerAttention(block=2.5), ("power", "block", "2.5")),
    "missing": (lambda: build_edit("ablate"), ("ablate", "heads")),
    "empty": (lambda: Ablate(heads=[]), ("ablate", "heads")),
    "negative head": (lambda: Ablate(heads={0: [-1]}), ("ablate", "heads", "-1")),
    "negative layer": (lambda: Streaming(layers=(-1,)), ("streaming", "layers", "-1")),
    "layers that are no list": (lambda: Ablate(heads={"first": [1]}), ("ablate", "heads", "first")),
    "not one of the choices": (lambda: ACT(faithful="mine"), ("act", "faithful", "'mine'", "'paper'")),
    "neither gain nor offset": (HeadAffine, ("head_affine", "gain", "offset")),
    "not finite": (lambda: HeadAffine(gain=torch.tensor([[float("nan")]])), ("head_affine", "gain", "not finite")),
    "ragged tensor": (lambda: HeadAffine(gain=[[1.0], [1.0, 2.0]]), ("head_affine", "gain")),
    "text for a tensor": (lambda: HeadAffine(gain="ones"), ("head_affine", "gain")),
    "span backwards": (lambda: PASTA(spans=(((6, 3),),)), ("pasta", "spans")),
    "no spans": (lambda: PASTA(spans=()), ("pasta", "spans")),
}


@pytest.mark.parametrize("name", BAD_PARAMETERS)
def test_bad_parameters(name: str) -> None:
    make, named = BAD_PARAMETERS[name]
    with pytest.raises(AttnHooksError) as caught:
        make()
    assert_error(caught, "bad-parameters", EditError, *named)
    assert "\n" not in str(caught.value)
    assert "pydantic" not in str(caught.value)


def test_parameters_cannot_change_after_validation() -> None:
    edit = ACT(beta=0.4)
    with pytest.raises(ValueError, match="frozen"):
        edit.beta = 7.0
    gain = gain_at(1, 2, 3.0)
    model = wrap(tiny_llama(), HeadAffine(gain=gain))
    edited = logits(model)
    gain[1, 2] = float("nan")
    assert torch.equal(logits(model), edited)


@pytest.mark.parametrize("given", [3, None, ["streaming"], {"window": 3}, {"method": 3}, Streaming], ids=repr)
def test_bad_edit(given: object) -> None:
    for call in (wrap, attn_hooks.explain):
        with pytest.raises(AttnHooksError) as caught:
            call(tiny_llama(), given)
        assert_error(caught, "bad-edit", EditError, repr(given))


BAD_RECIPES: dict[str, tuple[bytes | None, str, str]] = {
    "missing file": (None, "bad-recipe", "No such file"),
    "not YAML": (b"edits: [", "bad-recipe", "not valid YAML"),
    "not text": (b"\xff\xfe\x00edits", "bad-recipe", ""),
    "a list": (b"- streaming", "bad-recipe", "edits"),
    "no edits": (b"model: x", "bad-recipe", "edits"),
    "empty": (b"", "bad-recipe", "edits"),
    "edits that are a name": (b"edits: streaming", "bad-recipe", "edits"),
    "a number among the edits": (b"edits: [3]", "bad-edit", "3"),
    "an unknown method": (b"edits: [streeming]", "unknown-method", "streaming"),
    "a bad parameter": (b"edits: [{method: act, beta: 2}]", "bad-parameters", "beta"),
}


@pytest.mark.parametrize("name", BAD_RECIPES)
def test_bad_recipe(name: str, tmp_path: Path) -> None:
    content, code, named = BAD_RECIPES[name]
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(AttnHooksError) as caught:
        wrap(tiny_llama(), path)
    assert_error(caught, code, EditError, named, *([path] if code == "bad-recipe" else []))


def test_a_folder_for_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").mkdir()
    with pytest.raises(AttnHooksError) as caught:
        wrap(tiny_llama(), tmp_path / "recipe.yaml")
    assert_error(caught, "bad-recipe", EditError, "recipe.yaml")


def test_duplicate_method(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = EntryPoint(name="streaming", value="their_package.methods:Streaming", group="attn_hooks.methods")
    monkeypatch.setattr(attn_hooks.registry, "entry_points", lambda group: [theirs] if group == theirs.group else [])
    attn_hooks.registry.methods.cache_clear()
    try:
        with pytest.raises(AttnHooksError) as caught:
            wrap(tiny_llama(), "streaming")
    finally:
        attn_hooks.registry.methods.cache_clear()
    assert_error(
        caught, "duplicate-method", EditError, "'streaming'", "their_package.methods:Streaming", "attn_hooks.methods"
    )


OUT_OF_RANGE = {
    "layers": (lambda: Streaming(layers=(0, NUM_LAYERS)), "streaming"),
    "layers of act": (lambda: ACT(layers=(NUM_LAYERS,)), "act"),
    "heads' layer": (lambda: Ablate(heads={NUM_LAYERS: [0]}), "ablate"),
    "heads' layer of pasta": (lambda: PASTA(spans=(((0, 1),),), heads={NUM_LAYERS: [0]}), "pasta"),
}


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_layer_out_of_range(name: str) -> None:
    make, method = OUT_OF_RANGE[name]
    with pytest.raises(AttnHooksError) as caught:
        wrap(tiny_llama(), make())
    assert_error(
        caught,
        "layer-out-of-range",
        EditError,
        method,
        f"layer {NUM_LAYERS}",
        "LlamaForCausalLM",
        f"0-{NUM_LAYERS - 1}",
    )


def test_dense_layers_out_of_range() -> None:
    with pytest.raises(AttnHooksError) as caught:
        wrap(tiny_llama(), PowerAttention(dense_layers=(NUM_LAYERS,)))
    assert_error(caught, "layer-out-of-range", EditError, "power", f"layer {NUM_LAYERS}", "LlamaForCausalLM")


@pytest.mark.parametrize("method", ["ablate", "act", "pasta", "power", "sink_scale", "streaming"])
def test_head_out_of_range(method: str) -> None:
    more = {"spans": (((0, 1),),)} if method == "pasta" else {}
    edit = build_edit({"method": method, "heads": {2: [0, NUM_HEADS]}, **more})
    with pytest.raises(AttnHooksError) as caught:
        wrap(tiny_llama(), edit)
    named = (method, f"head {NUM_HEADS}", "layer 2", "LlamaForCausalLM", f"0 to {NUM_HEADS - 1}")
    assert_error(caught, "head-out-of-range", EditError, *named)


@pytest.mark.parametrize(
    ("parameter", "shape"),
    [("gain", (NUM_LAYERS, NUM_HEADS + 1)), ("gain", (NUM_HEADS,)), ("offset", (NUM_LAYERS, NUM_HEADS, 3))],
)
def test_wrong_shape(parameter: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(AttnHooksError) as caught:
        wrap(tiny_llama(), HeadAffine(**{parameter: torch.ones(shape)}))
    named = ("head_affine", parameter, shape, "LlamaForCausalLM", (NUM_LAYERS, NUM_HEADS))
    assert_error(caught, "wrong-shape", EditError, *(str(name).removesuffix(")") for name in named))


@pytest.mark.parametrize(
    "edit", [ACT(), Streaming(layers=()), PowerAttention(dense_layers=(0, 1, 2)), SinkScale(heads=())], ids=str
)
def test_no_layers(edit: attn_hooks.Edit) -> None:
    with pytest.raises(AttnHooksError) as caught:
        wrap(tiny_llama(num_hidden_layers=3) if edit.method != "act" else tiny_llama(num_hidden_layers=2), edit)
    assert_error(caught, "no-layers", EditError, edit.method, "LlamaForCausalLM")


def test_needs_image() -> None:
    with pytest.raises(AttnHooksError) as caught:
        wrap(tiny_llama(), PASTA(spans="image"))
    assert_error(caught, "needs-image", EditError, "pasta", "LlamaForCausalLM")


@pytest.mark.parametrize("order", [("streaming", "power"), ("power", "streaming"), ("streaming", "streaming")])
def test_cannot_compose(order: tuple[str, str]) -> None:
    with pytest.raises(AttnHooksError) as caught:
        wrap(tiny_llama(), *order)
    assert_error(caught, "cannot-compose", EditError, *order, "layer 0")
    model = wrap(tiny_llama(), order[0])
    with pytest.raises(AttnHooksError) as caught, attn_hooks.editing(model, order[1]):
        pass
    assert_error(caught, "cannot-compose", EditError, *order)


def test_two_visibility_edits_may_share_a_model_but_not_a_layer() -> None:
    model = wrap(tiny_llama(), Streaming(layers=(0,), window=3), PowerAttention(dense_layers=(0,), block=2))
    assert torch.isfinite(logits(model)).all()


def test_bad_saved_edits(tmp_path: Path) -> None:
    good = tmp_path / "good"
    save_edits([HeadAffine(gain=torch.ones(NUM_LAYERS, NUM_HEADS)), Streaming()], good)
    content = json.loads((good / "edits.json").read_text())
    corrupt: dict[str, tuple[bytes, str]] = {
        "not JSON": (b"{", "not valid JSON"),
        "not text": (b"\xff\xfe\x00", ""),
        "a list": (b"[]", "edits"),
        "no edits": (b'{"format_version": 1}', "edits"),
        "newer": (json.dumps(content | {"format_version": 99}).encode(), "99"),
        "an edit that is a name": (json.dumps(content | {"edits": ["streaming"]}).encode(), "streaming"),
        "a tensor that is missing": (
            json.dumps(content | {"edits": [{"method": "head_affine", "gain": {"tensor": "7.gain"}}]}).encode(),
            "7.gain",
        ),
    }
    for case, (text, named) in corrupt.items():
        (good / "edits.json").write_bytes(text)
        with pytest.raises(AttnHooksError) as caught:
            load_edits(good)
        assert_error(caught, "bad-saved-edits", EditError, good, named), case
    with pytest.raises(AttnHooksError) as caught:
        load_edits(tmp_path / "nowhere")
    assert_error(caught, "bad-saved-edits", EditError, tmp_path / "nowhere" / "edits.json")


@pytest.mark.parametrize(
    ("row", "code", "named"),
    [
        ({"method": "no_such"}, "unknown-method", "no_such"),
        ({"method": "act", "beta": 7}, "bad-parameters", "beta"),
        ({"method": "act", "gamma": 1}, "bad-parameters", "gamma"),
        ({"beta": 1}, "bad-edit", "beta"),
    ],
    ids=lambda value: str(value),
)
def test_saved_edits_are_validated_against_their_schema(
    row: dict[str, object], code: str, named: str, tmp_path: Path
) -> None:
    (tmp_path / "edits.json").write_text(json.dumps({"format_version": 1, "edits": [row]}))
    with pytest.raises(AttnHooksError) as caught:
        load_edits(tmp_path)
    assert_error(caught, code, EditError, named)


# Calls that cannot be honoured


def _in_chunks(model: Any, *lengths: int) -> None:
    tokens, cache, start = prompt(), None, 0
    for length in lengths:
        cache = model(tokens[:, start : start + length], past_key_values=cache, use_cache=True).past_key_values
        start += length


@pytest.mark.parametrize(
    ("edit", "lengths", "named"),
    [
        (ACTING_EDITS["act"], (8, 4), ("act", "several new tokens", "layer 1", "later_tokens")),
        (ACT(faithful="code", layers=(2,)), (8, 1), ("act", "decode", "layer 2", "faithful='paper'")),
        (ACTING_EDITS["pasta"], (8, 4), ("pasta", "several new tokens", "layer 0", "prompt_length")),
    ],
    ids=["act in chunks", "act as its code, in decode", "pasta in chunks"],
)
def test_phase(edit: attn_hooks.Edit, lengths: tuple[int, ...], named: tuple[str, ...]) -> None:
    with pytest.raises(AttnHooksError) as caught:
        _in_chunks(wrap(tiny_llama(), edit), *lengths)
    assert_error(caught, "phase", EditError, "LlamaForCausalLM", *named)


def test_what_the_phase_error_recommends_works() -> None:
    _in_chunks(wrap(tiny_llama(), ACT(layers=(2,), later_tokens="keep")), 8, 4)
    chunked = wrap(tiny_llama(), PASTA(spans=(((3, 6),),), prompt_length=12))
    _in_chunks(chunked, 8, 4)
    assert attn_hooks.report(chunked).edits[0].calls == {"prefill": NUM_LAYERS, "chunk": NUM_LAYERS}


@pytest.mark.parametrize("name", ["act", "pasta"])
@pytest.mark.parametrize("before", ["nothing", "another edit"])
def test_no_prefill(name: str, before: str) -> None:
    model = tiny_llama()
    if before == "another edit":
        wrap(model, "streaming")
    cache = model(prompt(), use_cache=True).past_key_values
    wrap(model, ACTING_EDITS[name])
    with pytest.raises(AttnHooksError) as caught:
        model(prompt()[:, :1], past_key_values=cache)
    assert_error(caught, "no-prefill", EditError, name, "LlamaForCausalLM", "layer")


def test_batch_changed() -> None:
    model = wrap(tiny_llama(), "streaming")
    cache = model(prompt(2), use_cache=True).past_key_values
    cache.batch_select_indices(torch.tensor([0]))
    with pytest.raises(AttnHooksError) as caught:
        model(prompt(1)[:, :1], past_key_values=cache)
    assert_error(caught, "batch-changed", EditError, "LlamaForCausalLM", 2, 1)


def test_packed_sequences() -> None:
    model = wrap(tiny_llama(), "streaming")
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    with pytest.raises(AttnHooksError) as caught:
        model(prompt(1), position_ids=positions)
    assert_error(caught, "packed-sequences", UnsupportedArgumentError, "LlamaForCausalLM")


@pytest.mark.filterwarnings("ignore::attn_hooks.EditNeverActedWarning")
def test_an_argument_that_is_not_honoured() -> None:
    model = tiny_llama()
    plain = model(prompt(), surprise=torch.ones(1)).logits
    wrap(model, Streaming(layers=(1,)))
    with pytest.raises(AttnHooksError) as caught:
        model(prompt(), surprise=torch.ones(1))
    named = ("LlamaForCausalLM", "layer 1", "'surprise'", "streaming")
    assert_error(caught, "argument", UnsupportedArgumentError, *named)
    attn_hooks.unwrap(model)
    assert torch.equal(model(prompt(), surprise=torch.ones(1)).logits, plain)


def test_a_mask_that_is_not_understood() -> None:
    model = wrap(tiny_llama(), "streaming")
    with pytest.raises(AttnHooksError) as caught:
        _call_layer(model, mask=torch.ones(1, 4, dtype=torch.bool))
    assert_error(caught, "argument", UnsupportedArgumentError, "'attention_mask'", "4-D", "layer 0")


def test_a_layer_called_outside_its_decoders_forward() -> None:
    model = wrap(tiny_llama(), "streaming")
    with pytest.raises(AttnHooksError) as caught:
        _call_layer(model)
    assert_error(caught, "argument", UnsupportedArgumentError, "outside the forward", "layer 0")


def _call_layer(model: Any, keys: int = 4, heads: int = NUM_HEADS, mask: torch.Tensor | None = None) -> None:
    """One call of layer 0's registered function, as a modeling file makes it; a mask implies a forward before."""
    if mask is not None or keys != 4 or heads != NUM_HEADS:
        logits(model, prompt(1, 4))
    module = model.model.layers[0].self_attn
    query, key = torch.zeros(1, heads, 4, 8), torch.zeros(1, 4, keys, 8)
    ALL_ATTENTION_FUNCTIONS[module.config._attn_implementation](module, query, key, key, mask, scaling=1.0)


def test_cross_attention() -> None:
    model = wrap(tiny_llama(), "streaming")
    with pytest.raises(AttnHooksError) as caught:
        _call_layer(model, keys=2)
    assert_error(
        caught, "cross-attention", UnsupportedArgumentError, "LlamaForCausalLM", "layer 0", "2 keys", "streaming"
    )


def test_tensor_parallel_shard_that_cannot_be_told() -> None:
    model = wrap(tiny_llama(), Ablate(heads={0: [5]}))
    with pytest.raises(AttnHooksError) as caught:
        _call_layer(model, heads=4)
    assert_error(
        caught, "tensor-parallel", UnsupportedModelError, "LlamaForCausalLM", "layer 0", "4 of 8", "LlamaAttention"
    )


def test_context_parallel(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrap(tiny_llama(), "streaming")
    own = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *args, **kwargs: own(*args, **kwargs)
    )
    with pytest.raises(AttnHooksError) as caught:
        logits(model)
    assert_error(caught, "context-parallel", UnsupportedArgumentError, "LlamaForCausalLM", "streaming")


@pytest.mark.parametrize("given", [2, 3])
def test_spans_batch(given: int) -> None:
    model = wrap(tiny_llama(), PASTA(spans=(((0, 3),),) * given))
    with pytest.raises(AttnHooksError) as caught:
        logits(model, prompt(5))
    assert_error(caught, "spans-batch", EditError, "pasta", given, 5)


def test_after_a_refused_call_the_model_goes_on() -> None:
    model = wrap(tiny_llama(), "streaming")
    expected = logits(model, **padded_batch("left"))
    with pytest.raises(AttnHooksError):
        model(prompt(), surprise=torch.ones(1))
    assert torch.equal(logits(model, **padded_batch("left")), expected)


# Helpers around


class _Words:
    """A tokenizer of one token a word."""

    is_fast = True

    def __call__(self, text: str, return_offsets_mapping: bool) -> dict[str, list[tuple[int, int]]]:
        starts = [0, *(place + 1 for place, letter in enumerate(text) if letter == " ")]
        stops = [*(place for place, letter in enumerate(text) if letter == " "), len(text)]
        return {"offset_mapping": list(zip(starts, stops, strict=True))}


def test_find_spans() -> None:
    assert find_spans(_Words(), "the red cat sat", ["red cat", "at"]) == ((1, 3), (2, 3))


@pytest.mark.parametrize("substring", ["dog", "RED", ""])
def test_span_not_found(substring: str) -> None:
    with pytest.raises(AttnHooksError) as caught:
        find_spans(_Words(), "the red cat sat", [substring])
    assert_error(caught, "span-not-found", EditError, repr(substring))


def test_slow_tokenizer() -> None:
    with pytest.raises(AttnHooksError) as caught:
        find_spans(SimpleNamespace(is_fast=False), "the red cat sat", ["red"])
    assert_error(caught, "slow-tokenizer", EditError, "SimpleNamespace")


def test_missing_data() -> None:
    with pytest.raises(AttnHooksError) as caught:
        attn_hooks.testbed_path("no-such-model")
    assert_error(caught, "missing-data", AttnHooksError, "no-such-model")
