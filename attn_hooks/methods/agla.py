"""AGLA: decoding with the sum of two streams, one of which sees only the part of the image that the question is about.

Source: An et al., "AGLA: Mitigating Object Hallucinations in Large Vision-Language Models with Assembly of Global and Local
Attention", CVPR 2025, arXiv 2406.12718. With the logits l of the prompt and l' of the same prompt whose images are black but
for the share rho of their pixels that is most relevant to the question,

    l  <- l + alpha l'   for tokens with l >= max l + log(beta), minus infinity for all others

Published: alpha 2, beta 0.5, sampling at temperature 1; relevance by GradCAM of BLIP's image-text matching score
(``BlipRelevance``), blurred and upsampled, and rho = 1 - c / 2 with c the cosine of its contrastive head. The identity is alpha
0 and beta 0; where nothing is masked (``keep`` 1), greedy search finds the same tokens.

``relevance="attention"``, the default, is a variant that needs no second model: the edited model's own attention of the prompt's
last row to the image's tokens, averaged over heads and ``layers``, read while the prompt runs. It has no cosine, so ``keep`` is
a parameter: 0.8, which the published rule gives for a cosine of 0.4. That and the layers are our choice, measured nowhere.

Pixels are masked as the model is given them, after its processor: black is (0 - mean) / std there, and the image is not resized
twice. The released code masks a square of 384 x 384 pixels and gives that to the processor. It also hands the second stream the
main one's cache, so that from the second token on its logits are (1 + alpha) l, a temperature of 1 / (1 + alpha); here the
second stream has a cache of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema, model_validator
from torch import Tensor
from torch.nn import functional

from attn_hooks.blip_relevance import BlipRelevance
from attn_hooks.call import AttentionCall
from attn_hooks.edit import Layers, Reads, Scope, Writes
from attn_hooks.errors import AttnHooksError, error
from attn_hooks.layout import ImageSpan
from attn_hooks.model_info import ModelInfo
from attn_hooks.prompt import last_row_logits, require_all_heads
from attn_hooks.streams import Prompt, SecondStream, StreamEdit
from attn_kernels import Primitive

ATTENTION = "attention of the prompt's last row"
KEEP_BY_ATTENTION = 0.8
BLUR = 0.02  # standard deviation, as a share of the longer side

Channels = tuple[float, float, float]
_CLIP: tuple[Channels, Channels] = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_HALF: tuple[Channels, Channels] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
# Mean and standard deviation by the vision tower, where transformers' processors of all its families agree.
NORMALISATION = {
    "clip_vision_model": _CLIP,
    "pixtral": _CLIP,
    "qwen2_vl_vision": _CLIP,
    "qwen2_5_vl_vision": _CLIP,
    "siglip_vision_model": _HALF,
}


def _relevance(value: Any) -> Any:
    if value == "attention" or isinstance(value, BlipRelevance):
        return value
    raise ValueError("give 'attention' or a BlipRelevance, which is made of models and stands in no file")


class AGLA(StreamEdit):
    """alpha: weight of the stream that sees a part of the image. relevance: what chooses that part."""

    method: ClassVar[str] = "agla"
    source: ClassVar[str] = "AGLA, arXiv 2406.12718"
    reads: ClassVar[frozenset[Reads]] = frozenset({"query", "key", "tokens"})
    writes: ClassVar[Writes] = "next-token"
    scope: ClassVar[Scope] = "per-row"
    keeps_state: ClassVar[bool] = True
    fixed_in_decode: ClassVar[bool] = True
    changes_pixels: ClassVar[bool] = True

    alpha: float = Field(default=2.0, ge=0.0, description="weight of the second stream; 0: identity")
    beta: float = Field(default=0.5, ge=0.0, le=1.0, description="cutoff, as a share of the likeliest token; 0: none")
    relevance: Annotated[
        Literal["attention"] | BlipRelevance,
        BeforeValidator(_relevance),
        PlainSerializer(str, when_used="json"),
        WithJsonSchema({"const": "attention", "type": "string"}),
    ] = Field(
        default="attention", description="'attention': the model's own; a BlipRelevance: the published one, from Python"
    )
    skip: bool = Field(
        default=False, description="whether the second stream runs apart, and only in steps that need it"
    )
    keep: float | None = Field(
        default=None, gt=0.0, le=1.0, description="share of pixels kept; None: 0.8, or by BLIP's cosine"
    )
    layers: Annotated[Layers, Field(min_length=1)] | None = Field(
        default=None, description="layers whose attention makes the map; None: the quarter around the middle"
    )
    image_mean: Channels | None = Field(default=None, description="of the model's processor; None: its vision tower's")
    image_std: Channels | None = Field(default=None, description="of the model's processor; None: its vision tower's")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.relevance != "attention" and self.layers is not None:
            raise ValueError("layers are of relevance='attention'; a BlipRelevance has its block")
        if (self.image_mean is None) != (self.image_std is None):
            raise ValueError("give image_mean and image_std, or neither")
        if self.image_std is not None and min(self.image_std) <= 0:
            raise ValueError("image_std is not above 0")
        return self

    def layers_in(self, model: ModelInfo) -> tuple[int, ...]:
        if self.relevance != "attention":
            return ()
        if self.layers is not None:
            return tuple(sorted(set(self.layers)))
        count = len(model.layer_indices)
        first = 3 * count // 8
        return model.layer_indices[first : max(5 * count // 8, first + 1)]

    def check(self, model: ModelInfo) -> None:
        super().check(model)
        self._normalisation(model)

    @property
    def in_step(self) -> bool:
        return not self.skip

    @property
    def cutoff(self) -> float:
        return self.beta

    def combine(self, logits: Tensor, second: Tensor) -> Tensor:
        return logits + self.alpha * second

    def primitives(self, call: AttentionCall) -> list[Primitive]:
        """None: reads the weights of the last row, ``(B, M)`` averaged over heads, where a prompt begins."""
        if call.phase != "prefill":
            return []
        require_all_heads(self, call)
        with torch.no_grad():
            logits, visible = last_row_logits(call)
            weights = logits.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num(0.0).mean(1)
        weights = functional.pad(weights, (call.key_start, 0))[:, : call.layout.length]
        call.of_forward.setdefault((ATTENTION,), {})[call.layer] = weights
        return []

    def second_stream(self, prompt: Prompt) -> SecondStream:
        pixels = prompt.given.get("pixel_values")
        if not isinstance(pixels, Tensor):
            raise error("no-pixels", method=self.method, model=prompt.model.model_class)
        pixels = pixels.clone()
        mean, std = torch.tensor(self._normalisation(prompt.model), device=pixels.device)
        for image, picture in self._pictures(prompt, pixels):
            relevance, keep = self._relevance_of(prompt, image, picture, mean, std)
            picture.blacken(most_relevant(upsampled(relevance, picture.size), keep), (-mean / std).to(pixels))
        return SecondStream({"pixel_values": pixels})

    def _relevance_of(
        self, prompt: Prompt, image: ImageSpan, picture: Picture, mean: Tensor, std: Tensor
    ) -> tuple[Tensor, float]:
        """A map ``(rows, columns)`` float32 on the device of the pixels, and the share of them to keep."""
        if isinstance(self.relevance, BlipRelevance):
            question = self._question(prompt, image, self.relevance)
            shown = (picture.image().float() * std[:, None, None] + mean[:, None, None]).clamp(0, 1)
            relevance, keep = self.relevance(shown, question)
        else:
            by_layer = prompt.of_forward[ATTENTION,]
            weights = torch.stack([row[image.sample].cpu() for _, row in sorted(by_layer.items())]).mean(0)
            assert image.grids is not None
            relevance, keep = weights[image.patches(image.grids[0])].float(), KEEP_BY_ATTENTION
        return relevance.to(picture.view.device), keep if self.keep is None else self.keep

    def _question(self, prompt: Prompt, image: ImageSpan, blip: BlipRelevance) -> str:
        question = ""
        if prompt.tokens is not None:
            last = prompt.layout.images_of(image.sample)[-1].stop
            real = prompt.layout.valid[image.sample, last:].cpu()
            question = blip.question_of(prompt.tokens[image.sample, last:].cpu()[real].tolist())
        if not question.strip():
            raise self._refused(prompt, image, "no text stands behind the prompt's last image to be its question")
        return question

    def _normalisation(self, model: ModelInfo) -> tuple[Channels, Channels]:
        if self.image_mean is not None and self.image_std is not None:
            return self.image_mean, self.image_std
        assert model.vision is not None, "it has image keys"
        tower = getattr(getattr(model.vision.config, "vision_config", None), "model_type", "unknown")
        if tower not in NORMALISATION:
            raise error("no-black", method=self.method, model=model.model_class, tower=tower)
        return NORMALISATION[tower]

    def _pictures(self, prompt: Prompt, pixels: Tensor) -> Iterator[tuple[ImageSpan, Picture]]:
        """The images of the prompts, in the order of their ``pixels``. Raises ``EditError`` where one is not a whole picture."""
        images = prompt.layout.images
        for image in images:
            if image.video:
                raise self._refused(prompt, image, "it is a video")
            if image.grids is None or len(image.grids) != 1:
                reason = f"its tokens are not one grid of the whole image: {image.grid_text()}"
                raise self._refused(prompt, image, reason)
        if pixels.ndim == 4 and len(pixels) == len(images):
            sizes = prompt.given.get("image_sizes")
            for place, image in enumerate(images):
                height, width = pixels.shape[-2:] if sizes is None else (int(side) for side in sizes[place])
                # As the flattened patches below are seen, each its own.
                yield image, Picture(pixels[place, :, None, :height, None, None, :width, None, None])
        elif pixels.ndim == 2 and isinstance(prompt.given.get("image_grid_thw"), Tensor):
            yield from zip(images, self._of_patches(prompt, pixels), strict=True)
        else:
            reason = f"pixel_values of shape {tuple(pixels.shape)} hold more than one picture of an image"
            raise self._refused(prompt, images[0], reason)

    def _of_patches(self, prompt: Prompt, pixels: Tensor) -> Iterator[Picture]:
        """Of the flattened patches of Qwen2-VL and its successors, one row a patch, those that make one token together."""
        assert prompt.model.vision is not None
        config, begin = prompt.model.vision.config.vision_config, 0
        merge, patch, frames = config.spatial_merge_size, config.patch_size, config.temporal_patch_size
        for _, down, across in prompt.given["image_grid_thw"].tolist():
            rows = pixels[begin : begin + down * across]
            begin += down * across
            shape = (down // merge, across // merge, merge, merge, -1, frames, patch, patch)
            yield Picture(rows.view(shape).permute(4, 5, 0, 2, 6, 1, 3, 7))

    def _refused(self, prompt: Prompt, image: ImageSpan, reason: str) -> AttnHooksError:
        model = prompt.model.model_class
        return error(
            "no-picture", method=self.method, model=model, image=image.image, sample=image.sample, reason=reason
        )


@dataclass(frozen=True)
class Picture:
    """One image in the pixels of a forward. ``view``: (channels, frames, three of rows, three of columns), both in order."""

    view: Tensor

    @property
    def size(self) -> tuple[int, int]:
        height, width = self.view.shape[2:5].numel(), self.view.shape[5:].numel()
        return height, width

    def image(self) -> Tensor:
        """``(channels, H, W)``: a copy of its first frame."""
        return self.view[:, 0].reshape(-1, *self.size)

    def blacken(self, keep: Tensor, black: Tensor) -> None:
        """In place: pixels out of ``keep`` ``(H, W)`` become ``black`` ``(channels,)``."""
        shown = keep.reshape(self.view.shape[2:])
        self.view.copy_(torch.where(shown, self.view, black.reshape(-1, *[1] * (self.view.ndim - 1))))


def upsampled(relevance: Tensor, size: tuple[int, int]) -> Tensor:
    """A map ``(rows, columns)`` on ``size`` pixels: cubic interpolation, then a Gaussian blur."""
    fine = functional.interpolate(relevance[None, None], size, mode="bicubic")[0, 0]
    height, width = (_blur(side, BLUR * max(size)).to(fine) for side in size)
    return height @ fine @ width.T


def _blur(side: int, deviation: float) -> Tensor:
    """``(side, side)``: a Gaussian up to four deviations, mirrored at the borders, each row a sum of 1."""
    reach = int(4 * deviation + 0.5)
    offset = torch.arange(-reach, reach + 1)
    weight = torch.exp(-0.5 * (offset.double() / deviation) ** 2)
    place = (torch.arange(side)[:, None] + offset) % (2 * side)
    place = torch.where(place < side, place, 2 * side - 1 - place)
    return torch.zeros(side, side, dtype=torch.double).scatter_add_(
        1, place, (weight / weight.sum()).expand(side, -1).contiguous()
    )


def most_relevant(relevance: Tensor, keep: float) -> Tensor:
    """Bool like ``relevance``: its ``keep`` share of largest values, rounded to the nearest number, and all that equal the
    smallest of these."""
    kept = max(1, round(keep * relevance.numel()))
    return relevance >= relevance.flatten().kthvalue(relevance.numel() - kept + 1).values
