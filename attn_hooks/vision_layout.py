"""Where each family of vision-language models puts its images among the tokens: one small function a family.

A family's function is given the config, the arguments of the model's forward and the tokens that carry its image token id,
and says how many of these each image takes and which rectangles of patches they are; the model scatters its image features
over these tokens in the same order. generate() encodes the images first and gives the forward their features in place of
pixels and sizes, so a function reads either. ``FAMILIES``, at the end, is the table by ``config.model_type``. To add a
family, write its function, say which file of transformers it follows, and add a line there and in tests/hooks/vlms.py.

Where the counts cannot be told, a run of image tokens counts as one image, without a grid, and the span says why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from attn_hooks.layout import ImageSpan, PatchGrid


class Visual(NamedTuple):
    """One image or video as a family's function finds it: how many tokens it takes, and their grids."""

    tokens: int
    grids: tuple[PatchGrid, ...] | None
    why_no_grid: str = ""


@dataclass(frozen=True)
class Marked:
    """The tokens ``(B, N)`` of one forward, on the host, that carry one token id."""

    ids: Tensor
    token_id: int

    @cached_property
    def places(self) -> list[tuple[int, int]]:
        """(row, position) of each marked token, row by row: the order in which features are scattered."""
        return [(row, position) for row, position in (self.ids == self.token_id).nonzero().tolist()]

    @property
    def count(self) -> int:
        return len(self.places)

    @cached_property
    def runs(self) -> list[tuple[int, int, int]]:
        """(row, start, stop) of each unbroken run of marked tokens."""
        return [(row, start, stop) for (row, places) in self._rows() for start, stop in _runs(places)]

    def _rows(self) -> list[tuple[int, list[int]]]:
        rows: dict[int, list[int]] = {}
        for row, position in self.places:
            rows.setdefault(row, []).append(position)
        return list(rows.items())


@dataclass(frozen=True)
class Given:
    """What a forward is given: its arguments, or ``features`` ``(tokens, E)`` of each image (or video), encoded before."""

    arguments: Mapping[str, Any]
    features: list[Tensor] | None

    def get(self, name: str) -> Any:
        return self.arguments.get(name)

    @property
    def number(self) -> int:
        """How many images, tiles or videos the tower was or will be given."""
        return len(self.features if self.features is not None else self.get("pixel_values"))


Found = list[Visual] | str
"""The images in token order, or why they cannot be told."""
Reader = Callable[[Any, Given, Marked], Found]


@dataclass(frozen=True)
class Family:
    """How one family is read. Without the arguments ``needs`` and ``video_needs``, or features, nothing can be told.

    ``images`` None: they reach the text through cross attention, and are no keys of self-attention. ``embeds_outside``: its
    generate() embeds the tokens and runs the language model without the model's own forward.
    """

    images: Reader | None
    needs: tuple[str, ...] = ("pixel_values",)
    videos: Reader | None = None
    video_needs: tuple[str, ...] = ()
    embeds_outside: bool = False


@dataclass(frozen=True)
class VisionLayout:
    """Finds the images of a model's prompts. ``image_token_id`` stands where a forward puts image features."""

    config: Any = field(repr=False)
    image_token_id: int
    family: Family

    @property
    def video_token_id(self) -> int | None:
        return getattr(self.config, "video_token_id", None)

    @property
    def by_cross_attention(self) -> bool:
        return self.family.images is None

    def images_in(self, input_ids: Tensor, given: Mapping[str, Any]) -> tuple[ImageSpan, ...]:
        """The images and videos in ``input_ids`` ``(B, N)``, by sample, numbered in the order in which they begin.

        ``given``: the forward's arguments, what the processor returned. Waits for the device.
        """
        if self.by_cross_attention:
            return ()
        family, ids, spans = self.family, input_ids.cpu(), list[ImageSpan]()
        if family.images is not None:
            images = Given(given, _features(given, "image"))
            spans += self._read(family.images, family.needs, images, Marked(ids, self.image_token_id))
        if family.videos is not None and self.video_token_id is not None:
            videos = Given(given, _features(given, "video"))
            found = self._read(family.videos, family.video_needs, videos, Marked(ids, self.video_token_id))
            spans += [replace(span, video=True) for span in found]
        spans.sort(key=lambda span: (span.sample, span.start))
        counted: dict[int, int] = {}
        for place, span in enumerate(spans):
            number = counted.setdefault(span.sample, 0)
            counted[span.sample] += 1
            spans[place] = replace(span, image=number)
        return tuple(spans)

    def _read(self, reader: Reader, needs: tuple[str, ...], given: Given, marked: Marked) -> list[ImageSpan]:
        if not marked.count:
            return []
        missing = [name for name in needs if given.get(name) is None and given.features is None]
        found = f"the forward was given no {missing[0]}" if missing else reader(self.config, given, marked)
        return _run_by_run(marked, found) if isinstance(found, str) else _placed(marked, found)


