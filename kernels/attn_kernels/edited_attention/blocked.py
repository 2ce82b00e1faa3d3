"""Edited attention in plain PyTorch, at most 128 query rows at a time, so that a long call never holds N x M weights.

Runs on any device and is differentiable (autograd keeps every block until backward, so training does hold them all).
Computes in float32 (float64 for float64 inputs). Tested against ``reference`` on odd shapes, GQA, padding, one query,
one key and empty groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from attn_kernels.inputs import AttentionInputs, Rows
from attn_kernels.primitives import (
    SMALLEST_TARGET,
    Gate,
    HeadAffine,
    LogitMap,
    Order,
    Primitive,
    Ranking,
    Regroup,
    Sparsity,
    Tap,
    filled_to,
)

# A block has at most so many rows, and at most 64 MiB of scores in float32.
ROWS_PER_BLOCK = 128
SCORES_PER_BLOCK = 2**24
MEASURED_ROWS = 16


def edited_attention(inputs: AttentionInputs, edits: Sequence[Primitive], heads: Tensor | None = None) -> Tensor:
    """Outputs ``(B, h, N, Dv)`` in the value's dtype for the query heads of ``heads`` (long ``(h,)``; None: all).

    Applies every primitive but HeadAffine, which ``head_affine`` adds to any output. A row that sees no key gives
    zeros. Taps get their tensors before this returns.
    """
    return _run(inputs, edits, heads, with_output=True)


def read_taps(inputs: AttentionInputs, edits: Sequence[Primitive], heads: Tensor | None = None) -> None:
    """Feeds the Taps among ``edits`` without computing any output."""
    _run(inputs, edits, heads, with_output=False)


def head_affine(output: Tensor, edits: Sequence[Primitive], query: Tensor) -> Tensor:
    """Applies the HeadAffine primitives among ``edits`` to outputs ``(B, H, N, Dv)``, in float32.

    ``query`` ``(B, H, N, D)`` is the call's, by which a Ranking goes.
    """
    for edit in edits:
        if not isinstance(edit, HeadAffine):
            continue
        edited = output.to(_compute_dtype(output))
        if edit.replace is not None:
            edited = torch.where(edit.replace.to(output.device)[:, None, None], 0.0, edited)
        if isinstance(edit.gain, Ranking):
            edited = edited * ranked_gain(edit.gain, query).to(edited)[..., None]
        elif edit.gain is not None:
            edited = edited * edit.gain.to(edited)[..., None, None]
        if edit.offset is not None:
            edited = edited + edit.offset.to(edited).unsqueeze(-2)
        edited = edited.to(output.dtype)
        output = edited if edit.rows is None else torch.where(edit.rows[:, None, :, None], edited, output)
    return output


def ranked_gain(ranking: Ranking, query: Tensor) -> Tensor:
    """``(B, H, N)`` for queries ``(B, H, N, D)``; in float32, or their own dtype if that is wider."""
    batch, num_heads, num_queries, width = query.shape
    query = query.to(_compute_dtype(query)).reshape(batch, ranking.along.shape[1], -1, num_queries, width)
    scores = (query * ranking.along.to(query)[:, :, None, None]).sum(-1).reshape(batch, num_heads, num_queries)
    kept = scores.sort(dim=1, descending=True, stable=True).indices[:, : ranking.kept]
    gain = torch.full_like(scores, ranking.otherwise).scatter(1, kept, 1.0)
    return gain if ranking.where is None else torch.where(ranking.where.to(gain.device)[:, None, None], gain, 1.0)


def edited_weights(inputs: AttentionInputs, edits: Sequence[Primitive]) -> Tensor:
    """All weights ``(B, H, N, M)`` in the query's dtype, for a caller who asked for attention maps: needs N x M."""
    heads = torch.arange(inputs.num_heads, device=inputs.query.device)
    edits = [filled_to(edit, inputs.num_keys) for edit in edits]
    block = _Block(_select_heads(inputs, heads), edits, heads, slice(0, inputs.num_queries))
    return _all_keys(block, block.weights(), inputs.num_keys).to(inputs.query.dtype)


