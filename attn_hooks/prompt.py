"""What methods ask of a prompt: the keys of its images, the text behind them, the rows from its last token on, and its logits."""

from __future__ import annotations

from typing import Literal

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


LaterTokens = Literal["refuse", "turn"]
LATER_TOKENS = "several new tokens after the prompt: refuse, or take them for the next turn of a conversation"


def answering_rows(
    edit: Edit, call: AttentionCall, prompt_length: int | None, later_tokens: LaterTokens = "refuse"
) -> Tensor | None:
    """Row scope ``(B, N)`` of the last token of each prompt and of all that follow; None where that is every row.

    ``prompt_length``: the padded length of a prompt that comes in several forwards; None: the first forward is all of it.
    Several new tokens after it raise ``EditError``, since they may be prompt or generated, unless ``later_tokens`` says that
    they are a conversation's next turn: then the last of them answers.
    """
    length = call.layout.length
    if call.phase == "chunk" and prompt_length is None and later_tokens == "refuse":
        reason = (
            "these tokens may be prompt or generated. Set later_tokens='turn' for a conversation, or prompt_length for a "
            "prompt in parts."
        )
        raise edit.refuse_phase(call, reason)
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


def last_row_logits(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """The model's own logits ``(B, H, M)`` of each sample's last real row, at least in float32, and ``(B|1, H|1, M)`` bool: the
    keys that it sees."""
    inputs = call.inputs
    batch, num_heads, num_queries, width = inputs.query.shape
    if inputs.padded and num_queries > 1:
        index = torch.arange(num_queries, device=call.device)
        row = torch.where(inputs.query_valid, index, 0).amax(-1).expand(batch)[:, None, None, None]
        visible = inputs.visible(slice(0, num_queries))
        visible = visible.expand(batch, *visible.shape[1:])
        visible = visible.gather(2, row.expand(-1, visible.shape[1], 1, visible.shape[3]))
        query = inputs.query.gather(2, row.expand(-1, num_heads, 1, width))
    else:
        visible, query = inputs.visible(slice(num_queries - 1, num_queries)), inputs.query[:, :, -1:]
    kv_heads = inputs.key.shape[1]
    logits = query.reshape(batch, kv_heads, -1, width) @ inputs.key.transpose(-1, -2) * inputs.scaling
    logits = logits.reshape(batch, num_heads, -1).to(torch.promote_types(logits.dtype, torch.float32))
    if inputs.softcap is not None:
        logits = inputs.softcap * torch.tanh(logits / inputs.softcap)
    return logits, visible[:, :, 0]


def require_all_heads(edit: Edit, call: AttentionCall) -> None:
    """Raises ``UnsupportedModelError`` where this rank of tensor parallelism holds a part of the heads that are compared."""
    num_heads = call.info.layer(call.layer).num_heads if call.info is not None else len(call.heads)
    if len(call.heads) != num_heads:
        detail = f"{edit.method} compares all {num_heads} heads of a layer, and this rank holds {len(call.heads)}"
        raise error("tensor-parallel", model=call.model, layer=call.layer, detail=detail)