def vision_layout_of(config: Any, image_token_id: int | None) -> VisionLayout | None:
    """None for a model without image tokens. A family that is not in the table is read without grids."""
    if image_token_id is None:
        return None
    model_type = getattr(config, "model_type", None)
    return VisionLayout(config, image_token_id, FAMILIES.get(str(model_type), _unknown_family(model_type)))


def _placed(marked: Marked, visuals: list[Visual]) -> list[ImageSpan]:
    """The images laid over the marked tokens in their order."""
    expected = sum(visual.tokens for visual in visuals)
    if expected != marked.count:
        reason = f"the prompt has {marked.count} tokens for its images, which make {expected}"
        return _run_by_run(marked, reason)
    spans, begin = [], 0
    for visual in visuals:
        places = marked.places[begin : begin + visual.tokens]
        begin += visual.tokens
        if not places or places[0][0] != places[-1][0]:
            return _run_by_run(marked, "an image of the processor's would lie in two prompts")
        runs = tuple(_runs([position for _, position in places]))
        spans.append(ImageSpan(places[0][0], 0, runs, visual.grids, why_no_grid=visual.why_no_grid))
    return spans


def _run_by_run(marked: Marked, reason: str) -> list[ImageSpan]:
    return [ImageSpan(row, 0, ((start, stop),), None, why_no_grid=reason) for row, start, stop in marked.runs]


def _runs(positions: list[int]) -> list[tuple[int, int]]:
    breaks = [place + 1 for place, (left, right) in enumerate(pairwise(positions)) if right != left + 1]
    edges = [0, *breaks, len(positions)]
    return [(positions[start], positions[stop - 1] + 1) for start, stop in pairwise(edges)]


def _features(arguments: Mapping[str, Any], modality: str) -> list[Tensor] | None:
    """What generate() or the user encoded before the forward."""
    encoded = arguments.get("mm_encoder_outputs")
    output = encoded.get(modality) if isinstance(encoded, Mapping) else None
    features = getattr(output, "pooler_output", None)
    return None if features is None else list(features)


def _unknown_family(model_type: object) -> Family:
    def images(_config: Any, _given: Given, _marked: Marked) -> Found:
        return f"no entry for {model_type!r} in attn_hooks/vision_layout.py"

    return Family(images, needs=())


def _whole(rows: int, columns: int, offset: int = 0) -> tuple[PatchGrid, ...]:
    return (PatchGrid(offset, rows, columns, columns),)


def _several(count: int, rows: int, columns: int, shows: Literal["crop", "frame"]) -> tuple[PatchGrid, ...]:
    """Side by side, all alike."""
    size = rows * columns
    return tuple(PatchGrid(number * size, rows, columns, columns, shows) for number in range(count))


