"""A tiny random model of each family that attn_hooks/vision_layout.py knows, and a batch of prompts whose images are laid
out by hand: what each token holds stands beside it.

The first prompt has two images or more, the second none, the third one; they differ in length, so the batch is padded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

PAD, BOS, EOS, IMAGE, VIDEO, MARK, ROW_END = 0, 1, 2, 90, 91, 92, 93
VOCAB_SIZE = 100
PIXELS, PATCH = 16, 4
SIDE = PIXELS // PATCH

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TEXT: dict[str, Any] = SIZES | {
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCAB_SIZE,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
VISION: dict[str, Any] = SIZES | {"image_size": PIXELS, "patch_size": PATCH}
QWEN_VISION: dict[str, Any] = {
    "depth": 2,
    "embed_dim": 32,
    "hidden_size": 32,
    "out_hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 4,
    "patch_size": PATCH,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}

Token = tuple[int, int | None]
"""An id, and the number of the image that the token belongs to."""


def text(length: int, first: int = 3) -> list[Token]:
    return [(first + place % 60, None) for place in range(length)]


def image(tokens: int, number: int, token_id: int = IMAGE) -> list[Token]:
    return [(token_id, number)] * tokens


def mark(token_id: int = MARK) -> list[Token]:
    return [(token_id, None)]


def framed(tokens: int, number: int) -> list[Token]:
    """Between a start and an end token."""
    return mark(94) + image(tokens, number) + mark(95)


BEGIN: list[Token] = [(BOS, None)]


@dataclass(frozen=True)
class Probe:
    """Pixels that one patch alone sees: ``change`` (part of the forward's arguments) -> that patch."""

    argument: str
    pixels: tuple[Any, ...]
    sample: int
    image: int
    grid: int
    row: int
    column: int


@dataclass(frozen=True)
class Case:
    """One family: its model, three prompts, the forward's other arguments, and the grids of (sample, image) in words."""

    model_type: str
    config: dict[str, Any]
    rows: list[list[Token]]
    arguments: Callable[[], dict[str, Any]]
    grids: dict[tuple[int, int], str]
    probes: tuple[Probe, ...] = ()
    videos: frozenset[tuple[int, int]] = field(default_factory=frozenset)

    def model(self) -> Any:
        torch.manual_seed(0)
        config = CONFIG_MAPPING[self.model_type](**self.config)
        model = AutoModelForImageTextToText.from_config(config)
        for parameter in model.parameters():
            # Zeros, where some start, would hide what was put in.
            nn.init.normal_(parameter, std=0.1)
        return model.eval()

    def inputs(self, side: str = "left") -> dict[str, Any]:
        return batch_of(self.rows, side) | self.arguments()

    def kinds(self, side: str = "left") -> Tensor:
        """What the layout must hold."""
        width = max(map(len, self.rows))
        held = []
        for row in self.rows:
            kinds = [1 if token == BOS else 2 if number is None else 16 + number for token, number in row]
            padding = [0] * (width - len(row))
            held.append(padding + kinds if side == "left" else kinds + padding)
        return torch.tensor(held, dtype=torch.uint8)


def batch_of(rows: list[list[Token]], side: str = "left") -> dict[str, Any]:
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), PAD), torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[number, place] = torch.tensor([token for token, _ in row])
        mask[number, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


def pixels(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(3)) + 0.1


def three_images() -> dict[str, Any]:
    return {"pixel_values": pixels(3, 3, PIXELS, PIXELS)}


def patch_pixels(row: int, column: int, size: int = PATCH) -> tuple[Any, ...]:
    return (slice(None), slice(row * size, (row + 1) * size), slice(column * size, (column + 1) * size))


SQUARE = SIDE * SIDE
# Two images side by side, as nothing in the family keeps a user from laying them.
SIDE_BY_SIDE = [
    BEGIN + text(3) + image(SQUARE, 0) + image(SQUARE, 1) + text(4),
    BEGIN + text(6),
    BEGIN + text(2) + image(SQUARE, 0) + text(3),
]
SQUARES = dict.fromkeys([(0, 0), (0, 1), (2, 0)], f"{SIDE} x {SIDE}")
SQUARE_PROBES = tuple(
    Probe("pixel_values", (number, *patch_pixels(row, column)), *place, 0, row, column)
    for number, place, row, column in [(0, (0, 0), 0, 3), (1, (0, 1), 2, 1), (2, (2, 0), 3, 0)]
)


def qwen_rows(frames_apart: bool) -> list[list[Token]]:
    """Images of 2 x 4, 4 x 2 and 2 x 2 patches after merging, and in the first prompt a video of two frames of 2 x 3."""
    one_frame = mark(94) + image(6, 1, VIDEO) + mark(95)
    video = text(2, 40) + one_frame + text(2, 50) + one_frame
    if not frames_apart:
        video = mark(94) + image(12, 1, VIDEO) + mark(95)
    return [
        text(2) + framed(8, 0) + video + text(1) + framed(8, 2) + text(4),
        text(5),
        text(1) + framed(4, 0) + text(2),
    ]


def qwen_arguments(rows: list[list[Token]]) -> Callable[[], dict[str, Any]]:
    def arguments() -> dict[str, Any]:
        images, videos = torch.tensor([[1, 4, 8], [1, 8, 4], [1, 4, 4]]), torch.tensor([[2, 4, 6]])
        values = 3 * 2 * PATCH * PATCH
        ids = batch_of(rows)["input_ids"]
        return {
            "pixel_values": pixels(int(images.prod(1).sum()), values),
            "image_grid_thw": images,
            "pixel_values_videos": pixels(int(videos.prod(1).sum()), values),
            "video_grid_thw": videos,
            "mm_token_type_ids": (ids == IMAGE).long() + 2 * (ids == VIDEO).long(),
        }

    return arguments


def qwen(model_type: str, frames_apart: bool = False, **vision: Any) -> Case:
    rows = qwen_rows(frames_apart)
    return Case(
        model_type,
        {
            "text_config": TEXT | MROPE,
            "vision_config": QWEN_VISION | vision,
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "vision_start_token_id": 94,
            "vision_end_token_id": 95,
        },
        rows,
        qwen_arguments(rows),
        {(0, 0): "2 x 4", (0, 1): "2 frames of 2 x 3", (0, 2): "4 x 2", (2, 0): "2 x 2"},
        # Four patches make one token: the token at row 1, column 2 of 2 x 4 is the seventh.
        (
            Probe("pixel_values", (slice(24, 28),), 0, 0, 0, 1, 2),
            Probe("pixel_values", (slice(32 + 12, 32 + 16),), 0, 2, 0, 1, 1),
            Probe("pixel_values_videos", (slice(24 + 8, 24 + 12),), 0, 1, 1, 0, 2),
        ),
        videos=frozenset({(0, 1)}),
    )


def tile(row: int, column: int) -> list[Token]:
    """Of Idefics3: a mark, the crop's row and column, its tokens (of image 0)."""
    return mark() + mark(60 + 6 * row + column) + image(4, 0)


def whole_view(number: int) -> list[Token]:
    return mark() + mark(59) + image(4, number) + mark()


def idefics(model_type: str) -> Case:
    """The first prompt: an image in 2 x 3 crops and whole, and right behind it a small one; the third: one in 1 x 2."""
    crops = [tile(row, 0) + tile(row, 1) + tile(row, 2) + mark(ROW_END) for row in range(2)]
    rows = [
        BEGIN + text(2) + crops[0] + crops[1] + mark(ROW_END) + whole_view(0) + whole_view(1) + text(3),
        BEGIN + text(4),
        BEGIN + tile(0, 0) + tile(0, 1) + mark(ROW_END) + mark(ROW_END) + whole_view(0) + text(2),
    ]

    def arguments() -> dict[str, Any]:
        values = pixels(3, 8, 3, PIXELS, PIXELS)
        values[1], values[2, 3:] = 0, 0
        return {"pixel_values": values, "pixel_attention_mask": torch.ones(3, 8, PIXELS, PIXELS, dtype=torch.long)}

    return Case(
        model_type,
        {
            "text_config": TEXT | {"model_type": "llama"},
            "vision_config": VISION,
            "image_token_id": IMAGE,
            "scale_factor": 2,
            "pad_token_id": PAD,
        },
        rows,
        arguments,
        {(0, 0): "6 crops of 2 x 2 + 2 x 2", (0, 1): "2 x 2", (2, 0): "2 crops of 2 x 2 + 2 x 2"},
        (
            Probe("pixel_values", (0, 4, *patch_pixels(1, 0, 2 * PATCH)), 0, 0, 4, 1, 0),
            Probe("pixel_values", (0, 6, *patch_pixels(0, 1, 2 * PATCH)), 0, 0, 6, 0, 1),
            Probe("pixel_values", (0, 7, *patch_pixels(1, 1, 2 * PATCH)), 0, 1, 0, 1, 1),
            Probe("pixel_values", (2, 1, *patch_pixels(0, 1, 2 * PATCH)), 2, 0, 1, 0, 1),
        ),
    )


def any_resolution_arguments() -> dict[str, Any]:
    """Images of 20 x 36, 40 x 20 and 30 x 30 pixels, in 2 x 2, 2 x 1 and 2 x 2 crops and whole."""
    sizes = torch.tensor([[20, 36], [40, 20], [30, 30]])
    return {"pixel_values": pixels(3, 5, 3, PIXELS, PIXELS), "image_sizes": sizes}


# The first is put on 32 x 32, of whose 8 rows of patches it fills 4 and a bit: 2 above and 2 below are cut off.
PINPOINTS = [[16, 32], [32, 16], [32, 32]]
WIDE, TALL, LARGE = SQUARE + 4 * 9, SQUARE + 8 * 5, SQUARE + 8 * 9
ANY_RESOLUTION = {(0, 0): "4 x 4 + 4 x 8", (0, 1): "4 x 4 + 8 x 4", (2, 0): "4 x 4 + 8 x 8"}

CLIP = VISION | {"model_type": "clip_vision_model"}
SIGLIP = VISION | {"model_type": "siglip_vision_model", "vision_use_head": False}
LLAMA = TEXT | {"model_type": "llama"}
QWEN2 = TEXT | {"model_type": "qwen2"}

LLAVA = {"text_config": LLAMA, "vision_config": CLIP, "image_token_index": IMAGE, "vision_feature_layer": -1}
ONEVISION = {
    "text_config": QWEN2,
    "vision_config": SIGLIP,
    "image_token_index": IMAGE,
    "video_token_index": VIDEO,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
    "image_grid_pinpoints": PINPOINTS,
}
GEMMA_TEXT = TEXT | {"query_pre_attn_scalar": 8, "sliding_window": 64}
QUERIES = 3
QFORMER = SIZES | {"vocab_size": VOCAB_SIZE, "cross_attention_frequency": 1, "encoder_hidden_size": 32}


def blip(model_type: str, **arguments: Any) -> Case:
    return Case(
        model_type,
        {
            "text_config": LLAMA,
            "vision_config": VISION,
            "qformer_config": QFORMER,
            "num_query_tokens": QUERIES,
            "image_token_index": IMAGE,
        },
        [
            image(QUERIES, 0) + image(QUERIES, 1) + BEGIN + text(4),
            BEGIN + text(6),
            image(QUERIES, 0) + BEGIN + text(2),
        ],
        lambda: three_images() | arguments,
        dict.fromkeys([(0, 0), (0, 1), (2, 0)], "unknown: each query token reads the whole image"),
    )


def onevision_arguments() -> dict[str, Any]:
    """Two images in the first prompt, so that each is whole only, one in the third; a video of three frames."""
    return {
        "pixel_values": pixels(3, 5, 3, PIXELS, PIXELS),
        "image_sizes": torch.tensor([[20, 36], [40, 20], [30, 30]]),
        "batch_num_images": torch.tensor([2, 0, 1]),
        "pixel_values_videos": pixels(1, 3, 3, PIXELS, PIXELS),
    }


def pixtral_image(rows: int, columns: int, number: int) -> list[Token]:
    """Each row ends with a break, the last with the end."""
    tokens: list[Token] = []
    for row in range(rows):
        tokens += image(columns, number) + mark(94 if row < rows - 1 else 95)
    return tokens


CASES = {
    "llava": Case("llava", LLAVA, SIDE_BY_SIDE, three_images, SQUARES, SQUARE_PROBES),
    "llava, full features": Case(
        "llava",
        LLAVA | {"vision_feature_select_strategy": "full"},
        [
            BEGIN + image(SQUARE + 1, 0) + image(SQUARE + 1, 1) + text(4),
            BEGIN + text(6),
            BEGIN + text(2) + image(SQUARE + 1, 0) + text(3),
        ],
        three_images,
        SQUARES,
        SQUARE_PROBES,
    ),
    "llava with pixtral": Case(
        "llava",
        LLAVA
        | {
            "vision_config": VISION | {"model_type": "pixtral", "head_dim": 8},
            "vision_feature_select_strategy": "full",
        },
        [
            BEGIN + text(2) + pixtral_image(4, 3, 0) + pixtral_image(2, 4, 1) + text(4),
            BEGIN + text(6),
            BEGIN + pixtral_image(1, 2, 0) + text(3),
        ],
        lambda: three_images() | {"image_sizes": torch.tensor([[16, 12], [8, 16], [4, 8]])},
        {(0, 0): "4 x 3", (0, 1): "2 x 4", (2, 0): "1 x 2"},
        (
            Probe("pixel_values", (0, *patch_pixels(2, 1)), 0, 0, 0, 2, 1),
            Probe("pixel_values", (1, *patch_pixels(1, 3)), 0, 1, 0, 1, 3),
        ),
    ),
    "llava_next": Case(
        "llava_next",
        {
            "text_config": LLAMA,
            "vision_config": CLIP,
            "image_token_index": IMAGE,
            "vision_feature_layer": -1,
            "image_grid_pinpoints": PINPOINTS,
        },
        [
            BEGIN + text(2) + image(WIDE, 0) + image(TALL, 1) + text(4),
            BEGIN + text(6),
            BEGIN + image(LARGE, 0) + text(3),
        ],
        any_resolution_arguments,
        ANY_RESOLUTION,
        (
            Probe("pixel_values", (0, 0, *patch_pixels(1, 2)), 0, 0, 0, 1, 2),
            # The second crop of the wide image lies right of the first, that of the tall one below it.
            Probe("pixel_values", (0, 2, *patch_pixels(3, 2)), 0, 0, 1, 3 - 2, SIDE + 2),
            Probe("pixel_values", (1, 2, *patch_pixels(1, 2)), 0, 1, 1, SIDE + 1, 2),
            Probe("pixel_values", (2, 3, *patch_pixels(0, 3)), 2, 0, 1, SIDE, 3),
        ),
    ),
    "llava_onevision": Case(
        "llava_onevision",
        ONEVISION,
        [
            text(2) + image(SQUARE + 1, 0) + text(1) + image(13, 1, VIDEO) + image(SQUARE + 1, 2) + text(4),
            text(6),
            image(LARGE, 0) + text(3),
        ],
        onevision_arguments,
        {(0, 0): "4 x 4", (0, 1): "3 frames of 2 x 2", (0, 2): "4 x 4", (2, 0): "4 x 4 + 8 x 8"},
        (
            Probe("pixel_values", (1, 0, *patch_pixels(1, 2)), 0, 2, 0, 1, 2),
            Probe("pixel_values", (2, 4, *patch_pixels(1, 2)), 2, 0, 1, SIDE + 1, SIDE + 2),
            # Halved by interpolation, which reads four patches for one token.
            Probe("pixel_values_videos", (0, 1, *patch_pixels(2, 1)), 0, 1, 1, 1, 0),
        ),
        videos=frozenset({(0, 1)}),
    ),
    "llava_onevision, scaled down": Case(
        "llava_onevision",
        # 1 crop at most: 4 x 8 patches shrink by the square root of 2, 8 x 8 by 2.
        ONEVISION | {"vision_aspect_ratio": "anyres_max_1"},
        [
            text(2) + image(SQUARE + 2 * 6, 0) + text(1) + image(SQUARE + 5 * 3, 1) + text(4),
            text(6),
            image(SQUARE + 4 * 5, 0) + text(3),
        ],
        any_resolution_arguments,
        {(0, 0): "4 x 4 + 2 x 5", (0, 1): "4 x 4 + 5 x 2", (2, 0): "4 x 4 + 4 x 4"},
    ),
    "qwen2_vl": qwen("qwen2_vl", hidden_size=32, mlp_ratio=1),
    "qwen2_5_vl": qwen("qwen2_5_vl", window_size=16, fullatt_block_indexes=[1]),
    "qwen3_vl": qwen("qwen3_vl", frames_apart=True, deepstack_visual_indexes=[0], num_position_embeddings=16),
    "internvl": Case(
        "internvl",
        {
            "text_config": QWEN2,
            "vision_config": SIZES | {"image_size": [PIXELS, PIXELS], "patch_size": [PATCH, PATCH]},
            "image_token_id": IMAGE,
            "downsample_ratio": 0.5,
        },
        [text(2) + framed(12, 0) + framed(4, 1) + text(4), text(6), framed(8, 0) + text(3)],
        lambda: {"pixel_values": pixels(6, 3, PIXELS, PIXELS)},
        {(0, 0): "3 crops of 2 x 2", (0, 1): "2 x 2", (2, 0): "2 crops of 2 x 2"},
        (
            Probe("pixel_values", (1, *patch_pixels(1, 0, 2 * PATCH)), 0, 0, 1, 1, 0),
            Probe("pixel_values", (3, *patch_pixels(0, 1, 2 * PATCH)), 0, 1, 0, 0, 1),
            Probe("pixel_values", (5, *patch_pixels(0, 1, 2 * PATCH)), 2, 0, 1, 0, 1),
        ),
    ),
    "paligemma": Case(
        "paligemma",
        {
            "text_config": TEXT | {"model_type": "gemma"},
            "vision_config": SIGLIP | {"projection_dim": 32},
            "projection_dim": 32,
            "image_token_index": IMAGE,
        },
        [
            image(SQUARE, 0) + image(SQUARE, 1) + BEGIN + text(4),
            BEGIN + text(6),
            image(SQUARE, 0) + BEGIN + text(3),
        ],
        three_images,
        SQUARES,
        SQUARE_PROBES,
    ),
    "gemma3": Case(
        "gemma3",
        {
            "text_config": GEMMA_TEXT,
            "vision_config": SIGLIP,
            "mm_tokens_per_image": 4,
            "boi_token_index": 94,
            "eoi_token_index": 95,
            "image_token_index": IMAGE,
        },
        [
            BEGIN + text(2) + framed(4, 0) + text(1) + framed(4, 1) + text(4),
            BEGIN + text(6),
            BEGIN + framed(4, 0) + text(3),
        ],
        three_images,
        dict.fromkeys([(0, 0), (0, 1), (2, 0)], "2 x 2"),
        (
            Probe("pixel_values", (0, *patch_pixels(1, 0, 2 * PATCH)), 0, 0, 0, 1, 0),
            Probe("pixel_values", (2, *patch_pixels(0, 1, 2 * PATCH)), 2, 0, 0, 0, 1),
        ),
    ),
    "idefics3": idefics("idefics3"),
    "smolvlm": idefics("smolvlm"),
    "blip-2": blip("blip-2"),
    "instructblip": blip("instructblip", qformer_input_ids=torch.full((3, 4), 5)),
}


def tiny_mllama() -> Any:
    """Its second layer is cross attention."""
    text_config = TEXT | {
        "cross_attention_layers": [1],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    vision_config = VISION | {
        "num_global_layers": 1,
        "attention_heads": 4,
        "vision_output_dim": 64,
        "intermediate_layers_indices": [0],
        "supported_aspect_ratios": [[1, 1]],
        "max_num_tiles": 1,
    }
    torch.manual_seed(0)
    config = CONFIG_MAPPING["mllama"](text_config=text_config, vision_config=vision_config, image_token_index=IMAGE)
    return AutoModelForImageTextToText.from_config(config).eval()
