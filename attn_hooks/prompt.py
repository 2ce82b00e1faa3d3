"""What methods ask of a prompt: the keys of its images, the rows of the text behind them, the rows from its last token on."""

from __future__ import annotations

import torch
from torch import Tensor

from attn_hooks.call import AttentionCall
from attn_hooks.edit import Edit
from attn_hooks.errors import error
from attn_hooks.layout import TokenKind


def image_keys(edit: Edit, call: AttentionCall, prompt_length: int | None = None) -> Tensor:
    """Bool ``(B, M)``: the keys of all images. A prompt without an image has none; ``EditError`` if that is so for all.

    ``prompt_length``: the padded length of a prompt that comes in several forwards, the first of which may be without.
    """
    if not call.layout.images and call.prompt_length is None:
        raise error("no-prefill", method=edit.method, layer=call.layer, model=call.model)
    if not call.layout.images and call.layout.length >= (prompt_length or 0):
        raise error("no-image-in-prompt", method=edit.method, model=call.model, image_token_id=call.image_token_id)
    return call.key_kinds >= TokenKind.IMAGE


def rows_after_images(call: AttentionCall) -> Tensor:
    """Row scope ``(B, N)``: tokens behind the end of an image and outside of all others."""

    def made() -> Tensor:
        position = torch.arange(call.layout.length)[-call.inputs.num_queries :]
        after, inside = torch.zeros(2, call.batch, len(position), dtype=torch.bool)
        for image in call.layout.images:
            after[image.sample] |= position >= image.stop
            inside[image.sample] |= (position >= image.start) & (position < image.stop)
        return (after & ~inside).to(call.device)

    return call.shared_by_layers(("rows after images",), made)


def answering_rows(edit: Edit, call: AttentionCall, prompt_length: int | None) -> Tensor | None:
    """Row scope ``(B, N)`` of the last token of each prompt and of all that follow; None where that is every row.

    ``prompt_length``: the padded length of a prompt that comes in several forwards; None: the first forward is all of it, and
    several new tokens after it raise ``EditError``, since they may be prompt or generated.
    """
    length = call.layout.length
    if call.phase == "chunk" and prompt_length is None:
        raise edit.refuse_phase(call, "these tokens may be prompt or generated. Set prompt_length.")
    if call.phase == "decode" and (prompt_length is None or length >= prompt_length):
        return None
    stop = length if prompt_length is None else prompt_length
    return call.shared_by_layers(("answering rows", stop), lambda: _rows_from_the_last_of(edit, call, stop))


def _rows_from_the_last_of(edit: Edit, call: AttentionCall, prompt_length: int) -> Tensor:
    num_queries, length = call.inputs.num_queries, call.layout.length
    if length < prompt_length:
        return torch.zeros(call.batch, num_queries, dtype=torch.bool, device=call.device)
    index = torch.arange(length, device=call.device)
    valid = call.layout.valid.to(call.device)
    last = torch.where(valid & (index < prompt_length), index, -1).amax(1, keepdim=True)
    past = length - num_queries
    if call.phase == "chunk" and past < prompt_length and bool((last < past).any()):
        reason = "a prompt of this batch ended in an earlier forward than the others. Pad on the left, or give it in one forward."
        raise edit.refuse_phase(call, reason)
    return (index >= last)[:, past:] & valid[:, past:]