def _height_and_width(size: Any) -> tuple[int, int]:
    """Of a config's number for a square, or its pair."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _patches(config: Any, given: Given) -> tuple[int, int]:
    """Rows and columns of patches of each image (or tile): from its pixels, else from the one size that the tower takes."""
    pixels = given.get("pixel_values")
    size = config.vision_config.image_size if pixels is None else pixels.shape[-2:]
    (height, width), (down, across) = _height_and_width(size), _height_and_width(config.vision_config.patch_size)
    return height // down, width // across


def _as_list(values: Any) -> list[Any]:
    return values.tolist() if isinstance(values, Tensor) else list(values)


def llava(config: Any, given: Given, marked: Marked) -> Found:
    """H/p x W/p, one token a patch, images side by side; where the class token is kept it comes first.

    With a Pixtral tower each image has its own size (``image_sizes``), and a text token ends each row.
    transformers: models/llava/modeling_llava.py, get_image_features; models/pixtral/processing_pixtral.py.
    """
    if config.vision_config.model_type == "pixtral":
        return _pixtral(config, given, marked)
    rows, columns = _patches(config, given)
    class_token = 1 if marked.count == given.number * (rows * columns + 1) else 0
    return [Visual(rows * columns + class_token, _whole(rows, columns, class_token))] * given.number


def _pixtral(config: Any, given: Given, marked: Marked) -> Found:
    sizes, patch = given.get("image_sizes"), config.vision_config.patch_size
    if sizes is not None:
        shapes = [(height // patch, width // patch) for height, width in _as_list(sizes)]
    elif given.features is not None:
        shapes, runs = [], iter(marked.runs)
        for feature in given.features:
            columns = next(((stop - start) for _, start, stop in runs), 1)
            shapes.append((len(feature) // columns, columns))
            for _ in range(len(feature) // columns - 1):
                next(runs, None)
    else:
        return "the forward was given no image_sizes"
    return [Visual(rows * columns, _whole(rows, columns)) for rows, columns in shapes]


def llava_next(config: Any, given: Given, _marked: Marked) -> Found:
    """The whole image, then the same at higher resolution: its crops put together, padding cut off, a newline ends each row.

    transformers: models/llava_next/modeling_llava_next.py, pack_image_features.
    """
    if given.features is not None:
        return _packed(config, given.features)
    return [_any_resolution(config, size) for size in _as_list(given.get("image_sizes"))]


def llava_onevision(config: Any, given: Given, _marked: Marked) -> Found:
    """As LLaVA-NeXT, scaled down where it has more than ``anyres_max_9`` crops allow; one of several images in a prompt
    (``batch_num_images``) is the whole image and a newline.

    transformers: models/llava_onevision/modeling_llava_onevision.py, get_image_features, pack_image_features.
    """
    if given.features is not None:
        return _packed(config, given.features)
    sizes = _as_list(given.get("image_sizes"))
    most_crops = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
    in_prompt = given.get("batch_num_images")
    alone = [True] * len(sizes)
    if in_prompt is not None:
        alone = [number == 1 for number in _as_list(in_prompt) for _ in range(number)]
    if len(alone) != len(sizes):
        return f"batch_num_images counts {len(alone)} images and image_sizes {len(sizes)}"
    side = config.vision_config.image_size // config.vision_config.patch_size
    one_of_several = Visual(side * side + 1, _whole(side, side))
    return [
        _any_resolution(config, size, most_crops) if by_itself else one_of_several
        for size, by_itself in zip(sizes, alone, strict=True)
    ]


def _any_resolution(config: Any, size: Any, most_crops: int | None = None) -> Visual:
    """An image of ``size`` (height, width) before the processor, as the LLaVA family packs it."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    encoder = config.vision_config.image_size
    side = encoder // config.vision_config.patch_size
    down, across = get_anyres_image_grid_shape(list(size), list(config.image_grid_pinpoints), encoder)
    # The model's own cut of the padding, on a tensor without memory: only the shape is wanted.
    together = torch.empty(1, down * side, across * side, device="meta")
    _, rows, columns = unpad_image(together, list(size)).shape
    if most_crops is not None:
        shrink = math.sqrt(rows * columns / (most_crops * side**2))
        if shrink > 1.1:
            rows, columns = int(rows // shrink), int(columns // shrink)
    fine = PatchGrid(side * side, rows, columns, columns + 1)
    return Visual(side * side + rows * (columns + 1), (*_whole(side, side), fine))


def _packed(config: Any, features: list[Tensor]) -> Found:
    """The same from the features: each image ends with its newline, so newlines are the features equal to the last one."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    visuals = []
    for feature in features:
        newlines = (feature[side * side :] == feature[-1]).all(-1).nonzero()[:, 0].tolist()
        rows, columns = len(newlines), newlines[0] if newlines else 0
        if side * side + rows * (columns + 1) != len(feature):
            return f"{len(feature)} features are no {side} x {side} patches and rows that end with a newline"
        fine = (PatchGrid(side * side, rows, columns, columns + 1),) if columns else ()
        visuals.append(Visual(len(feature), (*_whole(side, side), *fine)))
    return visuals


def llava_onevision_video(config: Any, given: Given, _marked: Marked) -> Found:
    """Frames of half the image's side, rounded up, then one newline.

    transformers: models/llava_onevision/modeling_llava_onevision.py, get_video_features, apply_pooling.
    """
    side = math.ceil(config.vision_config.image_size // config.vision_config.patch_size / 2)
    if given.features is not None:
        frames = [len(feature) // (side * side) for feature in given.features]
    else:
        videos, each = given.get("pixel_values_videos").shape[:2]
        frames = [each] * videos
    return [Visual(number * side * side + 1, _several(number, side, side, "frame")) for number in frames]


def qwen_vl(config: Any, given: Given, marked: Marked) -> Found:
    """h/m x w/m of ``image_grid_thw``, m the vision tower's spatial_merge_size.

    transformers: models/qwen2_vl/modeling_qwen2_vl.py, get_image_features; the same in qwen2_5_vl and qwen3_vl.
    """
    shapes = _merged(config, given, "image_grid_thw", marked)
    if isinstance(shapes, str):
        return shapes
    return [
        Visual(
            frames * rows * columns, _several(frames, rows, columns, "frame") if frames > 1 else _whole(rows, columns)
        )
        for frames, rows, columns in shapes
    ]


def qwen_vl_video(config: Any, given: Given, marked: Marked) -> Found:
    """t frames of h/m x w/m of ``video_grid_thw``; Qwen3-VL writes a time stamp before each frame.

    transformers: models/qwen2_vl/modeling_qwen2_vl.py, get_video_features; models/qwen3_vl/processing_qwen3_vl.py.
    """
    shapes = _merged(config, given, "video_grid_thw", marked)
    if isinstance(shapes, str):
        return shapes
    return [
        Visual(frames * rows * columns, _several(frames, rows, columns, "frame")) for frames, rows, columns in shapes
    ]


def _merged(config: Any, given: Given, grid_thw: str, marked: Marked) -> list[tuple[int, int, int]] | str:
    """Frames, rows and columns, in tokens: from the processor's grid, else from the tokens' rotary positions."""
    merge = config.vision_config.spatial_merge_size
    if given.get(grid_thw) is not None:
        return [(frames, height // merge, width // merge) for frames, height, width in _as_list(given.get(grid_thw))]
    positions = given.get("position_ids")
    if not isinstance(positions, Tensor) or positions.ndim != 3 or given.features is None:
        return f"the forward was given neither {grid_thw} nor position_ids of three parts"
    _, vertical, horizontal = positions[-3:].cpu()
    shapes, begin = [], 0
    for feature in given.features:
        places = marked.places[begin : begin + len(feature)]
        begin += len(feature)
        if not places:
            return f"the prompt has {marked.count} tokens for its images, which make {begin} and more"
        # Up to the first break: a frame of Qwen3-VL begins anew behind its time stamp.
        row, (start, stop) = places[0][0], _runs([position for _, position in places])[0]
        rows, columns = (len(axis[row, start:stop].unique()) for axis in (vertical, horizontal))
        shapes.append((len(feature) // (rows * columns), rows, columns))
    return shapes


def internvl(config: Any, given: Given, marked: Marked) -> Found:
    """Tiles side by side between a start and an end token, each (H/p x W/p) times downsample_ratio a side.

    How the tiles lie in the image, and whether the last is a thumbnail of it, the forward does not know. A video's frames
    are images to the model, and to us.
    transformers: models/internvl/modeling_internvl.py, get_image_features; processing_internvl.py, replace_image_token.
    """
    rows, columns = (int(side * config.downsample_ratio) for side in _patches(config, given))
    size = rows * columns
    lengths = [stop - start for _, start, stop in marked.runs]
    if any(length % size for length in lengths) or marked.count != given.number * size:
        return f"runs of {lengths} image tokens are not made of {given.number} tiles of {rows} x {columns}"
    return [
        Visual(length, _several(length // size, rows, columns, "crop") if length > size else _whole(rows, columns))
        for length in lengths
    ]


def paligemma(config: Any, given: Given, _marked: Marked) -> Found:
    """H/p x W/p, all images side by side before BOS.

    transformers: models/paligemma/modeling_paligemma.py, get_image_features; processing_paligemma.py.
    """
    rows, columns = _patches(config, given)
    return [Visual(rows * columns, _whole(rows, columns))] * given.number


def gemma3(config: Any, given: Given, _marked: Marked) -> Found:
    """A square of mm_tokens_per_image between a begin and an end token. A crop of pan-and-scan is an image to the model,
    and to us.

    transformers: models/gemma3/modeling_gemma3.py, Gemma3MultiModalProjector; processing_gemma3.py, replace_image_token.
    """
    side = math.isqrt(config.mm_tokens_per_image)
    return [Visual(side * side, _whole(side, side))] * given.number


def idefics3(config: Any, given: Given, marked: Marked) -> Found:
    """Crops row by row, each a square of H/p/scale_factor after two tokens (a mark, and its row and column), then the whole
    image after a mark and a "global" token; a small image comes whole only. More tokens stand where a row of crops ends.

    Which tokens these are the config does not say: the last image of a prompt ends with "global" image tokens and the mark.
    A video of SmolVLM is a list of whole images to the model, and to us.
    transformers: models/idefics3/modeling_idefics3.py, get_image_features; processing_idefics3.py, replace_image_token.
    """
    rows, columns = (side // config.scale_factor for side in _patches(config, given))
    visuals: list[Visual] = []
    for row in dict.fromkeys(row for row, _, _ in marked.runs):
        ids = marked.ids[row].tolist()
        runs = [(start, stop) for other, start, stop in marked.runs if other == row]
        lengths = {stop - start for start, stop in runs}
        if lengths != {rows * columns}:
            return f"runs of {sorted(lengths)} image tokens, where one crop makes {rows} x {columns}"
        last_start, last_stop = runs[-1]
        if last_stop == len(ids) or runs[0][0] < 2:
            return "no mark stands around the image tokens"
        mark, whole_image = ids[last_stop], ids[last_start - 1]
        if any(ids[start - 2] != mark for start, _ in runs):
            return "the tokenizer splits the names of rows and columns, so that crops cannot be told from images"
        crops: list[tuple[int, int]] = []
        for start, stop in runs:
            if ids[start - 1] != whole_image:
                crops.append((start, stop))
            else:
                visuals.append(_with_crops(crops, rows, columns))
                crops = []
    return visuals


def _with_crops(crops: list[tuple[int, int]], rows: int, columns: int) -> Visual:
    """An image of Idefics3: its crops, each from ``start`` to ``stop``, and then the whole of it."""
    size = rows * columns
    new_row = [place + 1 for place, (left, right) in enumerate(pairwise(crops)) if right[0] - left[1] > 2]
    edges = [0, *new_row, len(crops)]
    per_row = {stop - start for start, stop in pairwise(edges)}
    across = per_row.pop() if len(per_row) == 1 else 0
    grids = [
        PatchGrid(number * size, rows, columns, columns, "crop", divmod(number, across) if across else None)
        for number in range(len(crops))
    ]
    return Visual((len(crops) + 1) * size, (*grids, *_whole(rows, columns, len(crops) * size)))


def query_tokens(config: Any, _given: Given, marked: Marked) -> Found:
    """num_query_tokens an image; each query reads the whole image, so there is no grid.

    transformers: models/blip_2/modeling_blip_2.py, models/instructblip/modeling_instructblip.py, get_image_features.
    """
    each = config.num_query_tokens
    return [Visual(each, None, "each query token reads the whole image")] * (marked.count // each)


_QWEN = Family(qwen_vl, ("image_grid_thw",), qwen_vl_video, ("video_grid_thw",))
_QUERY_TOKENS = Family(query_tokens, needs=(), embeds_outside=True)

FAMILIES: dict[str, Family] = {
    "llava": Family(llava),
    "llava_next": Family(llava_next, ("image_sizes",)),
    "llava_onevision": Family(llava_onevision, ("image_sizes",), llava_onevision_video, ("pixel_values_videos",)),
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
    "internvl": Family(internvl),
    "paligemma": Family(paligemma),
    "gemma3": Family(gemma3),
    "idefics3": Family(idefics3),
    "smolvlm": Family(idefics3),
    "instructblip": _QUERY_TOKENS,
    "blip-2": _QUERY_TOKENS,
    "mllama": Family(images=None),
}
