"""Which keys are an image's, of which image, and where each patch lies: against what the models themselves do.

Images are laid out by hand in `tests.hooks.vlms`; what is tested here is that the layout finds them, that its tokens are
those over which the model scatters its features, as many as the vision tower yields, and that the token of a patch is the
one whose embedding changes with the patch's pixels.
"""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import Idefics3Processor, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, StaticCache
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

import attn_hooks
from attn_hooks import PASTA, AttentionCall, AttnHooksError, Edit, ImageSpan, PatchGrid, TokenKind, TokenLayout
from attn_hooks.layout import MOST_IMAGES
from attn_hooks.vision_layout import FAMILIES
from attn_kernels import LogitMap, Primitive
from tests.hooks.vlms import (
    BEGIN,
    CASES,
    IMAGE,
    QUERIES,
    SIDE_BY_SIDE,
    SQUARE,
    VIDEO,
    Token,
    batch_of,
    framed,
    image,
    pixels,
    text,
    three_images,
    tiny_mllama,
)

every_case = pytest.mark.parametrize("name", CASES)
# A prefix LM, which is not edited: its layout is known all the same.
EDITABLE = [name for name in CASES if name != "paligemma"]


@cache
def model_of(name: str) -> Any:
    """Its vision tower mixes no patches: what attention there adds is zeroed."""
    model = CASES[name].model()
    for parameter_name, parameter in model.named_parameters():
        mixes = ("out_proj", "attn.proj", "o_proj", "projection_layer", "attention.dense")
        if "vis" in parameter_name and any(part in parameter_name for part in mixes):
            nn.init.zeros_(parameter)
    return model


def layout_of(name: str, side: str = "left") -> TokenLayout:
    return attn_hooks.layout_of(model_of(name), **CASES[name].inputs(side))


@torch.no_grad()
def embedded(model: Any, inputs: dict[str, Any]) -> Tensor:
    """``(B, N, E)``: what the language model is given, image features scattered."""
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["inputs_embeds"].clone())

    handle = language_model(model).register_forward_pre_hook(keep, with_kwargs=True)
    # The models write into what they are given (pixels of several dtypes, masks).
    model(**copy.deepcopy(inputs))
    handle.remove()
    return seen[0]


def language_model(model: Any) -> nn.Module:
    parts = dict(model.named_modules())
    return next(parts[name] for name in ("model.language_model", "model.text_model", "language_model") if name in parts)


@torch.no_grad()
def features_per_image(model: Any, inputs: dict[str, Any]) -> list[int]:
    """How many features the model's own tower and projector yield, image by image (by prompt for Idefics3), then videos."""
    inner = getattr(model, "model", model)
    kept = {"image_sizes", "pixel_attention_mask", "image_grid_thw", "batch_num_images", "qformer_input_ids"}
    given = {name: value for name, value in inputs.items() if name in kept}
    features = list(inner.get_image_features(inputs["pixel_values"], return_dict=True, **given).pooler_output)
    if "pixel_values_videos" in inputs:
        grid = {name: inputs[name] for name in ("video_grid_thw",) if name in inputs}
        videos = inner.get_video_features(inputs["pixel_values_videos"], return_dict=True, **grid)
        features += list(videos.pooler_output)
    return [len(feature) for feature in features]


def test_every_family_of_the_table_is_tested() -> None:
    assert {case.model_type for case in CASES.values()} | {"mllama"} == set(FAMILIES)


def test_every_family_has_a_row_in_the_docs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "images.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `([\w-]+)` \|", page, re.MULTILINE)[1:] == list(FAMILIES)


@every_case
@pytest.mark.parametrize("side", ["left", "right"])
def test_each_token_is_of_the_image_that_was_put_there(name: str, side: str) -> None:
    case, found = CASES[name], layout_of(name, side)
    assert torch.equal(found.kinds, case.kinds(side))
    assert {(span.sample, span.image): span.grid_text() for span in found.images} == case.grids
    assert {(span.sample, span.image) for span in found.images if span.video} == case.videos
    for span in found.images:
        of_image = (found.kinds[span.sample] == TokenKind.IMAGE + span.image).nonzero()[:, 0]
        assert torch.equal(span.positions, of_image)
        assert (span.start, span.stop, span.tokens) == (of_image[0], of_image[-1] + 1, len(of_image))


