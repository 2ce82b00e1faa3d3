"""The specification of edited attention: literal, slow, one row at a time, in float64.

Everything that the faster paths do is defined here. It holds every weight of every head, so that tests can look at
them; never call it on more than toy sizes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attn_kernels.inputs import AttentionInputs
from attn_kernels.primitives import (
    SMALLEST_TARGET,
    HeadAffine,
    LogitMap,
    Order,
    Primitive,
    Ranking,
    Regroup,
    Sparsity,
    filled_to,
)


def edited_attention_reference(inputs: AttentionInputs, edits: Sequence[Primitive]) -> tuple[Tensor, Tensor]:
    """Edited outputs ``(B, H, N, Dv)`` and weights ``(B, H, N, M)``, float64. A row that sees no key gives zeros."""
    batch, num_heads, num_queries, _ = inputs.query.shape
    query, key, value = inputs.query.double(), inputs.key.double(), inputs.value.double()
    edits = [filled_to(edit, inputs.num_keys) for edit in edits]
    weights = torch.zeros(batch, num_heads, num_queries, inputs.num_keys, dtype=torch.float64)
    output = torch.zeros(batch, num_heads, num_queries, value.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for h in range(num_heads):
            kv_head = h // (num_heads // key.shape[1])
            for i in range(num_queries):
                logits = _logits(inputs, edits, query[b, h, i], key[b, kv_head], b, h, i)
                allowed = _allowed(inputs, edits, b, h, i)
                sink_logit = None
                if inputs.sink_logits is not None:
                    sink_logit = _at(inputs.sink_logits, b, h)[i % inputs.sink_logits.shape[2]].double()
                row = _softmax(logits, allowed, sink_logit)
                for edit in edits:
                    if isinstance(edit, Regroup) and _in_scope(edit.heads, edit.rows, b, h, i):
                        row = _regroup(edit, row, b, h)
                weights[b, h, i] = row
                output[b, h, i] = _affine(edits, row @ value[b, kv_head], query, b, h, i)
    return output, weights


def _logits(
    inputs: AttentionInputs, edits: Sequence[Primitive], query: Tensor, key: Tensor, b: int, h: int, i: int
) -> Tensor:
    logits = key @ query * inputs.scaling
    if inputs.softcap is not None:
        logits = inputs.softcap * torch.tanh(logits / inputs.softcap)
    if inputs.bias is not None:
        bias = _at(inputs.bias, b, h)[i].double()
        logits = logits + torch.where(bias > torch.finfo(inputs.bias.dtype).min / 2, bias, 0.0)
    for edit in edits:
        if isinstance(edit, LogitMap) and _in_scope(edit.heads, edit.rows, b, h, i):
            by_key = isinstance(edit.bias, Tensor) and edit.bias.ndim == 3
            scale, absolute = (_pick_head(c, h) for c in (edit.scale, edit.absolute))
            bias = _at(edit.bias, b, h).double() if by_key else _pick_head(edit.bias, h)
            mapped = scale * logits + absolute * logits.abs() + bias
            logits = torch.where(_at(edit.keys, b, h) & ~torch.isneginf(logits), mapped, logits)
    return logits


def _allowed(inputs: AttentionInputs, edits: Sequence[Primitive], b: int, h: int, i: int) -> Tensor:
    valid = inputs.key_valid[b % inputs.key_valid.shape[0]]
    if inputs.mask is not None:
        allowed = _at(inputs.mask, b, h)[i]
    elif inputs.bias is not None:
        allowed = _at(inputs.bias, b, h)[i] > torch.finfo(inputs.bias.dtype).min / 2
    else:
        allowed = valid.clone()
        for j in range(inputs.num_keys):
            if inputs.causal and inputs.key_index[j] > inputs.query_index[i]:
                allowed[j] = False
            if inputs.window is not None and inputs.key_index[j] <= inputs.query_index[i] - inputs.window:
                allowed[j] = False
    for edit in edits:
        if isinstance(edit, Order) and _in_scope(edit.heads, None, b, h, i):
            if edit.query_value is not None and edit.key_value is not None:
                query_value = edit.query_value[b % edit.query_value.shape[0], i]
                allowed = (edit.key_value[b % edit.key_value.shape[0]] <= query_value) & valid
            for rows, keys in edit.allow:
                if rows[b % rows.shape[0], i]:
                    allowed = allowed | (keys[b % keys.shape[0]] & valid)
            for rows, keys in edit.deny:
                if rows[b % rows.shape[0], i]:
                    allowed = allowed & ~keys[b % keys.shape[0]]
    for edit in edits:
        if isinstance(edit, Sparsity) and _in_scope(edit.heads, None, b, h, i):
            shown = edit.shown(inputs, slice(i, i + 1))
            allowed = allowed & shown[b % shown.shape[0], h % shown.shape[1], 0]
    return allowed


def _softmax(logits: Tensor, allowed: Tensor, sink_logit: Tensor | None) -> Tensor:
    logits = torch.where(allowed, logits, float("-inf"))
    ceiling = logits.max()
    if sink_logit is not None:
        ceiling = torch.maximum(ceiling, sink_logit)
    if torch.isneginf(ceiling):
        return torch.zeros_like(logits)
    exponentials = torch.exp(logits - ceiling)
    total = exponentials.sum()
    if sink_logit is not None:
        total = total + torch.exp(sink_logit - ceiling)
    return exponentials / total


def _regroup(edit: Regroup, row: Tensor, b: int, h: int) -> Tensor:
    source = _at(edit.source, b, h)
    target = ~source if edit.target is None else _at(edit.target, b, h) & ~source
    if edit.gate is not None:
        mass = row[_at(edit.gate.of, b, h)].sum()
        if mass < edit.gate.at_least:
            return row
        if edit.gate.share is not None and row[_at(edit.gate.share, b, h)].sum() > edit.gate.at_most * mass:
            return row
    target_mass = row[target].sum()
    if target_mass <= SMALLEST_TARGET:
        return row
    keep = _pick_head(edit.keep, h)
    freed = (1 - keep) * row[source].sum()
    edited = row.clone()
    edited[source] = keep * row[source]
    edited[target] = row[target] * (1 + freed / target_mass)
    return edited


def _affine(edits: Sequence[Primitive], output: Tensor, query: Tensor, b: int, h: int, i: int) -> Tensor:
    for edit in edits:
        if isinstance(edit, HeadAffine) and _in_scope(None, edit.rows, b, h, i):
            if edit.replace is not None and edit.replace[h]:
                output = torch.zeros_like(output)
            if isinstance(edit.gain, Ranking):
                output = output * _ranked(edit.gain, query[b, :, i], b, h)
            elif edit.gain is not None:
                output = output * (edit.gain[h] if edit.gain.ndim == 1 else edit.gain[b, h]).double()
            if edit.offset is not None:
                output = output + (edit.offset[h] if edit.offset.ndim == 2 else edit.offset[b, h]).double()
    return output


def _ranked(ranking: Ranking, query: Tensor, b: int, h: int) -> float:
    if ranking.where is not None and not ranking.where[b]:
        return 1.0
    along, num_heads = ranking.along[b].double(), query.shape[0]
    scores = [float(query[head] @ along[head * len(along) // num_heads]) for head in range(num_heads)]
    before = [other for other in range(num_heads) if (-scores[other], other) < (-scores[h], h)]
    return 1.0 if len(before) < ranking.kept else ranking.otherwise


def _in_scope(heads: Tensor | None, rows: Tensor | None, b: int, h: int, i: int) -> bool:
    head_selected = heads is None or bool(heads[h])
    row_selected = rows is None or bool(rows[b % rows.shape[0], i])
    return head_selected and row_selected


def _at(tensor: Tensor, b: int, h: int) -> Tensor:
    return tensor[b % tensor.shape[0], h % tensor.shape[1]]


def _pick_head(value: float | Tensor, h: int) -> float:
    return float(value[h] if isinstance(value, Tensor) and value.ndim else value)
