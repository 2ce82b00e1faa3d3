"""AGLA, held to two greedy loops with a cache each, one on the images and one on images that were masked by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from torch.nn import functional
from transformers import (
    BlipConfig,
    BlipForImageTextRetrieval,
    DynamicCache,
    PreTrainedTokenizerFast,
)

import attn_hooks
from attn_hooks import AGLA, BlipRelevance
from attn_hooks.errors import AttnHooksError
from attn_hooks.methods.agla import NORMALISATION, most_relevant, upsampled
from tests.hooks import vlms

NEW = 32
LLAVA = vlms.CASES["llava"]
LAYERS = (0, 1)
SQUARE_IMAGE = vlms.image(vlms.SQUARE, 0)
# One image each, of three lengths.
ROWS = [
    vlms.BEGIN + vlms.text(3) + SQUARE_IMAGE + vlms.text(4),
    vlms.BEGIN + SQUARE_IMAGE + vlms.text(9, 30),
    vlms.BEGIN + vlms.text(2) + SQUARE_IMAGE + vlms.text(2, 50),
]


def three_prompts() -> dict[str, Any]:
    return vlms.batch_of(ROWS) | vlms.three_images()


def last_prompt(inputs: dict[str, Any]) -> dict[str, Any]:
    """The third alone, with its padding."""
    return {name: value[2:] for name, value in inputs.items()}


def generated(model: Any, inputs: dict[str, Any], new: int = NEW, **more: Any) -> Any:
    settings = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True} | more
    return model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, **settings)


def masked_by_hand(model: Any, inputs: dict[str, Any], edit: AGLA, grids: list[tuple[int, int]]) -> Tensor:
    """The pixels of images, in order of the prompts, black out of what eager attention's last row looks at."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    attentions = eager(**inputs, output_attentions=True).attentions
    assert edit.layers is not None
    last = torch.stack([attentions[layer][:, :, -1].mean(1) for layer in edit.layers]).mean(0)
    pixels = inputs["pixel_values"].clone()
    seen = list(last[inputs["input_ids"] == vlms.IMAGE])
    mean, std = NORMALISATION[model.config.vision_config.model_type]
    for number, (rows, columns) in enumerate(grids):
        weights = torch.stack([seen.pop(0) for _ in range(rows * columns)]).reshape(rows, columns)
        height, width = inputs["image_sizes"][number].tolist() if "image_sizes" in inputs else pixels.shape[-2:]
        fine = upsampled(weights, (height, width))
        order = fine.flatten().argsort(descending=True).tolist()
        assert edit.keep is not None
        for place in order[round(edit.keep * height * width) :]:
            for channel in range(3):
                pixels[number, channel, place // width, place % width] = (0 - mean[channel]) / std[channel]
    assert not seen
    return pixels


class Loop:
    """Greedy or sampled generation by hand, with a cache of its own for each of the two streams."""

    def __init__(self, model: Any, inputs: dict[str, Any], pixels: Tensor) -> None:
        self.model, self.inputs = model, inputs
        self.has_image = (inputs["input_ids"] == vlms.IMAGE).any(1)[:, None]
        self.caches = [DynamicCache(config=model.config.get_text_config()) for _ in range(2)]
        self.given = [inputs, inputs | {"pixel_values": pixels}]
        self.mask = inputs["attention_mask"]

    def logits(self, stream: int, tokens: Tensor) -> Tensor:
        given = {"input_ids": tokens[:, -1:]} if tokens.shape[1] else dict(self.given[stream])
        mask = torch.cat([self.mask, torch.ones_like(tokens)], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -given["input_ids"].shape[1] :]
        given |= {"attention_mask": mask, "position_ids": positions, "past_key_values": self.caches[stream]}
        return self.model(**given).logits[:, -1]

    def run(self, edit: AGLA, new: int, choose: Callable[[Tensor], Tensor]) -> tuple[Tensor, list[Tensor]]:
        tokens, steps = self.inputs["input_ids"][:, :0], []
        for _ in range(new):
            main, other = self.logits(0, tokens), self.logits(1, tokens)
            bound = main.max(-1, keepdim=True).values + (math.log(edit.beta) if edit.beta else -math.inf)
            assembled = torch.where(main < bound, -math.inf, main + edit.alpha * other)
            steps.append(torch.where(self.has_image, assembled, main))
            tokens = torch.cat([tokens, choose(steps[-1])], 1)
        return tokens, steps


def greedy(logits: Tensor) -> Tensor:
    return logits.argmax(-1, keepdim=True)


# Family: the grids of its images, in the order of the prompts, by its case in vlms.py.
GRIDS = {
    "llava": [(4, 4)] * 3,
    "llava with pixtral": [(4, 3), (2, 4), (1, 2)],
    "gemma3": [(2, 2)] * 3,
}


@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize("family", GRIDS)
@torch.no_grad()
def test_it_is_two_independent_loops(family: str, beta: float) -> None:
    """Three prompts, padded: two images, none, one."""
    case, edit = vlms.CASES[family], AGLA(alpha=2.0, beta=beta, keep=0.4, layers=LAYERS)
    model, inputs = case.model(), case.inputs()
    if family == "gemma3":
        # Its image tokens see each other.
        inputs["token_type_ids"] = (inputs["input_ids"] == vlms.IMAGE).long()
    before = model(**inputs).logits
    pixels = masked_by_hand(model, inputs, edit, GRIDS[family])
    expected, steps = Loop(model, inputs, pixels).run(edit, NEW, greedy)
    with attn_hooks.editing(model, edit):
        found = generated(model, inputs)
    assert torch.equal(found.sequences[:, -NEW:], expected)
    for step, logits in zip(steps, found.logits, strict=True):
        # Of a token that is certain only that counts.
        torch.testing.assert_close(logits.log_softmax(-1), step.log_softmax(-1), rtol=1e-3, atol=1e-3)
    assert torch.equal(model(**inputs).logits, before)


def sharp_llava() -> Any:
    """Whose tokens differ enough in likelihood that some are certain, and some not."""
    model = LLAVA.model()
    with torch.no_grad():
        model.lm_head.weight *= 30
    return model


@pytest.mark.parametrize("sampled", [False, True])
@torch.no_grad()
def test_the_skip_changes_no_token(sampled: bool) -> None:
    model, inputs = sharp_llava(), last_prompt(three_prompts())
    edit = AGLA(keep=0.4, layers=LAYERS, skip=True)
    pixels = masked_by_hand(model, inputs, edit, [(4, 4)])

    def choose(logits: Tensor) -> Tensor:
        return torch.multinomial(logits.softmax(-1), 1) if sampled else greedy(logits)

    torch.manual_seed(5)
    expected, _ = Loop(model, inputs, pixels).run(edit, NEW, choose)
    with attn_hooks.editing(model, edit):
        torch.manual_seed(5)
        found = generated(model, inputs, do_sample=sampled, top_k=0)
        (report,) = attn_hooks.report(model).edits
    assert report.second_stream_skipped is not None
    assert 0 < report.second_stream_skipped < 1
    assert torch.equal(found.sequences[:, -NEW:], expected)


@torch.no_grad()
def test_beams_take_the_second_stream_with_them() -> None:
    """The score of the best beam is that of the loop, made to take its tokens."""
    model, inputs, edit = LLAVA.model(), last_prompt(three_prompts()), AGLA(beta=0.0, keep=0.4, layers=LAYERS)
    pixels = masked_by_hand(model, inputs, edit, [(4, 4)])
    with attn_hooks.editing(model, edit):
        found = generated(model, inputs, 5, num_beams=3, output_scores=True, length_penalty=0.0)
    taken = found.sequences[:, -5:]
    left = list(taken[0])
    _, steps = Loop(model, inputs, pixels).run(edit, 5, lambda _logits: left.pop(0).reshape(1, 1))
    score = sum(float(step.log_softmax(-1)[0, token]) for step, token in zip(steps, taken[0], strict=True))
    assert float(found.sequences_scores[0]) == pytest.approx(score, abs=1e-3)


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_vl", "qwen2_5_vl"])
@torch.no_grad()
def test_beams_of_every_packing_of_pixels(family: str) -> None:
    """Each beam starts from what its prompt gives without beams: images, and patches on a grid."""
    case, edit = vlms.CASES[family], AGLA(beta=0.0, keep=0.4, layers=LAYERS)
    model, inputs = case.model(), case.inputs()
    if "video_grid_thw" in inputs:
        # The first prompt has a video, which AGLA does not take.
        patches = inputs["pixel_values"][-int(inputs["image_grid_thw"][-1].prod()) :]
        inputs = {name: value[2:] for name, value in inputs.items() if "video" not in name} | {"pixel_values": patches}
    plain = generated(model, inputs, 2).logits[0]
    with attn_hooks.editing(model, edit):
        alone = generated(model, inputs, 2).logits[0]
        beams = generated(model, inputs, 2, num_beams=2, num_return_sequences=2).logits[0]
    assert not torch.allclose(alone, plain)
    torch.testing.assert_close(beams, alone.repeat_interleave(2, 0), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_batch_is_its_prompts_one_by_one() -> None:
    model, inputs, edit = LLAVA.model(), three_prompts(), AGLA(beta=0.3, keep=0.4, layers=LAYERS)
    with attn_hooks.editing(model, edit):
        together = generated(model, inputs).sequences[:, -NEW:]
        static = generated(model, inputs, cache_implementation="static").sequences[:, -NEW:]
        for number, row in enumerate(ROWS):
            one = vlms.batch_of([row]) | {"pixel_values": inputs["pixel_values"][number : number + 1]}
            assert torch.equal(generated(model, one).sequences[0, -NEW:], together[number])
    assert torch.equal(static, together)


@pytest.mark.parametrize(
    "edit", [AGLA(alpha=0.0, beta=0.0, layers=LAYERS), AGLA(beta=0.0, keep=1.0, layers=LAYERS)], ids=str
)
@torch.no_grad()
def test_without_weight_or_without_a_mask_greedy_tokens_are_the_model_s(edit: AGLA) -> None:
    model, inputs = LLAVA.model(), three_prompts()
    expected = generated(model, inputs)
    with attn_hooks.editing(model, edit):
        found = generated(model, inputs)
    assert torch.equal(found.sequences, expected.sequences)
    for logits, own in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(logits, (1 + edit.alpha) * own, rtol=1e-4, atol=1e-5)


def pixels_of_the_second_stream(model: Any, inputs: dict[str, Any], edit: AGLA) -> Tensor:
    """What the model itself is given there."""
    given: list[Tensor] = []
    handle = model.model.register_forward_pre_hook(
        lambda _model, _args, kwargs: given.append(kwargs["pixel_values"]), with_kwargs=True
    )
    with attn_hooks.editing(model, edit):
        model(**inputs)
    handle.remove()
    assert len(given) == 2
    assert torch.equal(given[0], inputs["pixel_values"])
    return given[1]


@pytest.mark.parametrize("keep", [0.01, 0.37, 0.8, 1.0])
@torch.no_grad()
def test_so_many_pixels_are_black(keep: float) -> None:
    inputs = three_prompts()
    found = pixels_of_the_second_stream(LLAVA.model(), inputs, AGLA(beta=0.0, keep=keep, layers=LAYERS))
    changed = (found != inputs["pixel_values"]).all(1).flatten(1).sum(1).tolist()
    assert changed == [vlms.PIXELS**2 - round(keep * vlms.PIXELS**2)] * 3


def test_ties_are_kept() -> None:
    assert most_relevant(torch.tensor([[3.0, 1.0], [1.0, 0.0]]), 0.5).tolist() == [[True, True], [True, False]]
    assert most_relevant(torch.zeros(3, 3), 0.1).all()


def test_the_blur_is_a_gaussian_mirrored_at_the_borders() -> None:
    height, width = 30, 50
    relevance = torch.rand(3, 5, generator=torch.Generator().manual_seed(0))
    fine = functional.interpolate(relevance[None, None], (height, width), mode="bicubic")[0, 0].double()
    reach = 4  # of a deviation of 1
    weight = [math.exp(-0.5 * step**2) for step in range(-reach, reach + 1)]
    mirrored = torch.cat([fine.flip(0), fine, fine.flip(0)])
    mirrored = torch.cat([mirrored.flip(1), mirrored, mirrored.flip(1)], 1)
    found = upsampled(relevance, (height, width))
    for row, column in [(0, 0), (0, 49), (29, 3), (14, 25), (29, 49)]:
        expected = (
            sum(
                weight[down + reach] * weight[across + reach] * mirrored[height + row + down, width + column + across]
                for down in range(-reach, reach + 1)
                for across in range(-reach, reach + 1)
            )
            / sum(weight) ** 2
        )
        assert float(found[row, column]) == pytest.approx(float(expected), abs=1e-5)


# One prompt each, of one image of 2 x 4 and of 4 x 2 tokens: as the qwen cases have them, without the video.
QWEN_ROWS = [vlms.text(2) + vlms.framed(8, 0) + vlms.text(4), vlms.text(3) + vlms.framed(8, 0) + vlms.text(6)]


def qwen_inputs() -> dict[str, Any]:
    grids = torch.tensor([[1, 4, 8], [1, 8, 4]])
    ids = vlms.batch_of(QWEN_ROWS)
    return ids | {
        "pixel_values": vlms.pixels(64, 3 * 2 * vlms.PATCH**2),
        "image_grid_thw": grids,
        "mm_token_type_ids": (ids["input_ids"] == vlms.IMAGE).long(),
    }


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@torch.no_grad()
def test_flattened_patches_are_masked_where_their_token_lies(family: str) -> None:
    """A pixel of a patch, counted from the grid of tokens down, is black iff it is on the picture that is put together."""
    model, inputs, keep = vlms.CASES[family].model(), qwen_inputs(), 0.4
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.4, 0.3)
    edit = AGLA(beta=0.0, keep=keep, layers=LAYERS, image_mean=mean, image_std=std)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    attentions = eager(**inputs, output_attentions=True).attentions
    last = torch.stack([attentions[layer][:, :, -1].mean(1) for layer in LAYERS]).mean(0)
    expected = inputs["pixel_values"].reshape(64, 3, 2, vlms.PATCH, vlms.PATCH).clone()
    for sample, (rows, columns) in enumerate([(2, 4), (4, 2)]):
        weights = last[sample][inputs["input_ids"][sample] == vlms.IMAGE].reshape(rows, columns)
        side = 2 * vlms.PATCH
        fine = upsampled(weights, (rows * side, columns * side))
        kept = set(most_relevant(fine, keep).flatten().nonzero().flatten().tolist())
        for token in range(rows * columns):
            for patch in range(4):
                for y in range(vlms.PATCH):
                    for x in range(vlms.PATCH):
                        row = token // columns * side + patch // 2 * vlms.PATCH + y
                        column = token % columns * side + patch % 2 * vlms.PATCH + x
                        if row * columns * side + column not in kept:
                            for channel in range(3):
                                black = (0 - mean[channel]) / std[channel]
                                expected[32 * sample + 4 * token + patch, channel, :, y, x] = black
    found = pixels_of_the_second_stream(model, inputs, edit)
    torch.testing.assert_close(found, expected.reshape(64, -1))


BLIP_SIDE, BLIP_PATCH = 12, 4
WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *(f"w{number}" for number in range(60))]


