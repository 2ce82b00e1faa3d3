"""DAMRO: decoding against the few image tokens that the vision tower's class token looks at most.

Source: Gong et al., "DAMRO: Dive into the Attention Mechanism of LVLM to Reduce Object Hallucination", EMNLP 2024, arXiv
2410.04514. With the logits l of the prompt and l' of the same prompt that holds only the ``tokens`` image tokens with the largest
class token attention in the tower's second to last layer,

    l <- (1 + alpha) l - alpha l'   for tokens with l >= max l + log(beta), minus infinity for all others

Published: 10 tokens for the LLaVA family, alpha 0.5 for POPE, 1.5 for captions, 2 for MME, beta 0.1. The identity is alpha 0
and beta 0. Kept tokens and text stand one after the other in the second stream.

The released code takes the class token's attention over all heads at once, as if they were one, which is not the model's own;
here it is the model's, summed over heads. It samples from raw logits; here the generation settings act on the result.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from attn_hooks.class_token import class_attention_in, require_class_token
from attn_hooks.edit import Positive, Reads, Scope, Writes
from attn_hooks.model_info import ModelInfo
from attn_hooks.streams import Prompt, SecondStream, StreamEdit


class DAMRO(StreamEdit):
    """alpha: weight of the contrast. tokens: how many of an image the second stream sees."""

    method: ClassVar[str] = "damro"
    source: ClassVar[str] = "DAMRO, arXiv 2410.04514"
    reads: ClassVar[frozenset[Reads]] = frozenset({"tokens", "vision"})
    writes: ClassVar[Writes] = "next-token"
    scope: ClassVar[Scope] = "per-row"
    keeps_state: ClassVar[bool] = True

    alpha: float = Field(default=0.5, ge=0.0, description="weight of the contrast; 0: identity")
    beta: float = Field(default=0.1, ge=0.0, le=1.0, description="cutoff, as a share of the likeliest token; 0: none")
    tokens: Positive = Field(default=10, description="image tokens that the second stream sees")

    def check(self, model: ModelInfo) -> None:
        super().check(model)
        require_class_token(self.method, model)

    @property
    def cutoff(self) -> float:
        return self.beta

    def second_stream(self, prompt: Prompt) -> SecondStream:
        images = prompt.layout.images
        attention, patches = class_attention_in(self.method, prompt.model.model_class, images, prompt.class_attention)
        keep = ~prompt.image
        for image, at, seen in zip(images, patches, attention["second to last"], strict=True):
            strongest = seen.topk(min(self.tokens, len(seen))).indices.cpu()
            keep[image.sample, at[strongest].to(keep.device)] = True
        return SecondStream(keep=keep)

    def combine(self, logits: Tensor, second: Tensor) -> Tensor:
        return (1 + self.alpha) * logits - self.alpha * second
