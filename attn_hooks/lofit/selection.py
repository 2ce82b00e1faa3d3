"""Which heads to tune: by the norm of what the first stage trained, at random, or as the paper's code has stored them.

    score[l, h] = ||A[l, h]||        over the head_dim numbers of each head; the largest k are kept

Source: LoFiT, arXiv 2406.01563, section 3: k is 3 % of all heads.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from attn_hooks.errors import error
from attn_hooks.head_vectors import how_many
from attn_hooks.lofit.config import METHOD
from attn_hooks.lofit.layer import LofitLayer
from attn_hooks.lofit.saved import read_adapter
from attn_hooks.output_projection import output_projections

PUBLISHED_SHARE = 0.03


def rank_heads(model: nn.Module | str | Path, adapter_name: str | None = None) -> list[tuple[int, int, float]]:
    """(layer, head, Euclidean norm of its trained vector), the largest first, of every head that the adapter has.

    ``model``: what ``get_peft_model`` returned, with ``adapter_name`` (the active one by default), or the folder of a saved
    adapter. Meant for ``component="scale"``; an adapter of offsets is ranked by the norm of its offsets.

    Raises ``EditError`` if there is no such adapter, or it holds values that are not finite.
    """
    vectors = _vectors_of(model, adapter_name) if isinstance(model, nn.Module) else read_adapter(model)[1]
    norms = {place: float(row.detach().float().norm()) for place, row in vectors.items()}
    for (layer, head), norm in norms.items():
        if not np.isfinite(norm):
            raise error("vectors-not-finite", layer=layer, head=head)
    ordered = sorted(norms.items(), key=lambda item: (-item[1], item[0]))
    return [(layer, head, norm) for (layer, head), norm in ordered]


def select_heads(
    model: nn.Module | str | Path, k: int | None = None, share: float | None = None, adapter_name: str | None = None
) -> list[tuple[int, int]]:
    """The ``k`` heads of the largest norm, or ``share`` of those that the adapter has (0.03 by default; at least one): best first.

    Give them to ``LofitConfig(heads=...)`` on the model that ``model.unload()`` returns. See ``rank_heads``.
    """
    ranked = rank_heads(model, adapter_name)
    return [(layer, head) for layer, head, _ in ranked[: _count(len(ranked), k, share)]]


def random_heads(
    model: nn.Module, k: int | None = None, share: float | None = None, seed: int = 0
) -> list[tuple[int, int]]:
    """As many heads of all of ``model``, drawn without a look at them: what a selection is compared with."""
    layers = [projection.layer for projection in output_projections(model, METHOD)]
    heads = [(layer.index, head) for layer in layers for head in range(layer.num_heads)]
    return random.Random(seed).sample(heads, _count(len(heads), k, share))


def read_top_heads(path: str | Path, k: int | None = None) -> list[tuple[int, int]]:
    """The first ``k`` heads (all by default) of a ``top_heads/*.npy`` file of the paper's repository: (layer, head), best first.

    Raises ``EditError`` if it is no integer array ``(heads, 2)``.
    """
    try:
        found = np.load(path)
    except (OSError, ValueError, EOFError) as problem:
        raise error("bad-top-heads", path=path, detail=f"numpy cannot read it: {problem}") from None
    if not isinstance(found, np.ndarray) or found.ndim != 2 or found.shape[1] != 2 or found.dtype.kind not in "iu":
        detail = (
            f"it holds {getattr(found, 'dtype', type(found))} {getattr(found, 'shape', '')}, not integers (heads, 2)"
        )
        raise error("bad-top-heads", path=path, detail=detail)
    count = len(found) if k is None else how_many(METHOD, len(found), k, None)
    return [(int(layer), int(head)) for layer, head in found[:count]]


def _count(total: int, k: int | None, share: float | None) -> int:
    return how_many(METHOD, total, k, PUBLISHED_SHARE if k is None and share is None else share)


def _vectors_of(model: nn.Module, adapter_name: str | None) -> dict[tuple[int, int], Tensor]:
    layers = [module for module in model.modules() if isinstance(module, LofitLayer)]
    known = sorted({name for layer in layers for name in layer.lofit_heads})
    active = sorted({name for layer in layers for name in layer.active_adapters})
    wanted = active if adapter_name is None else [adapter_name]
    if len(wanted) != 1 or wanted[0] not in known:
        raise error("which-adapter", model=type(model).__name__, wanted=wanted, known=known)
    found: dict[tuple[int, int], Tensor] = {}
    for layer in layers:
        for vectors in (layer.lofit_scale, layer.lofit_offset):
            if wanted[0] in vectors:
                heads = layer.lofit_heads[wanted[0]].tolist()
                found |= {(layer.layer, head): row for head, row in zip(heads, vectors[wanted[0]], strict=True)}
    return found
