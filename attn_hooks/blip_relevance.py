"""Where a question looks in an image, by an image-text matching model beside the edited one: the front end of AGLA."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from attn_hooks.errors import error

MOST_TEXT_TOKENS = 35
LARGEST_KEEP = 1 - 1e-5
# A hook on the matching model would see the forwards of other threads.
_one_forward_at_a_time = threading.Lock()


class BlipRelevance:
    """GradCAM of BLIP's matching score, as AGLA has it (arXiv 2406.12718).

    ``model``: a ``BlipForImageTextRetrieval`` in evaluation mode and float32 (published: blip-itm-large-coco), ``processor`` its
    own. ``tokenizer``: the edited model's, which turns the prompt's tokens behind the last image into the question's text;
    ``question`` cuts the question out of that text, where a chat template puts more around it. ``block``: the cross-attention
    that is read, counted from 0. ``encoder_token``: the id that the matching text begins with in place of the tokenizer's own;
    BLIP was trained with 30523, its token [ENC]; None: the tokenizer's.

    Raises ``EditError`` for a model that is not one of these, in lower precision or in training mode.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        tokenizer: Any,
        *,
        question: Callable[[str], str] = str.strip,
        block: int = 6,
        encoder_token: int | None = 30523,
    ) -> None:
        self.model, self.processor, self.tokenizer = model, processor, tokenizer
        self.question, self.block, self.encoder_token = question, block, encoder_token
        problem = self._problem()
        if problem is not None:
            raise error("bad-parameters", method=type(self).__name__, detail=problem)

    def _problem(self) -> str | None:
        # Only here: importing it takes time, and most never need it.
        from transformers import BlipForImageTextRetrieval

        model: Any = self.model
        if not isinstance(model, BlipForImageTextRetrieval):
            return f"model: needs a BlipForImageTextRetrieval, got {type(model).__name__}"
        if model.training or model.dtype not in (torch.float32, torch.float64):
            return "model: gradients of the score need it in eval() and in float32"
        blocks, words = model.config.text_config.num_hidden_layers, model.config.text_config.vocab_size
        if not 0 <= self.block < blocks:
            return f"block: {self.block}, and the text encoder has {blocks}, counted from 0"
        if self.encoder_token is not None and not 0 <= self.encoder_token < words:
            return f"encoder_token: {self.encoder_token}, and the text encoder knows {words} tokens; None: the tokenizer's own"
        return None

    def __repr__(self) -> str:
        name = getattr(self.model, "name_or_path", "") or type(self.model).__name__
        return f"BlipRelevance({name}, block={self.block})"

    def question_of(self, tokens: Sequence[int]) -> str:
        """The question in a prompt's ``tokens`` behind its last image."""
        return self.question(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def __call__(self, image: Tensor, question: str) -> tuple[Tensor, float]:
        """The map ``(rows, columns)`` float32 over BLIP's patches and the share of pixels to keep.

        ``image``: ``(3, H, W)`` in [0, 1]. The share is 1 - c / 2, c the cosine of image and text, and less than 1.
        """
        # generate() runs without gradients, and a caller may do so in inference mode.
        with torch.inference_mode(False):
            pixels = self._pixels(image.clone())
            text = self.processor.tokenizer(
                question, truncation=True, max_length=MOST_TEXT_TOKENS, return_tensors="pt"
            ).to(pixels.device)
            with torch.no_grad():
                cosine = self.model(text.input_ids, pixels, False, text.attention_mask).itm_score
            return self._gradcam(pixels, text), min(1 - float(cosine) / 2, LARGEST_KEEP)

    def _pixels(self, image: Tensor) -> Tensor:
        """``(1, 3, S, S)``: as BLIP's own processor makes them, the aspect ratio lost."""
        model: Any = self.model
        size, given = model.config.vision_config.image_size, self.processor.image_processor
        image = image[None].to(model.device, torch.float32)
        image = functional.interpolate(image, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (image.new_tensor(values)[:, None, None] for values in (given.image_mean, given.image_std))
        return ((image - mean) / std).to(model.dtype)

    def _gradcam(self, pixels: Tensor, text: Any) -> Tensor:
        """Weights of the block times their positive gradient, averaged over heads, then over the question's tokens."""
        model: Any = self.model
        tokens = text.input_ids.clone()
        if self.encoder_token is not None:
            tokens[:, 0] = self.encoder_token
        read: list[Tensor] = []

        def cut(_dropout: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            # Only what comes after the weights is differentiated.
            read.append(args[0].detach().requires_grad_())
            return (read[-1],)

        attention = model.text_encoder.encoder.layer[self.block].crossattention.self
        with _one_forward_at_a_time, torch.enable_grad():
            handle = attention.dropout.register_forward_pre_hook(cut)
            try:
                score = model(tokens, pixels, True, text.attention_mask).itm_score[:, 1].sum()
            finally:
                handle.remove()
            (gradient,) = torch.autograd.grad(score, read)
        vision = model.config.vision_config
        side = vision.image_size // vision.patch_size
        # Without the class token's column, and without the rows of the first and last token, which are no words.
        words = slice(1, int(text.attention_mask.sum()) - 1)
        by_token = (read[0].detach() * gradient.clamp(min=0))[0, :, words, 1:].mean(0)
        return by_token.mean(0).reshape(side, side).float()
