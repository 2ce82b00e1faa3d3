"""What one attention call computes on, before any edit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

Rows: TypeAlias = slice | Tensor
"""Some of a call's queries: a slice, or their places ``(n,)`` long."""


@dataclass(frozen=True)
class AttentionInputs:
    """One attention call: tensors as transformers hands them over, after RoPE and after the cache's update.

    ``query_index`` and ``key_index`` place queries and keys on one axis (padding counted); ``query_position`` and
    ``key_position`` count from each sample's first real token and are negative on left padding.

    ``mask`` says what the model itself allows. Without one, a key is visible iff it is valid, not in the future (if
    ``causal``) and inside ``window``. ``bias`` is an additive float mask; entries at or under half the dtype's minimum
    hide the key.
    """

    query: Tensor  # (B, H, N, D)
    key: Tensor  # (B, K, M, D), H a multiple of K
    value: Tensor  # (B, K, M, Dv)
    scaling: float
    query_index: Tensor  # (N,)
    key_index: Tensor  # (M,)
    query_position: Tensor  # (B|1, N)
    key_position: Tensor  # (B|1, M)
    key_valid: Tensor  # (B|1, M) bool
    mask: Tensor | None = None  # (B|1, H|1, N, M) bool
    bias: Tensor | None = None  # (B|1, H|1, N, M) float
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    sink_logits: Tensor | None = None  # (B|1, H, N|1): joins the softmax, has no value
    dropout: float = 0.0
    first_query: int | None = None  # place of the first query among the keys, if the caller knows it on the host
    padded: bool = True  # False: the caller knows that every key is valid

    @property
    def query_offset(self) -> int:
        """Place of the first query among the keys. Waits for the device if ``first_query`` was not given."""
        return int(self.query_index[0] - self.key_index[0]) if self.first_query is None else self.first_query

    @property
    def num_heads(self) -> int:
        return self.query.shape[1]

    @property
    def num_queries(self) -> int:
        return self.query.shape[2]

    @property
    def num_keys(self) -> int:
        return self.key.shape[2]

    @property
    def query_valid(self) -> Tensor:
        """``(B|1, N)`` bool: queries that are real tokens, told by the key at the same place."""
        return self.key_valid[:, self.query_index - self.key_index[0]]

    @property
    def kv_head_of(self) -> Tensor:
        """``(H,)``: the key and value head that each query head reads."""
        group = self.num_heads // self.key.shape[1]
        return torch.arange(self.num_heads, device=self.query.device) // group

    def visible(self, rows: Rows) -> Tensor:
        """``(B|1, H|1, n, M)`` bool for some of the queries: what the model allows without any edit."""
        if self.mask is not None:
            return self.mask[:, :, rows]
        if self.bias is not None:
            bias = self.bias[:, :, rows]
            return bias > torch.finfo(bias.dtype).min / 2
        return self.key_valid[:, None, None, :] & self.reachable(rows)

    def reachable(self, rows: Rows) -> Tensor:
        """``(1, 1, n, M)`` bool: causality and window by index, padding left out."""
        query_index = self.query_index[rows, None]
        reachable = torch.ones(1, 1, query_index.shape[0], self.num_keys, dtype=torch.bool, device=self.query.device)
        if self.causal:
            reachable = reachable & (self.key_index <= query_index)
        if self.window is not None:
            reachable = reachable & (self.key_index > query_index - self.window)
        return reachable