@every_case
def test_the_tokens_are_those_over_which_the_model_scatters_its_features(name: str) -> None:
    model, inputs = model_of(name), CASES[name].inputs()
    other = {key: value + 0.5 if "pixel_values" in key else value for key, value in inputs.items()}
    if "pixel_attention_mask" in inputs:
        # Zeros mark what is no image.
        other["pixel_values"] = torch.where(inputs["pixel_values"] == 0, 0.0, other["pixel_values"])
    changed = (embedded(model, inputs) != embedded(model, other)).any(-1)
    found = layout_of(name)
    separators = torch.zeros_like(changed)
    for span in found.images:
        separators[span.sample, span.separators()] = True
    if name == "llava, full features":
        # The class token sees no pixel in a tower that mixes none; it is scattered all the same.
        separators[:] = False
        changed |= torch.zeros_like(changed).index_put_(class_tokens(found), torch.tensor(True))
    assert torch.equal(changed, (found.kinds >= TokenKind.IMAGE) & ~separators)


def class_tokens(layout: TokenLayout) -> tuple[Tensor, Tensor]:
    rows = torch.tensor([span.sample for span in layout.images])
    return rows, torch.tensor([span.start for span in layout.images])


@every_case
def test_there_are_as_many_tokens_as_the_vision_tower_yields_features(name: str) -> None:
    case, found = CASES[name], layout_of(name)
    yielded = features_per_image(model_of(name), case.inputs())
    spans = sorted(found.images, key=lambda span: span.video)
    if "pixel_attention_mask" in case.inputs():
        by_prompt = [sum(span.tokens for span in found.images_of(sample)) for sample in range(3)]
        assert yielded == by_prompt
    elif case.model_type == "internvl":
        tiles = [grid.rows * grid.columns for span in found.images for grid in span.grids or ()]
        assert yielded == tiles
    else:
        assert yielded == [span.tokens for span in spans]
    for span in spans:
        if span.grids is not None:
            patches = sum(grid.rows * grid.columns for grid in span.grids)
            assert patches + len(span.separators()) == span.tokens


@pytest.mark.parametrize(
    ("name", "probe"), [(name, probe) for name, case in CASES.items() for probe in range(len(case.probes))]
)
def test_the_token_of_a_patch_is_the_one_that_its_pixels_change(name: str, probe: int) -> None:
    case, model = CASES[name], model_of(name)
    where = case.probes[probe]
    inputs = case.inputs()
    changed = inputs | {where.argument: inputs[where.argument].clone()}
    changed[where.argument][where.pixels] += 0.7
    (span,) = [span for span in layout_of(name).images_of(where.sample) if span.image == where.image]
    assert span.grids is not None
    patch = span.patches(span.grids[where.grid])[where.row, where.column]
    before, after = embedded(model, inputs), embedded(model, changed)
    moved = (before != after).any(-1).nonzero().tolist()
    assert moved == [[where.sample, int(patch)]]


def test_the_newlines_of_llava_next_are_separators() -> None:
    model, inputs = model_of("llava_next"), CASES["llava_next"].inputs()
    is_newline = (embedded(model, inputs) == model.model.image_newline).all(-1)
    found = [
        [span.sample, position] for span in layout_of("llava_next").images for position in span.separators().tolist()
    ]
    assert sorted(found) == is_newline.nonzero().tolist()
    assert len(found) == 4 + 8 + 8


def test_the_crops_of_idefics_know_their_row_and_column() -> None:
    wide, _, narrow = layout_of("idefics3").images
    assert wide.grids is not None
    assert narrow.grids is not None
    places = [(row, column) for row in range(2) for column in range(3)]
    assert [grid.place for grid in wide.grids] == [*places, None]
    assert [grid.place for grid in narrow.grids] == [(0, 0), (0, 1), None]
    assert (wide.crops, wide.frames) == (6, 1)


