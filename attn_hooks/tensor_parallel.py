"""Which query heads of the whole model a call computes on this rank."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from attn_hooks.errors import error


def local_heads(module: nn.Module, query: Tensor, num_heads: int, model: str, layer: int) -> range:
    """Global indices of the query heads in ``query`` ``(B, h, N, D)``.

    All of them on one process. Under transformers' tensor parallelism a rank holds contiguous heads, told from how the
    query projection's weight is sharded; anything else raises ``UnsupportedModelError``, since a wrong offset would
    edit the wrong heads in silence.
    """
    local = query.shape[1]
    if local == num_heads:
        return range(num_heads)
    projection = getattr(module, "q_proj", None)
    weight = getattr(projection, "weight", None)
    if isinstance(weight, DTensor) and weight.device_mesh.ndim == 1:
        placement = weight.placements[0]
        if isinstance(placement, Shard) and placement.dim == 0 and num_heads % local == 0:
            start = weight.device_mesh.get_local_rank() * local
            return range(start, start + local)
    raise error(
        "tensor-parallel",
        model=model,
        layer=layer,
        local=local,
        total=num_heads,
        module_class=type(module).__name__,
    )