def tiny_blip() -> Any:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    config = BlipConfig(
        text_config=sizes
        | {
            "vocab_size": len(WORDS) + 1,
            "num_hidden_layers": 3,
            "encoder_hidden_size": 8,
            "max_position_embeddings": 40,
            "bos_token_id": 1,
            "sep_token_id": 2,
            "pad_token_id": 0,
            "is_decoder": True,
        },
        vision_config=sizes | {"num_hidden_layers": 1, "image_size": BLIP_SIDE, "patch_size": BLIP_PATCH},
        image_text_hidden_size=6,
        projection_dim=6,
    )
    torch.manual_seed(1)
    model = BlipForImageTextRetrieval(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def words_tokenizer() -> Any:
    model = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    model.pre_tokenizer = Whitespace()
    model.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")


BLIP_PROCESSOR = SimpleNamespace(
    tokenizer=words_tokenizer(), image_processor=SimpleNamespace(image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4])
)


def blip_relevance(**more: Any) -> BlipRelevance:
    return BlipRelevance(
        more.pop("model", None) or tiny_blip(),
        BLIP_PROCESSOR,
        words_tokenizer(),
        **({"block": 1, "encoder_token": len(WORDS)} | more),
    )


def blip_pixels(image: Tensor) -> Tensor:
    """Of an image that has BLIP's size."""
    return torch.stack(
        [(image[channel] - (0.4, 0.5, 0.6)[channel]) / (0.2, 0.3, 0.4)[channel] for channel in range(3)]
    )[None]


