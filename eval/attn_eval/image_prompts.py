"""Questions about images as the inputs of a vision-language model, through its own processor and chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attn_eval.errors import EvaluationError


class ImagePrompts:
    """Turns questions and images into a left-padded batch.

    Args:
        processor: of the model.
        template: a text with ``{image}`` and ``{question}`` in place of the processor's chat template.

    Raises:
        EvaluationError: the processor takes no images, has no chat template and none is given, or no image token for a
            template that is given.
    """

    def __init__(self, processor: Any, template: str | None = None) -> None:
        self.processor = processor
        self.tokenizer: Any = getattr(processor, "tokenizer", None)
        name = type(processor).__name__
        if self.tokenizer is None or getattr(processor, "image_processor", None) is None:
            raise EvaluationError(f"this model's processor is a {name}, which takes no images with a text")
        if template is None and not getattr(processor, "chat_template", None):
            raise EvaluationError(
                f"this model's {name} has no chat template: set generation.image_prompt, e.g. "
                "'USER: {image}\\n{question} ASSISTANT:'"
            )
        self.image_token = getattr(processor, "image_token", None)
        if template is not None and self.image_token is None:
            raise EvaluationError(f"this model's {name} names no image token: leave generation.image_prompt out")
        self.template = template
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def text(self, question: str) -> str:
        """The whole prompt, one image token where the image stands."""
        if self.template is not None:
            return self.template.replace("{image}", str(self.image_token)).replace("{question}", question)
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
        return str(self.processor.apply_chat_template([turn], add_generation_prompt=True))

    def encode(self, questions: Sequence[str], images: Sequence[Any]) -> dict[str, Any]:
        """The model's inputs: ``input_ids`` and ``attention_mask`` of (questions, longest prompt), and the images'.

        Raises:
            EvaluationError: the processor refuses them.
        """
        texts = [self.text(question) for question in questions]
        bos = self.tokenizer.bos_token
        # A template that writes the BOS token must not get a second one from the tokenizer.
        special = {"add_special_tokens": False} if bos and texts[0].startswith(bos) else {}
        try:
            inputs = self.processor(
                text=texts, images=[[image] for image in images], padding=True, return_tensors="pt", **special
            )
        except (ValueError, TypeError, IndexError) as error:
            raise EvaluationError(
                f"this model's {type(self.processor).__name__} refuses the prompt {texts[0]!r}: {error}"
            ) from error
        return dict(inputs)

    def first_tokens(self, words: Sequence[str]) -> list[list[int]]:
        """For each word the tokens that an answer with it can begin with: in lower case and capitalised, with a space
        before it and without.

        Raises:
            EvaluationError: two words begin with one token, so that it cannot tell them apart.
        """
        found = []
        for word in words:
            spelt = [before + form for before in ("", " ") for form in (word, word.capitalize(), word.upper())]
            found.append({self.tokenizer.encode(text, add_special_tokens=False)[0] for text in spelt})
        shared = set.intersection(*found)
        told_apart = [sorted(tokens - shared) for tokens in found]
        if not all(told_apart):
            raise EvaluationError(f"this model's tokenizer begins {' and '.join(words)} with one token")
        return told_apart
