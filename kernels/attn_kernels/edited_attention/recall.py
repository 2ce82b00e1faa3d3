"""What a sparse call keeps of a dense one: the share of dense attention that the visited keys hold, and what the output loses.

    recall(i)  = sum of w[i, j] over visited j  /  sum of w[i, j] over visible j          w: dense weights
    density    = visited pairs of a query and a key  /  visible pairs
    error      = |o_sparse - o_dense|  /  |o_dense|                                       norms over all rows measured

1 - recall is the share of a row's weight that moves to other keys. Learned sinks hold no key's weight and stay out of it. In
PyTorch, some rows at a time: no N x M memory. Tested against the specification with padding, grouped heads and more keys than
queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from attn_kernels.edited_attention import blocked
from attn_kernels.inputs import AttentionInputs
from attn_kernels.patterns import HeaviestKeys, KeyTiles, Pattern
from attn_kernels.primitives import Primitive, Sparsity, filled_to

LOW = 0.05


@dataclass(frozen=True)
class Fidelity:
    """Numbers of some heads and rows together: mean and 5th percentile of recall, density, relative error of the output.

    NaN where no row was measured.
    """

    recall: float
    recall_p5: float
    density: float
    output_error: float


@dataclass(frozen=True)
class Recall:
    """One measurement by sample, head and row.

    Attributes:
        recall: ``(B, H, n)`` float, at least 0 and at most 1; NaN in rows of padding and rows that see no key.
        visited, visible: ``(B, H, n)`` long: keys of the row; 0 in rows of padding.
        error, norm: ``(B, H, n)`` float: length of the difference of the outputs, and of the dense output; 0 in rows of padding.
    """

    recall: Tensor
    visited: Tensor
    visible: Tensor
    error: Tensor
    norm: Tensor

    def total(self) -> Fidelity:
        """Over all samples, heads and rows: every row of a head counts alike for recall, every pair for density."""
        recall = self.recall[~self.recall.isnan()]
        low = recall.sort().values[int(LOW * (len(recall) - 1))] if len(recall) else torch.nan
        return Fidelity(
            recall=float(recall.double().mean()),
            recall_p5=float(low),
            density=int(self.visited.sum()) / max(1, int(self.visible.sum())) if len(recall) else float("nan"),
            output_error=float(self.error.double().norm() / self.norm.double().norm()),
        )

    def by_head(self) -> list[Fidelity]:
        """One for each head."""
        return [self.of(head).total() for head in range(self.recall.shape[1])]

    def of(self, head: int) -> Recall:
        return Recall(*(getattr(self, field.name)[:, head : head + 1] for field in fields(self)))

    @staticmethod
    def joined(parts: Sequence[Recall]) -> Recall:
        """Heads of several calls, layers for instance, one behind the other."""
        return Recall(*(torch.cat([getattr(part, field.name) for part in parts], 1) for field in fields(Recall)))


@torch.no_grad()
def measure_recall(
    inputs: AttentionInputs,
    sparsity: Sparsity | Pattern | KeyTiles | HeaviestKeys,
    rows: Tensor | None = None,
    edits: Sequence[Primitive] = (),
) -> Recall:
    """What ``sparsity`` keeps of this call.

    Args:
        inputs: the call. Heads that the Sparsity leaves out keep everything.
        sparsity: which keys are visited; a bare pattern or key tiles hold for all heads.
        rows: ``(n,)`` long, places of the queries to measure; None: all of them.
        edits: primitives that act on both sides.
    """
    if not isinstance(sparsity, Sparsity):
        sparsity = Sparsity(sparsity)
    device, num_keys = inputs.query.device, inputs.num_keys
    rows = torch.arange(inputs.num_queries, device=device) if rows is None else rows.to(device)
    heads = torch.arange(inputs.num_heads, device=device)
    edits = [filled_to(edit, num_keys) for edit in edits]
    at_once = max(
        1, min(blocked.ROWS_PER_BLOCK, blocked.SCORES_PER_BLOCK // (inputs.query[:, :, 0, 0].numel() * num_keys))
    )
    measured = [_measure(inputs, sparsity, some, edits, heads) for some in rows.split(at_once)]
    return Recall(*(torch.cat([getattr(part, field.name) for part in measured], 2) for field in fields(Recall)))


def _measure(
    inputs: AttentionInputs, sparsity: Sparsity, rows: Tensor, edits: Sequence[Primitive], heads: Tensor
) -> Recall:
    dense = blocked._Block(inputs, edits, heads, rows)
    sparse = blocked._Block(inputs, [*edits, sparsity], heads, rows)
    assert sparse.columns is not None
    dense_weights = dense.weights()
    dense_output = _output(dense, dense_weights)
    kept = torch.where(sparse.visible, dense_weights.index_select(-1, sparse.columns), 0.0).sum(-1)
    held = dense_weights.sum(-1)
    shape = kept.shape
    real = (inputs.query_valid[:, None, rows] & dense.visible.any(-1)).expand(shape)
    difference = _output(sparse, sparse.weights()) - dense_output
    return Recall(
        recall=torch.where(real & (held > 0), (kept / held).clamp(max=1.0), torch.nan),
        visited=sparse.visible.sum(-1).expand(shape) * real,
        visible=dense.visible.sum(-1).expand(shape) * real,
        error=torch.where(real, difference.norm(dim=-1), 0.0),
        norm=torch.where(real, dense_output.norm(dim=-1), 0.0),
    )


def _output(block: blocked._Block, weights: Tensor) -> Tensor:
    return blocked._grouped_matmul(weights, block.columns_of(block.inputs.value, dim=2).to(weights.dtype))