@torch.no_grad()
def moved_mass(inputs: AttentionInputs, edits: Sequence[Primitive], heads: Tensor | None = None) -> list[Tensor | None]:
    """For each primitive, half the L1 distance between the weights before and after it, averaged.

    The average runs over the heads that the primitive selects and the real rows among the last 16; None where a
    primitive moves no weight (HeadAffine, Tap). 0 is no change, 1 is all of the mass.
    """
    edits = [filled_to(edit, inputs.num_keys) for edit in edits]
    rows = slice(max(0, inputs.num_queries - MEASURED_ROWS), inputs.num_queries)
    heads = torch.arange(inputs.num_heads, device=inputs.query.device) if heads is None else heads
    inputs = _select_heads(inputs, heads)
    block = _Block(inputs, [], heads, rows)
    real = inputs.query_valid[:, None, rows] & block.visible.any(-1)
    before = _all_keys(block, block.weights(), inputs.num_keys)
    moved: list[Tensor | None] = [None] * len(edits)
    applied: list[Primitive] = []
    for position, edit in _in_order(edits):
        if isinstance(edit, HeadAffine | Tap):
            continue
        applied.append(edit)
        block = _Block(inputs, applied, heads, rows)
        after = _all_keys(block, block.weights(), inputs.num_keys)
        selected = real if edit.heads is None else real & edit.heads[heads][None, :, None]
        selected = selected.expand(after.shape[:-1])
        distance = torch.where(selected, (after - before).abs().sum(-1) / 2, 0.0)
        moved[position] = distance.sum() / selected.sum().clamp(min=1)
        before = after
    return moved


