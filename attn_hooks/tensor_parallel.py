"""Which query heads of the whole model a call computes on this rank."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
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
    shards = _shards(module, "q_proj")
    if shards is not None and num_heads % local == 0:
        start = shards.get_local_rank() * local
        return range(start, start + local)
    detail = (
        f"the call has {local} of {num_heads} query heads and the weights of {type(module).__name__} do not tell which, "
        "so an edit would hit the wrong heads"
    )
    raise error("tensor-parallel", model=model, layer=layer, detail=detail)


def check_shards(module: nn.Module, num_kv_heads: int, model: str, layer: int) -> None:
    """Raises ``UnsupportedModelError`` if the ranks cannot share the key and value heads; the forward would fail."""
    shards = _shards(module, "k_proj")
    if shards is not None and num_kv_heads % shards.size():
        detail = f"{num_kv_heads} key and value heads cannot be shared by {shards.size()} ranks"
        raise error("tensor-parallel", model=model, layer=layer, detail=detail)


def _shards(module: nn.Module, projection: str) -> DeviceMesh | None:
    """The mesh over which a projection's outputs are split; None if they are not."""
    weight = getattr(getattr(module, projection, None), "weight", None)
    if isinstance(weight, DTensor) and weight.device_mesh.ndim == 1:
        placement = weight.placements[0]
        if isinstance(placement, Shard) and placement.dim == 0:
            return weight.device_mesh
    return None


def heads_of_shard(
    projection: nn.Module, width: int, head_dim: int, num_heads: int, layer: int, trained: bool
) -> slice:
    """Which heads the ``width`` columns are that a rank gives its shard of an output projection.

    Told from how the projection's weight is sharded along its inputs; anything else raises ``UnsupportedModelError``, as does
    training (``trained``), where each rank would see the gradient of its own heads alone.
    """
    if trained:
        detail = (
            "vectors on head outputs are not trained under tensor parallelism, since each rank sees its own heads alone"
        )
        raise error("tensor-parallel", model=type(projection).__name__, layer=layer, detail=detail)
    weight = getattr(projection, "weight", None)
    if isinstance(weight, DTensor) and weight.device_mesh.ndim == 1 and width % head_dim == 0:
        mesh, placement = weight.device_mesh, weight.placements[0]
        if isinstance(placement, Shard) and placement.dim == 1 and width * mesh.size() == num_heads * head_dim:
            start = mesh.get_local_rank() * width // head_dim
            return slice(start, start + width // head_dim)
    detail = (
        f"{type(projection).__name__} was given {width} of {num_heads * head_dim} numbers a token and its weight does not "
        "tell which heads they are"
    )
    raise error("tensor-parallel", model=type(projection).__name__, layer=layer, detail=detail)
