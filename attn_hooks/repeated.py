"""A decode step of one layer like the one before it: nothing is asked or prepared anew but what may have changed.

In decode the device waits for Python, so that whatever is known of a step from the step before is time that a user gets back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attn_hooks.recorder import Recorder
from attn_hooks.sequence import SequenceState, share

if TYPE_CHECKING:
    from attn_kernels.edited_attention.decode import DecodeCall


@dataclass(frozen=True)
class RepeatedStep:
    """What later steps have in common with the one that this was made of.

    Attributes:
        call: the kernel's, with the edits as they are from now on.
        shape: the query's, ``(B, H, 1, D)``.
        dtype: the query's.
        mask_dtype: None where the step had no mask.
        names: of the other arguments of the layer's call, all of which the engine knows.
        decisive: those among them that the attention depends on.
        acting: the edits that change something, by their places.
    """

    call: DecodeCall
    shape: torch.Size
    dtype: torch.dtype
    mask_dtype: torch.dtype | None
    names: frozenset[str]
    decisive: dict[str, Any]
    acting: tuple[int, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        """In a copied cache it is None: kernels cannot be copied, nor may addresses, whose tensors stay with the first cache."""
        return type(None), ()

    def run(
        self,
        sequence: SequenceState,
        recorder: Recorder,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        kwargs: dict[str, Any],
    ) -> Tensor | None:
        """The output ``(B, 1, H, Dv)``; None where something is not as it was, and the call has to be read in full."""
        length = sequence.length
        if (
            torch.is_grad_enabled()
            or query.shape != self.shape
            or query.dtype != self.dtype
            or key.shape[2] != length
            or (mask is None) != (self.mask_dtype is None)
            or sequence.calls[layer]
            or kwargs.keys() != self.names
            or any(kwargs[name] is not known for name, known in self.decisive.items())
            or (query.is_cuda and query.get_device() != torch.cuda.current_device())
        ):
            return None
        rows: Tensor | int = self.shape[0]
        bias = None
        if mask is not None:
            if mask.dtype != self.mask_dtype or mask.ndim != 4:
                return None
            mask = mask[..., :length]
            place = (1, length, query.device)
            shared = sequence.of_forward.get(place)
            if shared is None:
                shared = sequence.of_forward[place] = share(sequence.layout, *place)
            rows = shared.real_rows
            mask, bias = (mask, None) if mask.dtype == torch.bool else (None, mask)
        sequence.calls[layer] += 1
        for owner in self.acting:
            recorder.count(owner, "decode", rows)
        if mask is None and bias is None:
            return self.call.again(query, key, value).transpose(1, 2)
        output = self.call.run(query, key, value, length, length - 1, mask=mask, bias=bias)
        assert isinstance(output, Tensor)
        return output.transpose(1, 2)
