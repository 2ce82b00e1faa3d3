"""What the last row of a prompt gives, alone: for methods that choose by it how to edit the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from attn_hooks import engine
from attn_hooks.call import AttentionCall
from attn_hooks.edit import Edit
from attn_kernels import (
    AttentionInputs,
    HeadAffine,
    KeyTiles,
    Order,
    Primitive,
    Sparsity,
    edited_attention,
    head_affine,
)


def last_row_outputs(edit: Edit, call: AttentionCall) -> Tensor:
    """Head outputs ``(B, H, Dv)`` float32 of the last token, before o_proj, under the edits that act before ``edit``.

    Raises ``EditError`` where a prompt ends before the last column, as padding on the right makes it.
    """
    if call.inputs.padded and not bool(call.inputs.query_valid[:, -1].all()):
        raise edit.refuse_phase(call, "prompts must end in the same column. Pad them on the left.")
    inputs, earlier = last_row_of(call.inputs), [in_last_row(edit, call.inputs) for edit in call.earlier]
    if engine.has_kernels(inputs):
        from attn_kernels.edited_attention import dispatch

        output = dispatch.run(inputs, earlier)[0]
    else:
        weight_edits = [primitive for primitive in earlier if not isinstance(primitive, HeadAffine)]
        output = head_affine(edited_attention(inputs, weight_edits), earlier, inputs.query)
    return output[:, :, 0].float()


def last_row_of(inputs: AttentionInputs) -> AttentionInputs:
    """The call of its last query alone."""
    changed: dict[str, Any] = {
        "query": inputs.query[:, :, -1:],
        "query_index": inputs.query_index[-1:],
        "query_position": inputs.query_position[:, -1:],
        "dropout": 0.0,
    }
    for name in ("mask", "bias", "sink_logits"):
        given = getattr(inputs, name)
        if given is not None:
            changed[name] = given[:, :, -1:]
    if inputs.first_query is not None:
        changed["first_query"] = inputs.first_query + inputs.num_queries - 1
    return replace(inputs, **changed)


def in_last_row(edit: Primitive, inputs: AttentionInputs) -> Primitive:
    """An edit of a call as it is in the last row alone. Static patterns tell rows by their position, and stay."""
    if isinstance(edit, Sparsity) and isinstance(edit.pattern, KeyTiles):
        return replace(edit, pattern=edit.pattern.of_last_row(inputs))
    if isinstance(edit, Order):
        changed: dict[str, Any] = {"allow": _last_rows(edit.allow), "deny": _last_rows(edit.deny)}
        if edit.query_value is not None:
            changed["query_value"] = edit.query_value[:, -1:]
        return replace(edit, **changed)
    rows = getattr(edit, "rows", None)
    return edit if rows is None else replace(edit, rows=rows[:, -1:])


def _last_rows(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[tuple[Tensor, Tensor], ...]:
    return tuple((rows[:, -1:], keys) for rows, keys in pairs)
