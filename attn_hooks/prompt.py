"""What methods ask of a prompt: the keys of its images."""

from __future__ import annotations

from torch import Tensor

from attn_hooks.call import AttentionCall
from attn_hooks.edit import Edit
from attn_hooks.errors import error
from attn_hooks.layout import TokenKind


def image_keys(edit: Edit, call: AttentionCall) -> Tensor:
    """Bool ``(B, M)``: the keys of all images. A prompt without an image has none; ``EditError`` if that is so for all."""
    if not call.layout.images:
        raise error("no-image-in-prompt", method=edit.method, model=call.model, image_token_id=call.image_token_id)
    return call.key_kinds >= TokenKind.IMAGE