@torch.no_grad()
def test_what_the_processor_of_idefics3_makes_of_large_and_small_images() -> None:
    """The processor itself, with a tokenizer of bytes: it says by its arguments into how many crops it splits."""
    tokenizer = byte_tokenizer(
        *("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"),
        *(f"<row_{row + 1}_col_{column + 1}>" for row in range(6) for column in range(6)),
    )
    images = Idefics3ImageProcessorPil(size={"longest_edge": 48}, max_image_size={"longest_edge": 16})
    processor = Idefics3Processor(images, tokenizer, image_seq_len=4)
    large, small = Image.new("RGB", (48, 20), "teal"), Image.new("RGB", (10, 10), "olive")
    prompts = {"text": ["a <image><image> b", "no <image>"], "padding": True, "return_tensors": "pt"}
    split = processor(images=[[large, large], [large]], **prompts)
    whole = processor(images=[[large, small], [small]], do_image_splitting=False, **prompts)
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    config = CASES["idefics3"].config | {"image_token_id": image_token_id}
    config["text_config"] = config["text_config"] | {"vocab_size": len(tokenizer)}
    model = replace(CASES["idefics3"], config=config).model()
    for inputs, grid in ((split, "6 crops of 2 x 2 + 2 x 2"), (whole, "2 x 2")):
        layout = attn_hooks.layout_of(model, **inputs)
        assert [(span.sample, span.image) for span in layout.images] == [(0, 0), (0, 1), (1, 0)]
        assert [span.grid_text() for span in layout.images] == [grid] * 3
        # Raises if its features are not as many as the prompt's tokens.
        model(**inputs)
    tiles = split["pixel_values"].shape[1]
    assert tiles == 2 * len(attn_hooks.layout_of(model, **split).images[0].grids or ())


def byte_tokenizer(*special_tokens: str) -> PreTrainedTokenizerFast:
    """One token a byte, and the special tokens."""
    alphabet = ["<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE(vocab={token: place for place, token in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", padding_side="left")
    tokenizer.add_special_tokens({"additional_special_tokens": list(special_tokens)})
    return tokenizer


# In flight: the layout that the edits see.


class Seen(Edit):
    """Keeps the layout of every call, and does nothing."""

    method = "seen"
    source = "a test"
    reads = frozenset({"tokens"})
    writes = "logits"
    scope = "per-row"

    def primitives(self, call: AttentionCall) -> list[Primitive]:
        LAYOUTS.append(call.layout)
        return [LogitMap(call.keys_at(call.inputs.key_position >= 0), scale=1.0)]


LAYOUTS: list[TokenLayout] = []


@pytest.fixture(autouse=True)
def _no_layouts() -> None:
    LAYOUTS.clear()


@torch.no_grad()
def layouts_seen(model: Any, **inputs: Any) -> list[TokenLayout]:
    with attn_hooks.editing(model, Seen()):
        model(**inputs)
    return LAYOUTS


@pytest.mark.parametrize("name", EDITABLE)
def test_edits_see_the_same_layout(name: str) -> None:
    seen = layouts_seen(CASES[name].model(), **CASES[name].inputs())[0]
    assert torch.equal(seen.kinds, CASES[name].kinds())
    assert seen.images == layout_of(name).images


