"""Methods with a second stream, held to two independent models that run without a cache."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache

import attn_hooks
from attn_hooks import AGLA, DAMRO, PAI, VHR, Opera, streams
from attn_hooks.errors import AttnHooksError
from attn_hooks.methods.vcd import VCD, signal_kept
from attn_hooks.model_info import MARKS_OF_IMAGE
from tests.hooks import vlms

# A prefix LM is not edited, cross attention and embedding outside the forward are refused.
FAMILIES = sorted(set(vlms.CASES) - {"paligemma", "blip-2", "instructblip"})
NEW = 5


def literal_cutoff(main: Tensor, combined: Tensor, beta: float) -> Tensor:
    bound = main.max(-1, keepdim=True).values + (math.log(beta) if beta else -math.inf)
    return torch.where(main < bound, -math.inf, combined)


def logits_of(model: Any, inputs: dict[str, Any], tokens: Tensor) -> Tensor:
    """Next-token logits ``(B, V)`` after the prompt and ``tokens`` ``(B, t)``, by one forward without a cache."""
    given = dict(inputs)
    given["input_ids"] = torch.cat([inputs["input_ids"], tokens], 1)
    given["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(tokens)], 1)
    if "mm_token_type_ids" in inputs:
        given["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(tokens)], 1)
    return model(**given, use_cache=False).logits[:, -1]


def literal_generation(
    model: Any, inputs: dict[str, Any], second: dict[str, Any], combine: Callable[[Tensor, Tensor], Tensor], beta: float
) -> tuple[Tensor, list[Tensor]]:
    """Greedy tokens ``(B, NEW)``, and the logits of each step; prompts without an image keep their own."""
    has_image = torch.tensor([any(number is not None for _, number in row) for row in CURRENT.rows])[:, None]
    tokens, steps = inputs["input_ids"][:, :0], []
    for _ in range(NEW):
        main, other = logits_of(model, inputs, tokens), logits_of(model, second, tokens)
        steps.append(torch.where(has_image, literal_cutoff(main, combine(main, other), beta), main))
        tokens = torch.cat([tokens, steps[-1].argmax(-1, keepdim=True)], 1)
    return tokens, steps


CURRENT = vlms.CASES["llava"]


def generated(model: Any, inputs: dict[str, Any], **more: Any) -> Any:
    return model.generate(
        **inputs,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **more,
    )


def noised(inputs: dict[str, Any], edit: VCD) -> dict[str, Any]:
    changed = dict(inputs)
    for name, grids in (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw")):
        if name in inputs:
            changed[name] = edit.noised(inputs[name], inputs.get(grids))
    return changed


@pytest.mark.parametrize(("beta", "skip"), [(0.0, False), (0.9, False), (0.9, True)])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_vcd_is_two_independent_streams(family: str, beta: float, skip: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three prompts, padded: two images or more, none, one. A high cutoff skips many steps."""
    monkeypatch.setitem(globals(), "CURRENT", vlms.CASES[family])
    model, inputs, edit = CURRENT.model(), CURRENT.inputs(), VCD(alpha=0.7, beta=beta, step=800, skip=skip)
    before = model(**inputs).logits
    expected, steps = literal_generation(
        model, inputs, noised(inputs, edit), lambda main, other: 1.7 * main - 0.7 * other, beta
    )
    forwards: list[nn.Module] = []
    counting = model.register_forward_pre_hook(lambda module, _: forwards.append(module))
    with attn_hooks.editing(model, edit):
        found = generated(model, inputs)
    counting.remove()
    if beta == 0:
        # Two prompts, and from then on one forward for both streams.
        assert len(forwards) == NEW + 1
    assert torch.equal(found.sequences[:, -NEW:], expected)
    for step, logits in zip(steps, found.logits, strict=True):
        # Of a token that is certain only that counts.
        torch.testing.assert_close(logits.log_softmax(-1), step.log_softmax(-1), rtol=1e-3, atol=1e-4)
    assert torch.equal(model(**inputs).logits, before)


