"""Models that choose keys themselves (DeepSeek sparse attention and its kin), read back as a mask.

Under ``sdpa`` and ``eager`` such a module folds its selection into the mask; under any other name it hands the selection
over for a sparse kernel. Folding it here gives the model's own backend what it would have got.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def selected_keys_mask(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> Tensor | None:
    """The mask with the module's selection folded in; takes ``indices`` or ``block_indices`` out of ``kwargs``.

    ``indices`` ``(B, N, k)`` are the keys that each query keeps. ``block_indices`` are blocks of keys, which the module's
    own indexer turns into a mask.
    """
    indices, block_indices = kwargs.pop("indices", None), kwargs.pop("block_indices", None)
    num_queries, num_keys = query.shape[2], key.shape[2]
    if indices is not None and mask is not None:
        dropped = torch.ones(query.shape[0], num_queries, num_keys, dtype=torch.bool, device=query.device)
        dropped = dropped.scatter(-1, indices.long(), False)[:, None]
        if mask.dtype == torch.bool:
            return mask & ~dropped
        return mask.masked_fill(dropped, torch.finfo(query.dtype).min)
    if block_indices is not None:
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(num_keys - num_queries, num_keys, device=query.device)[None]
        positions = positions.expand(query.shape[0], -1)
        indexer: Any = module.indexer
        built: Tensor = indexer.build_block_mask(block_indices, mask, num_keys, query.dtype, query.device, positions)
        return built
    return mask