GENERATED = 3


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("name", EDITABLE)
@torch.no_grad()
def test_the_layout_lasts_through_generate(name: str, beams: int) -> None:
    """Decode steps add text; each beam has its prompt's images."""
    model, inputs = CASES[name].model(), CASES[name].inputs()
    before = attn_hooks.layout_of(model, **inputs)
    with attn_hooks.editing(model, Seen()):
        model.generate(
            **inputs,
            max_new_tokens=GENERATED,
            min_new_tokens=GENERATED,
            do_sample=False,
            num_beams=beams,
            pad_token_id=0,
        )
    last = LAYOUTS[-1]
    assert last.length == before.length + GENERATED - 1
    assert torch.equal(last.kinds[:, : before.length], before.kinds.repeat_interleave(beams, dim=0))
    assert bool((last.kinds[:, before.length :] <= TokenKind.TEXT).all())
    assert len(last.images) == beams * len(before.images)
    assert [span.grid_text() for span in last.images_of(0)] == [span.grid_text() for span in before.images_of(0)]


@torch.no_grad()
def test_decode_steps_of_a_vision_language_model_compile_in_one_graph() -> None:
    model, inputs = CASES["llava"].model(), CASES["llava"].inputs()
    attn_hooks.wrap(model, PASTA(spans="image", alpha=0.05))

    def steps(step: Any) -> Tensor:
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
        model(**inputs, past_key_values=cache)
        length = inputs["input_ids"].shape[1]
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 64 - length))
        mask[:, length : length + 2] = 1
        given = {"input_ids": torch.full((3, 1), 7), "attention_mask": mask, "past_key_values": cache}
        return torch.cat([step(**given, position_ids=torch.full((3, 1), length + n)).logits for n in range(2)])

    in_eager = steps(model)
    torch.testing.assert_close(steps(torch.compile(model, fullgraph=True, backend="eager")), in_eager)


@torch.no_grad()
def test_a_second_turn_numbers_its_image_on() -> None:
    model = CASES["llava"].model()
    first = batch_of(SIDE_BY_SIDE) | three_images()
    rows: list[list[Token]] = [image(SQUARE, 0) + text(2), text(SQUARE + 2), text(1) + image(SQUARE, 0) + text(1)]
    second = batch_of(rows)
    with attn_hooks.editing(model, Seen()):
        cache = model(**first, use_cache=True).past_key_values
        step = {"input_ids": torch.full((3, 1), 7), "past_key_values": cache}
        model(**step, attention_mask=torch.nn.functional.pad(first["attention_mask"], (0, 1), value=1))
        past = first["input_ids"].shape[1] + 1
        mask = torch.cat([first["attention_mask"], torch.ones(3, 1 + SQUARE + 2, dtype=torch.long)], dim=1)
        model(
            input_ids=second["input_ids"],
            attention_mask=mask,
            pixel_values=pixels(2, 3, 16, 16),
            past_key_values=cache,
        )
    last = LAYOUTS[-1]
    numbers = [[(span.image, span.start, span.tokens) for span in last.images_of(sample)] for sample in range(3)]
    offset = past - 1 - len(SIDE_BY_SIDE[2])
    assert numbers == [
        [(0, 4, SQUARE), (1, 4 + SQUARE, SQUARE), (2, past, SQUARE)],
        [],
        [(0, offset + 3, SQUARE), (1, past + 1, SQUARE)],
    ]
    assert [span.grid_text() for span in last.images] == ["4 x 4"] * 5
    for span in last.images:
        assert bool((last.kinds[span.sample, span.positions] == TokenKind.IMAGE + span.image).all())
    assert int((last.kinds >= TokenKind.IMAGE).sum()) == 5 * SQUARE


def test_a_cropped_cache_keeps_what_lies_before_the_cut() -> None:
    layout = layout_of("llava")
    new = TokenLayout(torch.full((3, 2), TokenKind.TEXT, dtype=torch.uint8))
    cut = layout.extended(new, past=4 + SQUARE + 5)
    first, second = cut.images_of(0)
    assert first == layout.images[0]
    assert (second.start, second.stop, second.grids) == (4 + SQUARE, 4 + SQUARE + 5, None)
    assert layout.extended(new, past=2).images == ()