@torch.no_grad()
def literal_gradcam(model: Any, image: Tensor, tokens: list[int], block: int) -> Tensor:
    """With the derivative by each weight of the cross-attention as a difference of two scores, in float64."""
    model = copy.deepcopy(model).double()
    pixels, ids = blip_pixels(image).double(), torch.tensor([tokens])
    attention = model.text_encoder.encoder.layer[block].crossattention.self
    weights: list[Tensor] = []
    moved: list[tuple[tuple[int, ...], float]] = []

    def move(_module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        weights.append(args[0].clone())
        changed = args[0].clone()
        for place, by in moved:
            changed[place] += by
        return (changed,)

    handle = attention.dropout.register_forward_pre_hook(move)

    def score() -> float:
        return float(model(ids, pixels).itm_score[0, 1])

    score()
    own, side, step = weights[0], BLIP_SIDE // BLIP_PATCH, 1e-5
    found = torch.zeros(side, side)
    heads, length = own.shape[1], len(tokens)
    for row in range(side):
        for column in range(side):
            patch = 1 + row * side + column
            total = 0.0
            for token in range(1, length - 1):
                for head in range(heads):
                    place = (0, head, token, patch)
                    moved[:] = [(place, step)]
                    above = score()
                    moved[:] = [(place, -step)]
                    slope = (above - score()) / (2 * step)
                    total += max(slope, 0.0) * float(own[place]) / heads
            found[row, column] = total / (length - 2)
    handle.remove()
    return found


@pytest.mark.parametrize("encoder_token", [len(WORDS), None])
@pytest.mark.parametrize("block", [0, 1])
def test_gradcam_is_the_derivative_by_each_weight(block: int, encoder_token: int | None) -> None:
    """Also where the caller is in inference mode, and with frozen weights."""
    model = tiny_blip().requires_grad_(encoder_token is None)
    relevance = blip_relevance(model=model, block=block, encoder_token=encoder_token)
    image = torch.rand(3, BLIP_SIDE, BLIP_SIDE, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found, keep = relevance(image + 0, "w3 w7 w1 w1")
    words = [WORDS.index(word) for word in ("w3", "w7", "w1", "w1")]
    expected = literal_gradcam(model, image, [1 if encoder_token is None else encoder_token, *words, 2], block)
    assert expected.max() > 0
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
    assert all(parameter.grad is None for parameter in model.parameters())
    # The cosine: the contrastive head's, with the tokenizer's own first token.
    with torch.no_grad():
        of_image = model.vision_model(blip_pixels(image)).last_hidden_state[0, 0]
        of_text = model.text_encoder(torch.tensor([[1, *words, 2]])).last_hidden_state[0, 0]
        cosine = torch.cosine_similarity(model.vision_proj(of_image), model.text_proj(of_text), dim=0)
    assert keep == pytest.approx(min(1 - float(cosine) / 2, 1 - 1e-5), abs=1e-5)


class Asked(BlipRelevance):
    """Remembers what it was asked."""

    asked: list[tuple[Tensor, str]]

    def __call__(self, image: Tensor, question: str) -> tuple[Tensor, float]:
        self.asked.append((image, question))
        return super().__call__(image, question)


@torch.no_grad()
def test_blip_is_asked_the_question_about_each_image() -> None:
    """The image as the model is given it, and the text behind the last image; the share is kept that its cosine says."""
    blip = tiny_blip()
    # Of a negative cosine all would be kept.
    blip.text_proj.bias.fill_(40.0)
    blip.vision_proj.bias.fill_(40.0)
    relevance = Asked(
        blip,
        BLIP_PROCESSOR,
        words_tokenizer(),
        question=lambda text: text.replace("[UNK]", "").strip(),
        block=0,
        encoder_token=None,
    )
    relevance.asked = []
    model, inputs = LLAVA.model(), LLAVA.inputs()
    found = pixels_of_the_second_stream(model, inputs, AGLA(beta=0.0, relevance=relevance))
    asked, relevance.asked = relevance.asked, []
    # Behind the images stand the tokens from 3 on: [UNK], w0 and so on.
    assert [question for _, question in asked] == ["w0 w1 w2", "w0 w1 w2", "w0 w1"]
    mean, std = (torch.tensor(values)[:, None, None] for values in NORMALISATION["clip_vision_model"])
    for number, (image, question) in enumerate(asked):
        torch.testing.assert_close(image, (inputs["pixel_values"][number] * std + mean).clamp(0, 1))
        relevant, keep = relevance(image, question)
        kept = most_relevant(upsampled(relevant, (vlms.PIXELS, vlms.PIXELS)), keep)
        assert keep < 0.9
        assert int(kept.sum()) == round(keep * vlms.PIXELS**2)
        torch.testing.assert_close(found[number], torch.where(kept, inputs["pixel_values"][number], (0 - mean) / std))
    fixed = pixels_of_the_second_stream(model, inputs, AGLA(beta=0.0, keep=0.25, relevance=relevance))
    assert int((fixed != inputs["pixel_values"]).all(1).sum()) == 3 * round(0.75 * vlms.PIXELS**2)
    relevance.asked = []
    apart = vlms.batch_of([SQUARE_IMAGE + vlms.text(3, 40) + vlms.image(vlms.SQUARE, 1) + vlms.text(2, 20)])
    pixels_of_the_second_stream(model, apart | {"pixel_values": inputs["pixel_values"][:2]}, AGLA(relevance=relevance))
    assert [question for _, question in relevance.asked] == ["w16 w17"] * 2


def test_reading_the_attention_leaves_it_to_the_backend() -> None:
    rows = attn_hooks.explain(LLAVA.model(), AGLA(layers=(1,)), attn_hooks.HeadAffine(gain=torch.ones(2, 4))).layers
    assert ["PyTorch" in row.path for row in rows] == [False, False]
    assert rows[1].path == rows[0].path
    (_, read) = attn_hooks.explain(LLAVA.model(), AGLA(layers=(1,))).layers
    assert (read.path, "not edited" in read.why) == ("sdpa", True)


def refused(code: str, action: Callable[[], Any], *parts: str) -> None:
    with pytest.raises(AttnHooksError) as refusal:
        action()
    assert refusal.value.code == code
    assert all(part in str(refusal.value) for part in parts)


@torch.no_grad()
def test_what_has_no_picture_or_no_black_is_refused(tmp_path: Path) -> None:
    def run(family: str, edit: AGLA, **changed: Any) -> Callable[[], Any]:
        case = vlms.CASES[family]
        model = attn_hooks.wrap(case.model(), edit)
        return lambda: model(**(case.inputs() | changed))

    known = AGLA(image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5))
    refused("no-picture", run("llava_next", AGLA()), "LlavaNext", "4 x 4 + 4 x 8")
    refused("no-picture", run("qwen2_vl", AGLA()), "Qwen2VL", "video")
    refused("no-picture", run("internvl", known), "InternVL", "crops")
    refused("no-black", lambda: attn_hooks.wrap(vlms.CASES["internvl"].model(), AGLA()), "internvl_vision")
    # Two images in one prompt, each whole, among views that are not used.
    rows = [vlms.text(2) + vlms.image(vlms.SQUARE + 1, 0) + vlms.image(vlms.SQUARE + 1, 1) + vlms.text(2)]
    views = {
        "pixel_values": vlms.pixels(2, 5, 3, vlms.PIXELS, vlms.PIXELS),
        "image_sizes": torch.tensor([[20, 36], [40, 20]]),
        "batch_num_images": torch.tensor([2]),
    }
    onevision = attn_hooks.wrap(vlms.CASES["llava_onevision"].model(), AGLA())
    refused("no-picture", lambda: onevision(**vlms.batch_of(rows), **views), "(2, 5, 3, 16, 16)")
    behind = vlms.batch_of([vlms.BEGIN + vlms.text(3) + SQUARE_IMAGE])
    pictured = attn_hooks.wrap(LLAVA.model(), AGLA(relevance=blip_relevance()))
    refused("no-picture", lambda: pictured(**behind, pixel_values=vlms.pixels(1, 3, 16, 16)), "no text")
    refused("not-saved", lambda: attn_hooks.save_edits(pictured, tmp_path), "BlipRelevance")
    attn_hooks.save_edits([known], tmp_path)
    assert attn_hooks.load_edits(tmp_path) == (known,)


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: AGLA(relevance="clip"), "BlipRelevance"),
        (lambda: AGLA(keep=0.0), "keep"),
        (lambda: AGLA(layers=()), "layers"),
        (lambda: AGLA(image_mean=(0.0, 0.0, 0.0)), "image_std"),
        (lambda: AGLA(image_mean=(0.0, 0.0, 0.0), image_std=(1.0, 0.0, 1.0)), "above 0"),
        (lambda: AGLA(relevance=blip_relevance(), layers=(0,)), "layers"),
        (lambda: blip_relevance(model=torch.nn.Linear(1, 1)), "BlipForImageTextRetrieval"),
        (lambda: blip_relevance(model=tiny_blip().half()), "float32"),
        (lambda: blip_relevance(model=tiny_blip().train()), "eval()"),
        (lambda: blip_relevance(block=3), "block: 3"),
        (lambda: blip_relevance(encoder_token=30523), "encoder_token: 30523"),
    ],
)
def test_parameters_that_cannot_be_are_refused(make: Callable[[], Any], part: str) -> None:
    refused("bad-parameters", make, part)
