"""VCD: visual contrastive decoding, against the same prompt with a noised image.

Source: Leng et al., "Mitigating Object Hallucinations in Large Vision-Language Models through Visual Contrastive Decoding",
CVPR 2024, arXiv 2311.16922, equations 3 to 5. With the logits l of the prompt and l' of the same prompt whose pixels x are
diffused to step T of 1000,

    x' = sqrt(a_T) x + sqrt(1 - a_T) noise,   a_T = product over t <= T of (1 - b_t),  b_t sigmoid from 1e-5 to 5e-3
    l  <- (1 + alpha) l - alpha l'   for tokens with l >= max l + log(beta), minus infinity for all others

Defaults: alpha 1, beta 0.1 (0.2 in the POPE script), T 500, and sampling at temperature 1 (``do_sample=True``); greedy search and
beams take the same logits here. The identity is alpha 0 and beta 0.

The noise is drawn once an image, on the CPU, from ``seed``: each image of a batch gets the same, so that a result does not
depend on its neighbours, and beams of a prompt see one image. Families that flatten all patches of a batch into one list
(Qwen2-VL and its successors) draw it over the patches of each image. Steps in which one token alone passes the cutoff are
certain without the second stream, which then does not run.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from attn_hooks.edit import NonNegative, Reads, Scope, Writes
from attn_hooks.errors import error
from attn_hooks.streams import Prompt, SecondStream, StreamEdit

DIFFUSION_STEPS, LOWEST_BETA, HIGHEST_BETA, SIGMOID_RANGE = 1000, 1e-5, 5e-3, 6.0
PIXELS = {"pixel_values": "image_grid_thw", "pixel_values_videos": "video_grid_thw"}
"""With the argument that says how many flattened patches an image has."""


class VCD(StreamEdit):
    """alpha: weight of the contrast. beta: how likely a token must be, as a share of the likeliest."""

    method: ClassVar[str] = "vcd"
    source: ClassVar[str] = "VCD, arXiv 2311.16922, eq. 3 to 5"
    reads: ClassVar[frozenset[Reads]] = frozenset({"tokens"})
    writes: ClassVar[Writes] = "next-token"
    scope: ClassVar[Scope] = "per-row"
    keeps_state: ClassVar[bool] = True
    changes_pixels: ClassVar[bool] = True

    alpha: float = Field(default=1.0, ge=0.0, description="weight of the contrast; 0: identity")
    beta: float = Field(default=0.1, ge=0.0, le=1.0, description="cutoff, as a share of the likeliest token; 0: none")
    step: int = Field(default=500, ge=0, lt=DIFFUSION_STEPS, description="step of the diffusion, out of 1000")
    seed: NonNegative = Field(default=0, description="of the noise")
    skip: bool = Field(
        default=False, description="whether the second stream runs apart, and only in steps that need it"
    )

    @property
    def in_step(self) -> bool:
        return not self.skip

    @property
    def cutoff(self) -> float:
        return self.beta

    def second_stream(self, prompt: Prompt) -> SecondStream:
        given = prompt.given
        pixels = {name: given[name] for name in PIXELS if isinstance(given.get(name), Tensor)}
        if not pixels:
            raise error("no-pixels", method=self.method, model=prompt.model.model_class)
        return SecondStream({name: self.noised(value, given.get(PIXELS[name])) for name, value in pixels.items()})

    def combine(self, logits: Tensor, second: Tensor) -> Tensor:
        return (1 + self.alpha) * logits - self.alpha * second

    def noised(self, pixels: Tensor, grids: Tensor | None = None) -> Tensor:
        """Equation 3 on ``pixels``, images first. A list of flattened patches ``(patches, channels)`` is one image, or those of
        ``grids`` ``(images, 3)``, one after the other."""
        if pixels.ndim == 2 and grids is not None:
            return torch.cat([self.noised(image) for image in pixels.split(grids.prod(-1).tolist())])
        kept = signal_kept(self.step)
        generator = torch.Generator().manual_seed(self.seed)
        of_one = pixels.shape[1:] if pixels.ndim > 2 else pixels.shape
        noise = torch.randn(of_one, generator=generator).to(pixels)
        noised = kept**0.5 * pixels + (1 - kept) ** 0.5 * noise
        # Images of zeros fill up a batch, and the processors' models know them by that.
        return (
            noised
            if pixels.ndim < 4
            else torch.where((pixels == 0).all(-1).all(-1).all(-1)[..., None, None, None], pixels, noised)
        )


def signal_kept(step: int) -> float:
    """a_T of the diffusion's sigmoid schedule."""
    place = torch.linspace(-SIGMOID_RANGE, SIGMOID_RANGE, DIFFUSION_STEPS, dtype=torch.float64)
    betas = torch.sigmoid(place) * (HIGHEST_BETA - LOWEST_BETA) + LOWEST_BETA
    return float((1 - betas).cumprod(0)[step])