@torch.no_grad()
def test_what_one_mask_hides_is_there_again_under_another() -> None:
    case = CASES["llava"]
    model, inputs = case.model(), case.inputs()
    LAYOUTS.clear()
    with attn_hooks.editing(model, Seen()):
        cache = model(**inputs).past_key_values
        mask, hidden = inputs["attention_mask"], inputs["attention_mask"] * (inputs["input_ids"] != IMAGE)
        for length, given in enumerate((hidden, mask), start=1):
            given = torch.cat([given, torch.ones(3, length, dtype=torch.long)], 1)
            model(input_ids=torch.full((3, 1), 5), attention_mask=given, past_key_values=cache)
    first, without, again = LAYOUTS[:: model.config.text_config.num_hidden_layers]
    assert not without.is_image.any()
    assert torch.equal(again.kinds[:, :-2], first.kinds)


def test_a_prompt_without_an_image_and_embeddings_are_text() -> None:
    model = CASES["llava"].model()
    ids = batch_of([BEGIN + text(5)])["input_ids"]
    assert layouts_seen(model, input_ids=ids)[0].images == ()
    LAYOUTS.clear()
    inputs_embeds = model.get_input_embeddings()(batch_of(SIDE_BY_SIDE)["input_ids"]).detach()
    (seen, *_) = layouts_seen(model, inputs_embeds=inputs_embeds)
    assert bool((seen.kinds == TokenKind.TEXT).all())
    assert seen.images == ()


def test_what_generate_embeds_by_itself_is_not_taken_for_a_later_forward() -> None:
    """BLIP-2 embeds the prompt and runs its language model: those tokens belong to that forward alone."""
    model, inputs = CASES["blip-2"].model(), CASES["blip-2"].inputs()
    with attn_hooks.editing(model, Seen()):
        model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, pad_token_id=0)
        assert [span.tokens for span in LAYOUTS[0].images] == [QUERIES] * 3
        LAYOUTS.clear()
        model.language_model(inputs_embeds=torch.zeros(3, 1, 32))
    assert LAYOUTS[0].images == ()
    assert not model.get_input_embeddings()._forward_pre_hooks


# What cannot be told.


def test_images_without_pixels_have_no_grid() -> None:
    """Side by side, they cannot even be told apart: a run counts as one image, and says so."""
    inputs = CASES["llava"].inputs()
    del inputs["pixel_values"]
    first, second = attn_hooks.layout_of(model_of("llava"), **inputs).images
    assert (first.tokens, second.tokens, first.grids, first.frames, first.crops) == (
        2 * SQUARE,
        SQUARE,
        None,
        None,
        None,
    )
    assert first.grid_text() == "unknown: the forward was given no pixel_values"
    assert len(first.separators()) == 0


@pytest.mark.parametrize(
    ("name", "argument", "given", "reason"),
    [
        ("llava", "pixel_values", pixels(2, 3, 16, 16), "48 tokens for its images, which make 32"),
        ("qwen2_vl", "image_grid_thw", torch.tensor([[1, 4, 8], [1, 4, 10], [1, 4, 2]]), "lie in two prompts"),
        ("internvl", "pixel_values", pixels(5, 3, 16, 16), "are not made of 5 tiles of 2 x 2"),
        ("idefics3", "pixel_values", pixels(3, 8, 3, 32, 32), "where one crop makes 4 x 4"),
        ("llava_onevision", "batch_num_images", torch.tensor([2, 0, 2]), "counts 4 images and image_sizes 3"),
    ],
)
def test_what_does_not_fit_has_no_grid_and_says_why(name: str, argument: str, given: Tensor, reason: str) -> None:
    inputs = CASES[name].inputs() | {argument: given}
    spans = [span for span in attn_hooks.layout_of(model_of(name), **inputs).images if not span.video]
    assert spans
    assert all(span.grids is None and reason in span.why_no_grid for span in spans)