def _in_order(edits: Sequence[Primitive]) -> list[tuple[int, Primitive]]:
    stage = {LogitMap: 0, Order: 1, Sparsity: 2, Regroup: 3, HeadAffine: 4, Tap: 5}
    return sorted(enumerate(edits), key=lambda pair: stage[type(pair[1])])


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _run(inputs: AttentionInputs, edits: Sequence[Primitive], heads: Tensor | None, with_output: bool) -> Tensor:
    if heads is None:
        heads = torch.arange(inputs.num_heads, device=inputs.query.device)
    batch, num_queries = inputs.query.shape[0], inputs.num_queries
    edits = [filled_to(edit, inputs.num_keys) for edit in edits]
    # Once; every block reads the same keys.
    inputs = _select_heads(inputs, heads)
    per_row = max(1, batch * len(heads) * inputs.num_keys)
    rows_per_block = max(1, min(ROWS_PER_BLOCK, SCORES_PER_BLOCK // per_row))
    readers = [_TapReader(edit, inputs, heads) for edit in edits if isinstance(edit, Tap)]
    outputs = []
    for start in range(0, num_queries, rows_per_block):
        rows = slice(start, min(start + rows_per_block, num_queries))
        block = _Block(inputs, edits, heads, rows)
        weights = block.weights()
        for reader in readers:
            reader.read(block, weights)
        if with_output:
            if inputs.dropout > 0:
                weights = functional.dropout(weights, inputs.dropout)
            value = block.columns_of(inputs.value, dim=2).to(weights.dtype)
            outputs.append(_grouped_matmul(weights, value).to(inputs.value.dtype))
    for reader in readers:
        reader.deliver()
    if not with_output:
        return inputs.value.new_empty(0)
    return torch.cat(outputs, dim=2)


def _select_heads(inputs: AttentionInputs, heads: Tensor) -> AttentionInputs:
    """The same call with the selected query heads only, each with a key and value head of its own.

    With all heads selected nothing is copied, and grouped heads go on sharing theirs.
    """
    if len(heads) == inputs.num_heads:
        return inputs
    kv_heads = inputs.kv_head_of[heads]
    return replace(
        inputs,
        query=inputs.query[:, heads],
        key=inputs.key[:, kv_heads],
        value=inputs.value[:, kv_heads],
        mask=_pick(inputs.mask, heads),
        bias=_pick(inputs.bias, heads),
        sink_logits=None if inputs.sink_logits is None else inputs.sink_logits[:, heads],
    )


def _grouped_matmul(left: Tensor, right: Tensor) -> Tensor:
    """``(B, H, n, x) @ (B, K, x, y)`` where H/K consecutive heads share one right side."""
    if left.shape[1] == right.shape[1]:
        return left @ right
    batch, num_heads, rows, inner = left.shape
    groups = num_heads // right.shape[1]
    shared = left.reshape(batch, right.shape[1], groups * rows, inner) @ right
    return shared.reshape(batch, num_heads, rows, right.shape[-1])


def _pick(per_head: Tensor | None, heads: Tensor) -> Tensor | None:
    """Selected heads of a tensor ``(B|1, H|1, ...)``."""
    return per_head if per_head is None or per_head.shape[1] == 1 else per_head[:, heads]


class _Block:
    """The weights of some query rows for some heads. ``inputs`` holds the selected heads only."""

    def __init__(self, inputs: AttentionInputs, edits: Sequence[Primitive], heads: Tensor, rows: Rows) -> None:
        self.inputs, self.edits, self.heads, self.rows = inputs, edits, heads, rows
        visible = self._visible()
        visited = visible.flatten(0, 2).any(0).nonzero().squeeze(-1)
        # Scattered keys are gathered; otherwise the keys after the last visible one (the future) are left out.
        self.columns: Tensor | None = None
        self.stop = int(visited[-1]) + 1 if len(visited) else 0
        if any(isinstance(edit, Sparsity) for edit in edits):
            self.columns = visited
        self.visible = self.columns_of(visible)
        self.log_sum_exp: Tensor | None = None

    def columns_of(self, tensor: Tensor, dim: int = -1) -> Tensor:
        return tensor.narrow(dim, 0, self.stop) if self.columns is None else tensor.index_select(dim, self.columns)

    def weights(self) -> Tensor:
        """``(B, h, n, m)`` over the visited columns, after softmax and Regroup."""
        weights = self._softmax(self._logits())
        for edit in self.edits:
            if isinstance(edit, Regroup):
                edited = self._regroup(edit, weights)
                scope = self._scope(edit.heads, edit.rows)
                weights = edited if scope is None else torch.where(scope, edited, weights)
        return weights

    def _visible(self) -> Tensor:
        inputs, rows = self.inputs, self.rows
        visible = inputs.visible(rows)
        for edit in self.edits:
            if isinstance(edit, Order):
                ordered = self._ordered(edit, visible)
                scope = self._scope(edit.heads, None)
                visible = ordered if scope is None else torch.where(scope, ordered, visible)
        for edit in self.edits:
            if isinstance(edit, Sparsity):
                shown = edit.shown(inputs, rows)
                shown = shown if shown.shape[1] == 1 else shown[:, self.heads]
                scope = self._scope(edit.heads, None)
                visible = visible & (shown if scope is None else shown | ~scope)
        return visible

    def _ordered(self, edit: Order, visible: Tensor) -> Tensor:
        valid = self.inputs.key_valid[:, None, None, :]
        if edit.query_value is not None and edit.key_value is not None:
            visible = (edit.key_value[:, None, None, :] <= edit.query_value[:, None, self.rows, None]) & valid
        for rows, keys in edit.allow:
            visible = visible | (rows[:, None, self.rows, None] & keys[:, None, None, :] & valid)
        for rows, keys in edit.deny:
            visible = visible & ~(rows[:, None, self.rows, None] & keys[:, None, None, :])
        return visible

    def _logits(self) -> Tensor:
        inputs = self.inputs
        compute = _compute_dtype(inputs.query)
        query = inputs.query[:, :, self.rows].to(compute) * inputs.scaling
        key = self.columns_of(inputs.key, dim=2).to(compute)
        logits = _grouped_matmul(query, key.transpose(-1, -2))
        if inputs.softcap is not None:
            logits = inputs.softcap * torch.tanh(logits / inputs.softcap)
        if inputs.bias is not None:
            bias = self.columns_of(inputs.bias[:, :, self.rows])
            # Entries that hide a key hide it by visibility; an Order may show it again, without their value.
            shown = bias > torch.finfo(bias.dtype).min / 2
            logits = logits + torch.where(shown, bias, 0.0).to(compute)
        for edit in self.edits:
            if isinstance(edit, LogitMap):
                # A map of minus infinity would give its factors NaN for a gradient.
                finite = torch.where(torch.isneginf(logits), 0.0, logits) if torch.is_grad_enabled() else logits
                mapped = self._mapped(edit, finite)
                scope = self._scope(edit.heads, edit.rows)
                # A removed key stays removed; the map would make it NaN.
                group = self._group(edit.keys) & ~torch.isneginf(logits)
                logits = torch.where(group if scope is None else group & scope, mapped, logits)
        return torch.where(self.visible, logits, float("-inf"))

    def _mapped(self, edit: LogitMap, logits: Tensor) -> Tensor:
        """The map on all keys; terms that are neutral cost nothing."""
        scale, absolute, bias = (self._coefficient(c) for c in (edit.scale, edit.absolute, edit.bias))
        mapped = logits if isinstance(scale, float) and scale == 1 else scale * logits
        if not (isinstance(absolute, float) and absolute == 0):
            mapped = mapped + absolute * logits.abs()
        return mapped + bias

    def _softmax(self, logits: Tensor) -> Tensor:
        reads_log_sum_exp = any(isinstance(edit, Tap) and edit.kind == "log_sum_exp" for edit in self.edits)
        if self.inputs.sink_logits is None and not reads_log_sum_exp:
            # A row that sees nothing gives NaN in softmax and in its gradient, and zeros are promised.
            if logits.shape[-1] == 0:
                return logits
            sees_nothing = torch.isneginf(logits.amax(dim=-1, keepdim=True))
            weights = torch.softmax(torch.where(sees_nothing, 0.0, logits), dim=-1)
            return torch.where(sees_nothing, 0.0, weights)
        log_sum_exp = torch.logsumexp(logits, dim=-1)
        if self.inputs.sink_logits is not None:
            sink = self.inputs.sink_logits.to(log_sum_exp)
            sink = sink if sink.shape[2] == 1 else sink[:, :, self.rows]
            log_sum_exp = torch.logaddexp(log_sum_exp, sink.expand_as(log_sum_exp))
        self.log_sum_exp = log_sum_exp
        sees_nothing = torch.isneginf(log_sum_exp)
        return torch.exp(logits - log_sum_exp.masked_fill(sees_nothing, 0.0).unsqueeze(-1))

    def _regroup(self, edit: Regroup, weights: Tensor) -> Tensor:
        source = self._group(edit.source)
        target = ~source if edit.target is None else self._group(edit.target) & ~source
        keep = self._per_head(edit.keep)
        target_mass = _mass(weights, target)
        acts = target_mass > SMALLEST_TARGET
        if edit.gate is not None:
            acts = acts & self._gate(edit.gate, weights)
        freed = (1 - keep) * _mass(weights, source)
        # A key's share of the target is at most 1; freed / target_mass would overflow where nearly all mass is the source's.
        share = weights / torch.where(acts, target_mass, 1.0)
        edited = torch.where(source, keep * weights, torch.where(target, weights + freed * share, weights))
        return torch.where(acts, edited, weights)

    def _gate(self, gate: Gate, weights: Tensor) -> Tensor:
        mass = _mass(weights, self._group(gate.of))
        is_open = mass >= gate.at_least
        if gate.share is not None:
            is_open = is_open & (_mass(weights, self._group(gate.share)) <= gate.at_most * mass)
        return is_open

    def _group(self, keys: Tensor) -> Tensor:
        """A key group ``(B|1, H|1, M)`` as ``(B|1, h|1, 1, m)``."""
        keys = keys if keys.shape[1] == 1 else keys[:, self.heads]
        return self.columns_of(keys).unsqueeze(2)

    def _coefficient(self, value: float | Tensor) -> float | Tensor:
        if isinstance(value, Tensor) and value.ndim == 3:
            return self._group(value).to(value.device, _compute_dtype(self.inputs.query))
        return self._per_head(value)

    def _per_head(self, value: float | Tensor) -> float | Tensor:
        if isinstance(value, Tensor) and value.ndim:
            return value.to(self.heads.device, _compute_dtype(self.inputs.query))[self.heads][None, :, None, None]
        return value

    def _scope(self, heads: Tensor | None, rows: Tensor | None) -> Tensor | None:
        scope = None if heads is None else heads[self.heads][None, :, None, None]
        if rows is not None:
            in_rows = rows[:, None, self.rows, None]
            scope = in_rows if scope is None else scope & in_rows
        return scope


def _mass(weights: Tensor, group: Tensor) -> Tensor:
    return torch.where(group, weights, 0.0).sum(-1, keepdim=True)


def _all_keys(block: _Block, visited: Tensor, num_keys: int) -> Tensor:
    """Spreads values over the visited columns ``(..., m)`` to all keys ``(..., M)``; the others are zero."""
    if block.columns is None:
        return functional.pad(visited, (0, num_keys - block.stop))
    full = visited.new_zeros(*visited.shape[:-1], num_keys)
    return full.index_copy(-1, block.columns, visited)


class _TapReader:
    """Gathers one Tap's reduction over the blocks of a call."""

    def __init__(self, tap: Tap, inputs: AttentionInputs, heads: Tensor) -> None:
        self.tap = tap
        self.chosen = slice(None) if tap.heads is None else tap.heads[heads].nonzero().squeeze(-1)
        self.num_keys = inputs.num_keys
        self.parts: list[Tensor] = []
        self.column_sum: Tensor | None = None
        self.column_count: Tensor | None = None

    def read(self, block: _Block, weights: Tensor) -> None:
        weights = weights[:, self.chosen]
        if self.tap.kind == "log_sum_exp":
            assert block.log_sum_exp is not None
            self.parts.append(block.log_sum_exp[:, self.chosen])
        elif self.tap.kind == "group_mass":
            assert self.tap.keys is not None
            group = block._group(self.tap.keys)
            group = group if group.shape[1] == 1 else group[:, self.chosen]
            self.parts.append(_mass(weights, group).squeeze(-1))
        elif self.tap.kind == "entropy":
            self.parts.append(-torch.special.xlogy(weights, weights).sum(-1))
        elif self.tap.kind == "row_weights":
            self.parts = [_all_keys(block, weights[:, :, -1], self.num_keys)]
        else:
            self._read_columns(block, weights)

    def _read_columns(self, block: _Block, weights: Tensor) -> None:
        visible = block.visible.expand(weights.shape[0], -1, -1, -1)
        visible = visible if visible.shape[1] == 1 else visible[:, self.chosen]
        if self.tap.rows is not None:
            rows = self.tap.rows[:, None, block.rows, None]
            weights, visible = torch.where(rows, weights, 0.0), visible & rows
        column_sum = _all_keys(block, weights.sum(2), self.num_keys)
        column_count = _all_keys(block, visible.to(weights.dtype).sum(2), self.num_keys)
        self.column_sum = column_sum if self.column_sum is None else self.column_sum + column_sum
        self.column_count = column_count if self.column_count is None else self.column_count + column_count

    def deliver(self) -> None:
        if self.tap.kind == "row_weights":
            result = self.parts[-1]
        elif self.column_sum is None or self.column_count is None:
            result = torch.cat(self.parts, dim=-1)
        elif self.tap.kind == "column_mean":
            result = self.column_sum / self.column_count.clamp(min=1)
        else:
            result = self.column_sum
        self.tap.receive(result)
