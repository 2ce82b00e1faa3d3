"""Decode steps with a static cache, compiled in one graph or captured in a CUDA graph, give what eager steps give."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import (
    CompileConfig,
    DynamicCache,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
)

import attn_hooks
from attn_hooks import ACT, PASTA, SPIN, Ablate, AttentionCall, Edit, HeadAffine, SinkScale, Streaming, engine, sequence
from attn_kernels import Gate, LogitMap, Order, Primitive, Regroup, Tap
from attn_kernels.edited_attention import dispatch
from tests.models import IMAGE, SIZES, _built, gemma2, gpt_oss, left_padded, llama

NUM_LAYERS, NUM_HEADS = SIZES["num_hidden_layers"], SIZES["num_attention_heads"]
CACHE = 28
NEW_TOKENS = 6
GAIN = torch.linspace(0.5, 2.0, NUM_LAYERS * NUM_HEADS).reshape(NUM_LAYERS, NUM_HEADS)


class GatedRegroup(Edit):
    """Half of the first key's weight goes to the next two, in rows where it has some."""

    method: ClassVar[str] = "gated_regroup"
    source: ClassVar[str] = "tests"
    reads: ClassVar[frozenset] = frozenset({"tokens"})
    writes: ClassVar[str] = "weights"
    scope: ClassVar[str] = "per-row"
    fixed_in_decode: ClassVar[bool] = True

    def primitives(self, call: AttentionCall) -> list[Primitive]:
        position = call.inputs.key_position
        first, next_two = call.keys_at(position == 0), call.keys_at((position > 0) & (position < 3))
        return [Regroup(first, 0.5, target=next_two, gate=Gate(of=first, at_least=0.05))]


class Ordered(Edit):
    """Hides the two keys after the first by an order value; keys to come have a low one, too."""

    method: ClassVar[str] = "ordered"
    source: ClassVar[str] = "tests"
    reads: ClassVar[frozenset] = frozenset({"tokens"})
    writes: ClassVar[str] = "visibility"
    scope: ClassVar[str] = "per-row"
    fixed_in_decode: ClassVar[bool] = True

    def primitives(self, call: AttentionCall) -> list[Primitive]:
        position = call.inputs.key_position
        value = ((position > 0) & (position < 3)).long().expand(call.batch, -1)
        return [Order(torch.zeros(call.batch, call.inputs.num_queries, dtype=torch.long, device=call.device), value)]


class Watching(Edit):
    """Reads the weights of every step, or of the first step only."""

    method: ClassVar[str] = "watching"
    source: ClassVar[str] = "tests"
    reads: ClassVar[frozenset] = frozenset({"weights"})
    writes: ClassVar[str] = "weights"
    scope: ClassVar[str] = "per-row"
    fixed_in_decode: ClassVar[bool] = True

    by_tap: bool = True

    def primitives(self, call: AttentionCall) -> list[Primitive]:
        if self.by_tap:
            return [Tap("entropy", lambda _: None)]
        keys = call.keys_at(call.inputs.key_position == 0)
        return [LogitMap(keys, bias=float(call.tap("group_mass", keys=keys).mean()))]


class EachStep(SinkScale):
    """An edit that wants to be asked at every step."""

    method: ClassVar[str] = "each_step"
    fixed_in_decode: ClassVar[bool] = False


PASTA_EDIT = PASTA(spans=(((1, 3),), ((2, 5),), ((0, 2),)), alpha=0.05)
EDITS: dict[str, tuple[Edit, ...]] = {
    "none": (),
    "pasta": (PASTA_EDIT,),
    "act": (ACT(beta=0.1, alpha=1.1),),
    "act, some heads": (ACT(beta=0.1, alpha=1.1, heads=((1, 2), (3, 0))), SinkScale(scale=4.0, layers=(0,))),
    "head_affine": (HeadAffine(gain=GAIN),),
    "ablate + sink_scale": (Ablate(heads=((1, 2), (3, 0))), SinkScale(scale=4.0)),
    "gated_regroup": (GatedRegroup(),),
    "ordered": (Ordered(),),
    "spin": (SPIN(r=0.5, eps=0.1),),
    "streaming": (Streaming(sinks=1, window=4),),
}
KERNEL_EDITS = [name for name in EDITS if name not in ("none", "streaming")]