def test_idefics_without_names_of_rows_as_tokens_cannot_tell_crops_from_images() -> None:
    inputs = CASES["idefics3"].inputs()
    ids = inputs["input_ids"]
    # The tokenizer knows no <row_1_col_1>: it and <global-img> end in the same piece.
    before_image = (ids[:, 1:] == IMAGE) & (ids[:, :-1] != IMAGE)
    ids[:, :-1][before_image] = 58
    ids[:, :-2][before_image[:, 1:]] = 57
    spans = attn_hooks.layout_of(model_of("idefics3"), **inputs).images
    assert len(spans) == 7 + 1 + 3
    assert all("crops cannot be told from images" in span.why_no_grid for span in spans)


def test_an_unknown_family_has_its_runs_and_no_grid() -> None:
    model = copy.deepcopy(model_of("llava"))
    model.config.model_type = "llava_of_tomorrow"
    first, second = attn_hooks.layout_of(model, **CASES["llava"].inputs()).images
    assert (first.tokens, second.tokens) == (2 * SQUARE, SQUARE)
    assert "llava_of_tomorrow" in first.why_no_grid


def test_a_text_model_has_no_images() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=100))
    layout = attn_hooks.layout_of(model, torch.tensor([[1, IMAGE, VIDEO]]))
    assert layout.kinds.tolist() == [[TokenKind.BOS, TokenKind.TEXT, TokenKind.TEXT]]
    assert layout.images == ()


def test_a_byte_tells_so_many_images_apart_and_no_more() -> None:
    model = model_of("gemma3")
    for count in (MOST_IMAGES, MOST_IMAGES + 1):
        rows: list[list[Token]] = [BEGIN + [token for _ in range(count) for token in framed(4, 0)]]
        inputs = batch_of(rows) | {"pixel_values": pixels(count, 3, 16, 16)}
        if count == MOST_IMAGES:
            assert int(attn_hooks.layout_of(model, **inputs).kinds.max()) == 255
            continue
        with pytest.raises(AttnHooksError) as caught:
            attn_hooks.layout_of(model, **inputs)
        assert caught.value.code == "too-many-images"


def test_later_turns_run_out_of_numbers_too() -> None:
    def images(count: int) -> TokenLayout:
        spans = [ImageSpan(0, number, ((number, number + 1),), None) for number in range(count)]
        return TokenLayout.of_tokens(None, torch.ones(1, count, dtype=torch.bool), None, spans)

    full = images(MOST_IMAGES - 1).extended(images(1), MOST_IMAGES - 1)
    assert full.kinds[0, -2:].tolist() == [254, 255]
    with pytest.raises(AttnHooksError) as caught:
        full.extended(images(1), MOST_IMAGES)
    assert caught.value.code == "too-many-images"


def test_mllama_reads_its_images_elsewhere() -> None:
    model = tiny_mllama()
    ids = torch.tensor([[1, IMAGE, 5, 6]])
    assert attn_hooks.layout_of(model, ids).images == ()
    assert attn_hooks.inspect_model(model).image_token_id is None
    with pytest.raises(AttnHooksError, match="MllamaForConditionalGeneration") as caught:
        attn_hooks.wrap(model, PASTA(spans="image"))
    assert caught.value.code == "image-by-cross-attention"
    # Its self-attention is edited as any other; the image's mark is text there.
    seen = layouts_seen(model, input_ids=ids)[0]
    assert seen.kinds.tolist() == [[TokenKind.BOS, TokenKind.TEXT, TokenKind.TEXT, TokenKind.TEXT]]


def test_a_grid_says_where_its_patches_lie() -> None:
    """Two rows of three with a separator after each, in a span that text interrupts."""
    span = ImageSpan(0, 0, ((2, 6), (10, 15)), (PatchGrid(1, 2, 3, 4),))
    assert span.positions.tolist() == [2, 3, 4, 5, 10, 11, 12, 13, 14]
    assert span.patches(PatchGrid(1, 2, 3, 4)).tolist() == [[3, 4, 5], [11, 12, 13]]
    assert span.separators().tolist() == [2, 10, 14]


def test_tokens_without_a_batch_are_refused() -> None:
    with pytest.raises(AttnHooksError, match="token-shape"):
        attn_hooks.layout_of(CASES["llava"].model(), torch.arange(5))