def text_alone(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The prompts without their images and the tokens that the config says open and close them."""
    marks = {getattr(model.config, name, None) for name in MARKS_OF_IMAGE}
    return vlms.batch_of(
        [[token for token in row if token[1] is None and token[0] not in marks] for row in CURRENT.rows]
    )


@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_guidance_is_against_the_text_alone(family: str, beta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second stream is a text prompt of its own, without the edit of the attention."""
    monkeypatch.setitem(globals(), "CURRENT", vlms.CASES[family])
    model, inputs = CURRENT.model(), CURRENT.inputs()
    attention, gamma = PAI(gamma=1.0, alpha=0.5, layers=(0, 1)), 1.4
    text = text_alone(model, inputs)
    texts: list[Tensor] = []
    has_image = torch.tensor([any(number is not None for _, number in row) for row in CURRENT.rows])[:, None]
    tokens = inputs["input_ids"][:, :0]
    for _ in range(NEW):
        texts.append(logits_of(model, text, tokens).log_softmax(-1))
        with attn_hooks.editing(model, attention):
            prompt = {**inputs, "max_new_tokens": NEW + 1, "min_new_tokens": NEW + 1}
            main = forced(model, prompt, tokens).log_softmax(-1)
        guided = literal_cutoff(main, gamma * (main - texts[-1]) + texts[-1], beta)
        step = torch.where(has_image, guided, main)
        tokens = torch.cat([tokens, step.argmax(-1, keepdim=True)], 1)
    with attn_hooks.editing(model, PAI(alpha=0.5, layers=(0, 1), gamma=gamma, plausibility=beta)):
        found = generated(model, inputs)
    assert torch.equal(found.sequences[:, -NEW:], tokens)
    torch.testing.assert_close(found.logits[-1].log_softmax(-1), step.log_softmax(-1), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_guidance_of_a_scored_prompt_knows_no_neighbours(side: str) -> None:
    """Texts of several lengths after, before and without an image: each token's logits in one forward, whatever the padding. Where
    the image ends the text before it tells the next token."""
    model, square = vlms.CASES["llava"].model(), vlms.image(vlms.SQUARE, 0)
    before = [vlms.BEGIN, vlms.BEGIN + vlms.text(2), vlms.BEGIN + vlms.text(3), vlms.BEGIN]
    after = [vlms.text(30), vlms.text(5, 9), [], vlms.text(2)]
    rows = [first + square + last for first, last in zip(before[:3], after[:3], strict=True)] + [before[3] + after[3]]
    inputs = {**vlms.batch_of(rows, side), **vlms.three_images()}
    with attn_hooks.editing(model, PAI(alpha=0.0, layers=(0,), gamma=1.4, plausibility=0.0)):
        found = model(**inputs).logits.log_softmax(-1)
        last = model(**inputs, logits_to_keep=1).logits.log_softmax(-1)
    torch.testing.assert_close(last[:, 0], found[:, -1], rtol=1e-4, atol=1e-4)
    for sample, row in enumerate(rows):
        begin = len(rows[0]) - len(row) if side == "left" else 0
        pixels = {} if sample == 3 else {"pixel_values": inputs["pixel_values"][sample : sample + 1]}
        main = model(**vlms.batch_of([row]), **pixels).logits[0].log_softmax(-1)
        if sample < 3:
            text = model(**vlms.batch_of([before[sample] + after[sample]])).logits[0].log_softmax(-1)
            guided = slice(len(before[sample]) + vlms.SQUARE - 1, None)
            text = text[len(before[sample]) - 1 :]
            main[guided] = (1.4 * (main[guided] - text) + text).log_softmax(-1)
        torch.testing.assert_close(found[sample, begin : begin + len(row)], main, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_damro_is_against_the_patches_that_the_tower_looks_at() -> None:
    """The second prompt by hand: its image features are those of three patches, as the tower's own eager weights say."""
    case = vlms.CASES["llava"]
    model, inputs = case.model(), {name: value[2:] for name, value in case.inputs().items()}
    edit = DAMRO(alpha=0.8, beta=0.0, tokens=3)
    tower = model.model.vision_tower
    tower.set_attn_implementation("eager")
    weights = tower(inputs["pixel_values"], output_attentions=True).attentions[-2]
    strongest = weights.sum(1)[0, 0, 1:].topk(3).indices
    is_image = inputs["input_ids"][0] == vlms.IMAGE
    kept = inputs["attention_mask"][0].bool() & ~is_image
    kept[is_image.nonzero().squeeze(-1)[strongest]] = True
    features = model.model.get_image_features(inputs["pixel_values"]).pooler_output[0]
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    embeddings[0, is_image] = features
    tokens = inputs["input_ids"][:, :0]
    for _ in range(NEW):
        more = model.get_input_embeddings()(tokens)
        other = model(inputs_embeds=torch.cat([embeddings[:, kept], more], 1), use_cache=False).logits[:, -1]
        step = 1.8 * logits_of(model, inputs, tokens) - 0.8 * other
        tokens = torch.cat([tokens, step.argmax(-1, keepdim=True)], 1)
    with attn_hooks.editing(model, edit):
        found = generated(model, inputs)
    assert torch.equal(found.sequences[:, -NEW:], tokens)
    torch.testing.assert_close(found.logits[-1], step, rtol=1e-3, atol=1e-4)


def forced(model: Any, inputs: dict[str, Any], tokens: Tensor) -> Tensor:
    """Logits of the step after ``tokens`` ``(B, t)``, which generate() is made to take."""
    prompt = inputs["input_ids"].shape[1]

    def allowed(row: int, ids: Tensor) -> list[int]:
        place = len(ids) - prompt
        return [int(tokens[row, place])] if place < tokens.shape[1] else list(range(vlms.VOCAB_SIZE))

    found = model.generate(
        **inputs,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        prefix_allowed_tokens_fn=lambda row, ids: allowed(int(row), ids),
    )
    logits: Tensor = found.logits[tokens.shape[1]]
    return logits


def test_the_noise_is_the_paper_s() -> None:
    """Variance is kept, an early step hardly changes a pixel, and each image gets the same noise."""
    pixels = torch.full((2, 3, 64, 64), 1e-6)
    found = VCD(step=500).noised(pixels)
    assert torch.equal(found[0], found[1])
    assert found.std() == pytest.approx(math.sqrt(1 - signal_kept(500)), rel=0.02)
    kept = 1.0
    for t in range(501):
        kept *= 1 - (1 / (1 + math.exp(-(-6 + 12 * t / 999))) * (5e-3 - 1e-5) + 1e-5)
    assert signal_kept(500) == pytest.approx(kept, rel=1e-6)
    assert not torch.equal(VCD(seed=1).noised(pixels), found)


@torch.no_grad()
def test_flattened_images_get_the_noise_that_they_get_alone() -> None:
    """Beams repeat the patches of an image, and its neighbours in a batch may be of another size."""
    edit = VCD(step=500)
    patches = vlms.pixels(4 + 6 + 4, 24)
    found = edit.noised(patches, torch.tensor([[1, 2, 2], [1, 2, 3], [1, 2, 2]]))
    expected = torch.cat([edit.noised(image) for image in (patches[:4], patches[4:10], patches[10:])])
    assert torch.equal(found, expected)
    assert not torch.equal(found, edit.noised(patches))


def test_cudnn_is_back_when_the_last_thread_is_done() -> None:
    """Its switch is the whole process', and the thread that came first may leave first."""
    assert torch.backends.cuda.cudnn_sdp_enabled()
    first, second = streams._without_plans(), streams._without_plans()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    second.__exit__(None, None, None)
    assert torch.backends.cuda.cudnn_sdp_enabled()


@torch.no_grad()
def test_alpha_0_and_beta_0_change_nothing() -> None:
    model, inputs = vlms.CASES["llava"].model(), vlms.CASES["llava"].inputs()
    before = model(**inputs).logits
    with attn_hooks.editing(model, VCD(alpha=0.0, beta=0.0)):
        torch.testing.assert_close(model(**inputs).logits, before)


@torch.no_grad()
def test_the_skip_changes_no_token() -> None:
    """The cutoff leaves one token in some steps; the second stream catches up later."""
    model, inputs = vlms.CASES["llava"].model(), vlms.CASES["llava"].inputs()
    model.lm_head.weight *= 60
    one = {name: value[2:] for name, value in inputs.items()}
    edit = VCD(alpha=2.0, beta=0.5, skip=True)
    with attn_hooks.editing(model, edit):
        found = model.generate(**one, max_new_tokens=24, min_new_tokens=24, do_sample=False)
        (report,) = attn_hooks.report(model).edits
    skipped = report.second_stream_skipped
    assert skipped is not None
    assert 0 < skipped < 1
    tokens = one["input_ids"][:, :0]
    for _ in range(24):
        main, other = logits_of(model, one, tokens), logits_of(model, noised(one, edit), tokens)
        step = literal_cutoff(main, 3 * main - 2 * other, 0.5)
        tokens = torch.cat([tokens, step.argmax(-1, keepdim=True)], 1)
    assert torch.equal(found[:, -24:], tokens)


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
@torch.no_grad()
def test_a_step_that_fails_leaves_the_cache_its_rows(failure: type[BaseException]) -> None:
    model, inputs = vlms.CASES["llava"].model(), vlms.CASES["llava"].inputs()

    def fail(_module: nn.Module, _args: Any) -> None:
        raise failure

    step = {"input_ids": torch.full((3, 1), 5), "position_ids": torch.full((3, 1), 9)}
    with attn_hooks.editing(model, VCD(alpha=0.7, beta=0.0)):
        cache = model(**inputs).past_key_values
        model(**step, past_key_values=cache)
        failing = model.get_submodule("model.language_model.layers.1").register_forward_pre_hook(fail)
        with pytest.raises(failure):
            model(**step, past_key_values=cache)
        failing.remove()
        copied = copy.deepcopy(cache)
        cache.reorder_cache(torch.arange(3))
        copied.reorder_cache(torch.arange(3))
        expected = generated(model, inputs).sequences
        assert all(len(layer.keys) == len(layer.values) == 3 for layer in (*cache.layers, *copied.layers))
        assert streams._plans.refusing == 0
    with attn_hooks.editing(model, VCD(alpha=0.7, beta=0.0)):
        assert torch.equal(generated(model, inputs).sequences, expected)
        cache = model(**inputs).past_key_values
        failing = model.get_submodule("model.language_model.layers.1").register_forward_pre_hook(fail)
        with pytest.raises(failure):
            model(**step, past_key_values=cache)
    failing.remove()
    assert all(len(layer.keys) == len(layer.values) == 3 for layer in cache.layers), "unwrapped right after it"
    assert streams._plans.refusing == 0


@pytest.mark.parametrize(
    "edit",
    [VCD(beta=0.0), VCD(beta=0.9, skip=True), PAI(layers=(0, 1)), Opera()],
    ids=["in step", "skip", "pai", "opera"],
)
@torch.no_grad()
def test_a_cache_is_free_as_soon_as_nobody_has_it(edit: Any) -> None:
    """It holds both streams' keys and values, for which the garbage collector may come too late."""
    model, inputs = vlms.CASES["llava"].model(), vlms.CASES["llava"].inputs()
    gc.collect()
    gc.disable()
    try:
        with attn_hooks.editing(model, edit):
            output = generated(model, inputs)
            cache = weakref.ref(output.past_key_values)
            del output
            assert cache() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("skip", [False, True])
@torch.no_grad()
def test_a_copied_cache_goes_its_own_way(skip: bool) -> None:
    model, inputs = vlms.CASES["llava"].model(), vlms.CASES["llava"].inputs()

    def step(cache: Any, token: int) -> Tensor:
        mask = inputs["attention_mask"]
        mask = functional.pad(mask, (0, cache.get_seq_length() + 1 - mask.shape[1]), value=1)
        return model(input_ids=torch.full((3, 1), token), attention_mask=mask, past_key_values=cache).logits

    with attn_hooks.editing(model, VCD(alpha=0.7, beta=0.0, skip=skip)):
        cache = model(**inputs).past_key_values
        step(cache, 5)
        other = copy.deepcopy(cache)
        other.reorder_cache(torch.tensor([2, 1, 0]))
        found = step(cache, 6)
        swapped = step(other, 6)
        again = model(**inputs).past_key_values
        step(again, 5)
        torch.testing.assert_close(found, step(again, 6))
        assert not torch.allclose(swapped[0], found[0])


@torch.no_grad()
def test_beams_take_the_second_stream_with_them() -> None:
    """One image a prompt; the score of the best beam is that of a literal rescoring."""
    case = vlms.CASES["llava"]
    model, inputs, edit = case.model(), case.inputs(), VCD(alpha=0.5, beta=0.0)
    one = {name: value[2:] for name, value in inputs.items()}
    with attn_hooks.editing(model, edit):
        found = model.generate(
            **one,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            num_beams=3,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
            length_penalty=0.0,
        )
    tokens = found.sequences[:, -NEW:]
    score = 0.0
    for step in range(NEW):
        main, other = logits_of(model, one, tokens[:, :step]), logits_of(model, noised(one, edit), tokens[:, :step])
        score += float((1.5 * main - 0.5 * other).log_softmax(-1)[0, tokens[0, step]])
    assert float(found.sequences_scores[0]) == pytest.approx(score, abs=1e-3)


@pytest.mark.parametrize(("family", "sharper"), [("llava", 60), ("gemma3", 8)])
@torch.no_grad()
def test_beams_take_steps_that_wait_with_them(family: str, sharper: int) -> None:
    """Gemma 3's generate() hands its forward arguments that are None. Without a cache nothing waits."""
    model, inputs = vlms.CASES[family].model(), vlms.CASES[family].inputs()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight * sharper)
    one = {name: value[2:] for name, value in inputs.items()}
    beams = {"num_beams": 2, "max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    with attn_hooks.editing(model, VCD(alpha=2.0, beta=0.5, skip=True)):
        found = model.generate(**one, **beams)
        (report,) = attn_hooks.report(model).edits
        expected = model.generate(**one, **beams, use_cache=False)
    assert report.second_stream_skipped is not None
    assert 0 < report.second_stream_skipped < 1
    assert torch.equal(found, expected)


@torch.no_grad()
def test_steps_that_wait_keep_their_finished_masks() -> None:
    """Taken in one forward later, each sees the keys up to itself, as under a mask of padding."""
    model, inputs = vlms.CASES["llava"].model(), vlms.CASES["llava"].inputs()
    model.lm_head.weight *= 30
    one = {name: value[2:] for name, value in inputs.items()}

    def logits_of_steps(finished: bool) -> Tensor:
        cache, mask, found = DynamicCache(config=model.config.get_text_config()), one["attention_mask"], []
        model(**one, past_key_values=cache)
        for token in range(5, 53, 3):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            step = {"input_ids": torch.tensor([[token]]), "position_ids": (mask.cumsum(1) - 1)[:, -1:]}
            given = mask.bool()[:, None, None] if finished else mask
            found.append(model(**step, attention_mask=given, past_key_values=cache).logits)
        return torch.cat(found)

    for parameter in model.model.language_model.parameters():
        parameter *= 1.5
    with attn_hooks.editing(model, VCD(alpha=2.0, beta=0.5, skip=True)):
        found, expected = logits_of_steps(finished=True), logits_of_steps(finished=False)
        (report,) = attn_hooks.report(model).edits
    assert report.second_stream_skipped is not None
    assert 0 < report.second_stream_skipped < 1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def refused(code: str, action: Callable[[], Any]) -> None:
    with pytest.raises(AttnHooksError) as refusal:
        action()
    assert refusal.value.code == code


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_several_sequences_of_a_prompt_see_its_images(family: str) -> None:
    """Of prompts with several images, none and one: without an effect of its own the method leaves beams as they are, though it
    has the pixels come to the forward; with one, each beam has what its prompt has without beams."""
    case = vlms.CASES[family]
    model, inputs = case.model(), case.inputs()
    two = {"max_new_tokens": 2, "output_logits": True, "return_dict_in_generate": True, "do_sample": False}
    several = {**two, "num_beams": 2, "num_return_sequences": 2}
    plain = model.generate(**inputs, **several)
    with attn_hooks.editing(model, VCD(alpha=0.0, beta=0.0)):
        found = model.generate(**inputs, **several)
    assert torch.equal(found.sequences, plain.sequences)
    torch.testing.assert_close(found.logits, plain.logits)
    with attn_hooks.editing(model, VCD(alpha=0.7, beta=0.0)):
        alone = model.generate(**inputs, **two).logits[0]
        found = model.generate(**inputs, **several).logits[0]
    assert not torch.allclose(alone, plain.logits[0][::2])
    torch.testing.assert_close(found, alone.repeat_interleave(2, 0), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_equal_prompts_side_by_side_are_no_beams() -> None:
    """A batch that asks the same of several pairs of images."""
    case = vlms.CASES["llava"]
    inputs = {**vlms.batch_of([case.rows[0]] * 2), "pixel_values": vlms.pixels(4, 3, vlms.PIXELS, vlms.PIXELS)}
    model, edit = case.model(), VCD(beta=0.0)
    expected = 2 * model(**inputs).logits[:, -1] - model(**noised(inputs, edit)).logits[:, -1]
    with attn_hooks.editing(model, edit):
        found = generated(model, inputs)
    torch.testing.assert_close(found.logits[0], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_capture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = vlms.CASES["llava"].model(), vlms.CASES["llava"].inputs()
    monkeypatch.setattr(streams, "is_captured", lambda _logits: True)
    with attn_hooks.editing(model, VCD()):
        refused("stream-captured", lambda: model(**inputs))


@torch.no_grad()
def test_what_cannot_be_followed_is_refused() -> None:
    case = vlms.CASES["llava"]
    model, inputs = case.model(), case.inputs()
    image_alone = {**vlms.batch_of([vlms.image(vlms.SQUARE, 0)]), "pixel_values": inputs["pixel_values"][:1]}
    with attn_hooks.editing(model, PAI(layers=(0,))):
        refused("stream-no-text", lambda: model(**image_alone))
    refused("cannot-compose", lambda: attn_hooks.wrap(model, VCD(), VCD(alpha=0.5)))
    refused("stream-outside", lambda: attn_hooks.wrap(vlms.CASES["blip-2"].model(), VCD()))
    cache = DynamicCache(config=model.config.get_text_config())
    model(**inputs, past_key_values=cache)
    with attn_hooks.editing(model, VCD()):
        refused("stream-training", lambda: model(**inputs, labels=inputs["input_ids"]))
        refused("stream-positions", lambda: model(**inputs, logits_to_keep=torch.tensor([3, 5])))
        odd = {**inputs, "pixel_values": inputs["pixel_values"][[0, 1, 2, 2, 1]]}
        refused("stream-beams", lambda: model.generate(**odd, num_beams=2, max_new_tokens=2))
        step = torch.full((3, 1), 5)
        refused("stream-no-prompt", lambda: model(input_ids=step, past_key_values=cache))
        followed = DynamicCache(config=model.config.get_text_config())
        model(**inputs, past_key_values=followed)
        refused("stream-cache", lambda: followed.crop(-1))
        features = model.model.get_image_features(inputs["pixel_values"])
        text_only = {name: value for name, value in inputs.items() if name != "pixel_values"}
        if "mm_encoder_outputs" in model.forward.__code__.co_varnames:
            refused("no-pixels", lambda: model(**text_only, mm_encoder_outputs={"image": features}))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_chat_on_a_kept_cache_is_the_whole_conversation(family: str) -> None:
    model, inputs = vlms.CASES[family].model(), vlms.CASES[family].inputs()
    turn = torch.randint(3, 80, (3, 4), generator=torch.Generator().manual_seed(1))
    with attn_hooks.editing(model, VCD(alpha=0.7, beta=0.0)):
        answer = generated(model, inputs)
        tokens = torch.cat([answer.sequences[:, -NEW:], turn], 1)
        conversation = {
            "input_ids": torch.cat([inputs["input_ids"], tokens], 1),
            "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(tokens)], 1),
        }
        if "mm_token_type_ids" in inputs:
            kinds = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(tokens)], 1)
            conversation["mm_token_type_ids"] = kinds
        found = generated(model, conversation, past_key_values=answer.past_key_values)
        expected = generated(model, inputs | conversation)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.logits[0], expected.logits[0], rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_a_later_turn_of_text_goes_on_and_one_with_an_image_is_refused() -> None:
    case = vlms.CASES["llava"]
    model, inputs, edit = case.model(), case.inputs(), VCD(alpha=0.7, beta=0.0)
    one = {name: value[2:] for name, value in inputs.items()}
    more = torch.tensor([[7, 8, 9]])
    mask = torch.cat([one["attention_mask"], torch.ones_like(more)], 1)
    positions = (mask.cumsum(1) - 1)[:, -3:]
    with attn_hooks.editing(model, edit):
        cache = DynamicCache(config=model.config.get_text_config())
        model(**one, past_key_values=cache)
        found = model(input_ids=more, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
        pictured = torch.cat([more, torch.full((1, vlms.SQUARE), vlms.IMAGE)], 1)
        refused(
            "stream-later-image",
            lambda: model(input_ids=pictured, pixel_values=one["pixel_values"], past_key_values=cache),
        )
    for place in range(3):
        main, other = (logits_of(model, given, more[:, : place + 1]) for given in (one, noised(one, edit)))
        torch.testing.assert_close(found[:, place], 1.7 * main - 0.7 * other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "edit", [AGLA(beta=0.3, layers=(0, 1)), VCD(beta=0.3), VHR(layers=(0, 1)), PAI(layers=(0, 1))], ids=str
)
@torch.no_grad()
def test_the_ways_to_call_a_model_agree(edit: Any) -> None:
    """Tuples, hidden states, no cache, a copy of the wrapped model, another thread, and after a forward that failed."""
    model, inputs = vlms.CASES["llava"].model(), vlms.CASES["llava"].inputs()
    with attn_hooks.editing(model, edit):
        # Before the first forward: transformers' own hooks, which that adds, cannot be pickled.
        unpickled = pickle.loads(pickle.dumps(model))
        expected = model(**inputs).logits
        torch.testing.assert_close(unpickled(**inputs).logits, expected)
        assert torch.equal(model(**inputs, return_dict=False)[0], expected)
        full = model(**inputs, output_hidden_states=True)
        assert torch.equal(full.logits, expected)
        assert all(len(hidden) == 3 for hidden in full.hidden_states)
        torch.testing.assert_close(model(**inputs, use_cache=False).logits, expected)
        torch.testing.assert_close(copy.deepcopy(model)(**inputs).logits, expected)
        with ThreadPoolExecutor(2) as pool:
            for logits in pool.map(lambda _: model(**inputs).logits, range(4)):
                torch.testing.assert_close(logits, expected)
        with pytest.raises((ValueError, RuntimeError)):
            model(**(inputs | {"pixel_values": inputs["pixel_values"][:1]}))
        assert torch.equal(model(**inputs).logits, expected)
        torch.manual_seed(0)
        sampled = model.generate(**inputs, do_sample=True, num_return_sequences=1, max_new_tokens=4)
        assert sampled.shape[0] == 3


@pytest.mark.parametrize("edit", [VCD(beta=0.3), DAMRO(tokens=3), PAI(layers=(0, 1))], ids=str)
@torch.no_grad()
def test_a_static_cache_gives_the_tokens_of_a_growing_one(edit: Any) -> None:
    """Its finished masks are as long as it is, and tell padding by columns alone."""
    model, inputs = vlms.CASES["llava"].model(), vlms.CASES["llava"].inputs()
    with attn_hooks.editing(model, edit):
        expected = generated(model, inputs)
        found = generated(model, inputs, cache_implementation="static")
    assert torch.equal(found.sequences, expected.sequences)
    for step, logits in zip(expected.logits, found.logits, strict=True):
        torch.testing.assert_close(logits.log_softmax(-1), step.log_softmax(-1), rtol=1e-3, atol=1e-4)