def qwen2() -> PreTrainedModel:
    return _built(Qwen2ForCausalLM, Qwen2Config(**SIZES), torch.float64)


def qwen3() -> PreTrainedModel:
    return _built(Qwen3ForCausalLM, Qwen3Config(**SIZES), torch.float64)


def with_wide_windows(model: PreTrainedModel) -> PreTrainedModel:
    """A sliding window that the cache does not reach."""
    model.config.sliding_window = 64
    for layer in model.model.layers:
        if layer.self_attn.sliding_window:
            layer.self_attn.sliding_window = 64
    return model


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": llama,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gemma2": lambda: with_wide_windows(gemma2()),
    "gpt_oss": lambda: with_wide_windows(gpt_oss()),
}


@pytest.fixture(autouse=True)
def _compiled_afresh() -> Iterator[None]:
    trace = logging.getLogger("torch.__trace")
    propagate, trace.propagate = trace.propagate, False
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()
    trace.propagate = propagate


Step = Callable[..., Any]


def static_cache(model: PreTrainedModel) -> StaticCache:
    return StaticCache(config=model.config, max_cache_len=CACHE)


def prefill(model: PreTrainedModel, cache: StaticCache, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Runs three prompts with images, padded on the left; their last logits and positions."""
    ids, mask = left_padded(seed=seed, image=True)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    return out.logits[:, -1], positions[:, -1:]


def next_step(step: Step, cache: StaticCache, tokens: Tensor, positions: Tensor, seed: int = 0) -> Tensor:
    """Logits of one decode step; the 2-D mask is as long as the cache, as a graph needs it."""
    _, mask = left_padded(seed=seed)
    mask = functional.pad(mask, (0, CACHE - mask.shape[1]), value=1)
    return step(input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache).logits[:, -1]


def decoded(model: PreTrainedModel, step: Step, cache: StaticCache | None = None, seed: int = 0) -> Tensor:
    """Logits ``(B, NEW_TOKENS, vocabulary)`` of greedy steps after a prompt that runs in eager."""
    cache = static_cache(model) if cache is None else cache
    last, positions = prefill(model, cache, seed)
    found = []
    for _ in range(NEW_TOKENS):
        positions = positions + 1
        last = next_step(step, cache, last.argmax(-1, keepdim=True), positions, seed)
        found.append(last)
    return torch.stack(found, 1)


def in_one_graph(model: PreTrainedModel, backend: str = "eager") -> Step:
    return torch.compile(model.forward, fullgraph=True, backend=backend)


@contextlib.contextmanager
def refused(*words: str) -> Iterator[None]:
    with pytest.raises(Exception, match="static-step") as caught:
        yield
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("edits", EDITS.values(), ids=EDITS)
def test_every_edit_in_one_graph(edits: tuple[Edit, ...]) -> None:
    model = attn_hooks.wrap(llama(), *edits)
    expected = decoded(model, model)
    assert edits == () or not torch.equal(expected, decoded(model_without := llama(), model_without))
    assert torch.equal(decoded(model, in_one_graph(model)), expected)


@pytest.mark.parametrize("name", ["act, some heads", "pasta"])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "llama"])
def test_every_family_in_one_graph(family: str, name: str) -> None:
    model = attn_hooks.wrap(FAMILIES[family](), *EDITS[name])
    expected = decoded(model, model)
    assert expected.isfinite().all()
    assert torch.equal(decoded(model, in_one_graph(model, "aot_eager")), expected)


@pytest.mark.parametrize("name", ["none", "act, some heads"])
def test_the_eager_backend_of_a_model(name: str) -> None:
    """Its mask is additive."""
    model = llama(torch.float32)
    model.set_attn_implementation("eager")
    attn_hooks.wrap(model, *EDITS[name])
    assert torch.equal(decoded(model, in_one_graph(model)), decoded(model, model))


def test_inductor() -> None:
    model = attn_hooks.wrap(llama(num_hidden_layers=2), ACT(beta=0.1, alpha=1.1, layers=(0, 1)), SinkScale(scale=4.0))
    torch.testing.assert_close(decoded(model, in_one_graph(model, "inductor")), decoded(model, model))


def test_generate_compiles_its_steps() -> None:
    ids, mask = left_padded()
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": NEW_TOKENS, "do_sample": False}
    model = attn_hooks.wrap(llama(), PASTA_EDIT)
    expected = model.generate(ids, **options)
    counted = attn_hooks.report(model).edits[0].calls["decode"]
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True
    found = model.generate(ids, cache_implementation="static", compile_config=config, **options)
    assert torch.equal(found, expected)
    report = attn_hooks.report(model)
    # Nobody counts compiled steps, and the report says so.
    assert report.edits[0].calls["decode"] == counted
    assert "decode: compiled or captured in layers 0-4 (neither counted nor measured)" in str(report)


def test_one_graph_serves_later_prompts() -> None:
    model = attn_hooks.wrap(llama(), ACT(beta=0.1, alpha=1.1))
    compiled = in_one_graph(model)
    expected = [decoded(model, model, seed=seed) for seed in range(3)]
    assert not torch.equal(expected[0], expected[1])
    torch._dynamo.utils.counters.clear()
    graphs = torch._dynamo.utils.counters["stats"]
    assert torch.equal(decoded(model, compiled, seed=0), expected[0])
    compiled_once = graphs["unique_graphs"]
    assert torch.equal(decoded(model, compiled, seed=1), expected[1])
    cache = static_cache(model)
    assert torch.equal(decoded(model, compiled, cache, seed=2), expected[2])
    cache.reset()
    assert torch.equal(decoded(model, compiled, cache, seed=1), expected[1])
    assert graphs["unique_graphs"] == compiled_once == 1


def test_interleaved_sequences() -> None:
    model = attn_hooks.wrap(llama(), ACT(beta=0.1, alpha=1.1))
    compiled = in_one_graph(model)
    caches = [static_cache(model), static_cache(model)]
    starts = [prefill(model, cache, seed) for seed, cache in enumerate(caches)]
    for seed, (cache, (last, positions)) in enumerate(zip(caches, starts, strict=True)):
        found = next_step(compiled, cache, last.argmax(-1, keepdim=True), positions + 1, seed)
        assert torch.equal(found, decoded(model, model, seed=seed)[:, 0])


def test_edits_that_change_and_go() -> None:
    model = attn_hooks.wrap(llama(), SinkScale(scale=4.0))
    compiled = in_one_graph(model)
    for scale in (4.0, 0.2):
        attn_hooks.wrap(model, SinkScale(scale=scale))
        assert torch.equal(decoded(model, compiled), decoded(model, model))
    with attn_hooks.editing(model, Ablate(heads=((1, 2),))):
        inside = decoded(model, compiled)
        assert torch.equal(inside, decoded(model, model))
    outside = decoded(model, compiled)
    assert torch.equal(outside, decoded(model, model))
    attn_hooks.unwrap(model)
    plain = decoded(model, compiled)
    assert torch.equal(plain, decoded(model, model))
    assert not torch.equal(inside, outside) and not torch.equal(outside, plain)


def test_eager_steps_between_compiled_ones() -> None:
    model = attn_hooks.wrap(llama(), ACT(beta=0.1, alpha=1.1), Streaming(sinks=1, window=4, layers=(0,)))
    compiled, taken = in_one_graph(model), []

    def step(**inputs: Any) -> Any:
        taken.append(len(taken) % 2)
        return (compiled if taken[-1] else model)(**inputs)

    assert torch.equal(decoded(model, step), decoded(model, model))


@pytest.mark.parametrize(("edit", "eager_steps"), [(EachStep(scale=4.0), NEW_TOKENS), (Watching(by_tap=False), 1)])
def test_without_fullgraph_a_refused_step_runs_in_eager(edit: Edit, eager_steps: int) -> None:
    """What reads the weights of the first step settles in it, and the steps after it compile."""
    model = attn_hooks.wrap(llama(), edit)
    compiled = torch.compile(model.forward, backend="eager")
    found = decoded(model, compiled)
    assert attn_hooks.report(model).edits[0].calls["decode"] == eager_steps * NUM_LAYERS
    assert torch.equal(found, decoded(model, model))


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (EachStep(), "each_step is asked anew at every step"),
        (Watching(by_tap=True), "a Tap reads its weights"),
        (Watching(by_tap=False), "reads the first step itself"),
        (ACT(alpha=1.1, faithful="code"), "[phase]"),
        (SinkScale(scale=4.0, sinks=6), "tokens to come can still join"),
    ],
    ids=["each step", "tap", "own weights", "undefined in decode", "not settled"],
)
def test_edits_that_cannot_be_settled_are_refused(edit: Edit, words: str) -> None:
    model = attn_hooks.wrap(llama(), edit)
    cache = static_cache(model)
    last, positions = prefill(model, cache)
    with refused("LlamaForCausalLM", words):
        next_step(in_one_graph(model), cache, last.argmax(-1, keepdim=True), positions + 1)


def test_an_edit_that_settles_in_decode() -> None:
    """The shortest prompt has 4 tokens, and the sinks are there after the second step."""
    model = attn_hooks.wrap(llama(), SinkScale(scale=4.0, sinks=6))
    compiled, taken = in_one_graph(model), []

    def step(**inputs: Any) -> Any:
        taken.append(inputs)
        return (compiled if len(taken) > 2 else model)(**inputs)

    assert torch.equal(decoded(model, step), decoded(model, model))


def test_a_step_that_hides_the_image_from_a_settled_ranking_is_refused() -> None:
    model = attn_hooks.wrap(llama(), SPIN(r=0.5, eps=0.1))
    cache = static_cache(model)
    compiled = in_one_graph(model)
    last, positions = prefill(model, cache)
    step = {"input_ids": last.argmax(-1, keepdim=True), "past_key_values": cache}
    ids, mask = left_padded(image=True)

    def without(token: int) -> Tensor:
        return functional.pad(mask * (ids != token), (0, CACHE - mask.shape[1]), value=1)

    compiled(**step, attention_mask=without(20), position_ids=positions + 1)
    with pytest.raises(RuntimeError, match="hides image keys"):
        compiled(**step, attention_mask=without(IMAGE), position_ids=positions + 2)


def test_a_cache_that_drops_keys_is_refused() -> None:
    model = attn_hooks.wrap(gemma2(), SinkScale(scale=4.0))
    cache = static_cache(model)
    last, positions = prefill(model, cache)
    with refused("the cache of layer 0 drops keys; give it fewer tokens than the window of 6"):
        next_step(in_one_graph(model), cache, last.argmax(-1, keepdim=True), positions + 1)


class TestStale:
    """A cache whose prompt the edits in force have not seen."""

    @pytest.fixture
    def model(self) -> PreTrainedModel:
        return attn_hooks.wrap(llama(), SinkScale(scale=4.0))

    @pytest.fixture
    def compiled(self, model: PreTrainedModel) -> Step:
        """Compiled already, in one graph."""
        compiled = in_one_graph(model)
        decoded(model, compiled)
        return compiled

    @staticmethod
    def any_step(step: Step, cache: Any, batch: int = 3, length: int = 1) -> Tensor:
        tokens = torch.full((batch, length), 5)
        mask = torch.ones(batch, CACHE, dtype=torch.long)
        return step(input_ids=tokens, attention_mask=mask, position_ids=tokens * 0, past_key_values=cache).logits

    def test_no_prompt(self, model: PreTrainedModel, compiled: Step) -> None:
        with refused("no prompt with this static cache has run in eager"):
            self.any_step(compiled, static_cache(model))

    def test_after_a_reset(self, model: PreTrainedModel, compiled: Step) -> None:
        cache = static_cache(model)
        prefill(model, cache)
        self.any_step(compiled, cache)
        cache.reset()
        with pytest.raises(RuntimeError, match="another sequence"):
            self.any_step(compiled, cache)

    def test_a_prompt_under_other_edits(self, model: PreTrainedModel, compiled: Step) -> None:
        cache = static_cache(model)
        prefill(model, cache)
        attn_hooks.wrap(model, SinkScale(scale=4.0))
        with refused("no prompt with this static cache has run in eager"):
            self.any_step(compiled, cache)

    def test_a_prompt_inside_editing(self, model: PreTrainedModel, compiled: Step) -> None:
        """The outer edits have seen this cache, but another prompt in it."""
        cache = static_cache(model)
        prefill(model, cache)
        cache.reset()
        with attn_hooks.editing(model, Ablate(heads=((1, 2),))):
            prefill(model, cache, seed=1)
        with refused("no prompt with this static cache has run in eager"):
            self.any_step(compiled, cache)

    def test_another_batch(self, model: PreTrainedModel, compiled: Step) -> None:
        cache = static_cache(model)
        prefill(model, cache)
        with refused("the cache holds 3 sequences and this call has 2"):
            self.any_step(compiled, cache, batch=2)

    def test_gradients(self, model: PreTrainedModel, compiled: Step) -> None:
        cache = static_cache(model)
        prefill(model, cache)
        with torch.enable_grad(), refused("it would need gradients"):
            self.any_step(compiled, cache)

    @pytest.mark.parametrize("length", [1, 4])
    def test_prompts_do_not_compile_in_one_graph(self, model: PreTrainedModel, compiled: Step, length: int) -> None:
        cache = DynamicCache() if length == 1 else static_cache(model)
        with pytest.raises(torch._dynamo.exc.Unsupported, match="only decode steps with a static cache"):
            self.any_step(compiled, cache, length=length)


@pytest.fixture
def with_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settled edits go to the kernels, on the device that tests run on."""
    monkeypatch.setattr(engine, "has_kernels", lambda inputs: True)
    monkeypatch.setattr(dispatch, "on_gpu", lambda inputs: True)


@pytest.mark.parametrize("name", KERNEL_EDITS)
def test_the_kernel_in_one_graph(name: str, with_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = attn_hooks.wrap(llama(torch.float32, num_hidden_layers=4), *kernel_edits(name))
    cache = static_cache(model)
    last, positions = prefill(model, cache)
    settled = static_step_of(cache).layers.values()
    assert settled and all(step.by_kernel for step in settled)
    found = next_step(in_one_graph(model), cache, last.argmax(-1, keepdim=True), positions + 1)
    monkeypatch.undo()
    cache = static_cache(model)
    prefill(model, cache)
    expected = next_step(model, cache, last.argmax(-1, keepdim=True), positions + 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def static_step_of(cache: StaticCache) -> sequence.StaticStep:
    """Of the edits that saw the cache's prompt last."""
    return list(getattr(cache, sequence.STATES_ATTRIBUTE).values())[-1].static_step


def kernel_edits(name: str) -> tuple[Edit, ...]:
    return (HeadAffine(gain=GAIN[:4]),) if name == "head_affine" else EDITS[name]


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Makes forwards take the way of a capture, or end that."""
    now = [False]
    for module in (sequence, attn_hooks.interface):
        monkeypatch.setattr(module, "is_captured", lambda _: now[0])
    return lambda wanted: now.__setitem__(0, wanted)


def test_what_a_capture_reads_moves_with_the_prompt(with_kernels: None, captured: Callable[[bool], None]) -> None:
    """A captured graph reads addresses: the next prompt on its cache writes there, and what cannot follow gives NaN."""
    model = attn_hooks.wrap(llama(torch.float32), ACT(beta=0.1, alpha=1.1, layers=(0, 2, 3)))
    cache = static_cache(model)
    last, positions = prefill(model, cache)
    step = static_step_of(cache)
    tensors = {id(tensor) for settled in step.layers.values() for tensor in settled.tensors}
    captured(True)
    next_step(model, cache, last.argmax(-1, keepdim=True), positions + 1)
    kept = list(step.captured.values())
    assert len(kept) == 3
    captured(False)
    cache.reset()
    last, positions = prefill(model, cache, seed=1)
    layers = static_step_of(cache).layers.values()
    assert {id(tensor) for settled in layers for tensor in settled.tensors} == tensors
    captured(True)
    found = next_step(model, cache, last.argmax(-1, keepdim=True), positions + 1, seed=1)
    captured(False)
    torch.testing.assert_close(found, decoded(model, model, seed=1)[:, 0], rtol=1e-4, atol=1e-4)
    attn_hooks.wrap(model, SinkScale(scale=4.0))
    cache.reset()
    prefill(model, cache)
    assert all(
        any(tensor.isnan().any() for tensor in settled.tensors if tensor.is_floating_point()) for settled in kept
    )


def test_a_capture_of_other_forwards_is_refused(captured: Callable[[bool], None]) -> None:
    model = attn_hooks.wrap(llama(), SinkScale(scale=4.0))
    cache = static_cache(model)
    captured(True)
    with refused("it has several tokens"):
        prefill(model, cache)
    captured(False)
    last, positions = prefill(model, cache)
    captured(True)
    with refused("no kernel computes its edits"):
        next_step(model, cache, last.argmax(-1, keepdim=True), positions + 1)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
@pytest.mark.parametrize("name", KERNEL_EDITS)
def test_cuda_graph_replay(name: str) -> None:
    """One graph, captured by hand after one prompt, replayed for it and for a second one on the same cache."""
    with torch.device("cuda"):
        model = attn_hooks.wrap(llama(torch.float32, num_hidden_layers=4).cuda(), *kernel_edits(name))
        expected = [decoded(model, model, seed=seed) for seed in range(2)]
        cache = static_cache(model)
        last, positions = prefill(model, cache)
        tokens, positions = last.argmax(-1, keepdim=True), positions + 1
        _, mask = left_padded()
        mask = functional.pad(mask, (0, CACHE - mask.shape[1]), value=1)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = model(
                input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache
            ).logits[:, -1]
        for seed in range(2):
            if seed:
                cache.reset()
                last, first = prefill(model, cache, seed)
                positions.copy_(first + 1)
            for place in range(NEW_TOKENS):
                tokens.copy_(last.argmax(-1, keepdim=True))
                graph.replay()
                last = replayed.clone()
                torch.testing.assert_close(last, expected[seed][:, place], rtol=1e-4, atol=1e-4)
                assert torch.equal(last.argmax(-1), expected[seed][:, place].argmax(-1))
                positions += 1


@needs_gpu
@pytest.mark.parametrize("name", ["pasta", "act", "gated_regroup", "streaming"])
def test_generate_with_its_own_compilation(name: str) -> None:
    """generate() compiles the steps of a static cache by itself on a GPU, for replay from CUDA graphs."""
    with torch.device("cuda"):
        model = attn_hooks.wrap(llama(torch.float32).cuda(), *EDITS[name])
        for seed in range(2):
            ids, mask = left_padded(seed=seed)
            options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": NEW_TOKENS, "do_sample": False}
            expected = model.generate(ids, **options)
            assert torch.equal(model.generate(ids, cache_implementation="static", **options), expected)
        assert "compiled or captured" in str(attn_hooks.report(model))
