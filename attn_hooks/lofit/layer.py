"""The wrapper around an output projection: gains and offsets on the head outputs that it takes."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from attn_hooks.errors import error
from attn_hooks.lofit.config import LofitConfig
from attn_hooks.lofit.merging import Folded, check_mergeable, fold
from attn_hooks.tensor_parallel import heads_of_shard


class HeadVectors(NamedTuple):
    """``(num_heads, head_dim)`` each; None stands for the identity."""

    gain: Tensor | None
    offset: Tensor | None


class LofitLayer(nn.Module, BaseTunerLayer):
    """``lofit_offset[adapter]`` and ``lofit_scale[adapter]``: v and A, ``(chosen heads, head_dim)``, rows in the order of the
    config's heads. ``lofit_heads[adapter]``: the indices of these heads.

    Several active adapters act one after the other, in the order of their activation.
    """

    adapter_layer_names = ("lofit_offset", "lofit_scale")
    other_param_names = ()

    def __init__(self, base_layer: nn.Module, name: str, layer: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.layer = layer
        self.num_heads, self.head_dim = num_heads, head_dim
        self.in_features = num_heads * head_dim
        self.lofit_offset = nn.ParameterDict()
        self.lofit_scale = nn.ParameterDict()
        self.lofit_heads = BufferDict(persistent=False)
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self._unmerged: Folded | None = None

    def update_layer(self, adapter_name: str, config: LofitConfig, active: list[str]) -> None:
        """Adds an adapter; it is active and trainable if its name is among ``active``."""
        heads = config.heads_in(self.layer, self.num_heads)
        vectors = nn.Parameter(torch.empty(len(heads), self.head_dim).normal_(std=config.init_std))
        (self.lofit_offset if config.component == "offset" else self.lofit_scale)[adapter_name] = vectors
        self._move_adapter_to_device_of_base_layer(adapter_name)
        device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        self.lofit_heads[adapter_name] = torch.tensor(heads, device=device)
        self.set_adapter(active, inference_mode=config.inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name in self.lofit_heads:
            del self.lofit_heads[adapter_name]
        super().delete_adapter(adapter_name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``x``: ``(..., num_heads * head_dim)``, under tensor parallelism this rank's heads."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
        elif not self.merged:
            x = self._edited(x)
        output: Tensor = self.base_layer(x, *args, **kwargs)
        return output

    def _edited(self, x: Tensor) -> Tensor:
        gain, offset = self.head_vectors(self.active_adapters)
        if gain is None and offset is None:
            return x
        here = slice(None)
        if x.shape[-1] != self.in_features:
            trained = torch.is_grad_enabled() and any(
                part is not None and part.requires_grad for part in (gain, offset)
            )
            here = heads_of_shard(
                self.get_base_layer(), x.shape[-1], self.head_dim, self.num_heads, self.layer, trained
            )
        z = x.reshape(*x.shape[:-1], -1, self.head_dim)
        if gain is not None:
            z = z * gain[here]
        if offset is not None:
            z = z + offset[here]
        # The vectors are float32 beside a half-precision model; the sum is rounded once.
        return z.flatten(-2).to(x.dtype)

    def head_vectors(self, adapters: list[str]) -> HeadVectors:
        """What ``adapters``, acting one after the other, do to each head."""
        gain: Tensor | None = None
        offset: Tensor | None = None
        for adapter in adapters:
            if adapter in self.lofit_scale:
                scale = 1 + self._of_all_heads(self.lofit_scale[adapter], adapter)
                gain = scale if gain is None else gain * scale
                offset = None if offset is None else offset * scale
            elif adapter in self.lofit_offset:
                shift = self._of_all_heads(self.lofit_offset[adapter], adapter)
                offset = shift if offset is None else offset + shift
        return HeadVectors(gain, offset)

    def _of_all_heads(self, rows: Tensor, adapter: str) -> Tensor:
        if len(rows) == self.num_heads:
            return rows
        return rows.new_zeros(self.num_heads, self.head_dim).index_copy(0, self.lofit_heads[adapter], rows)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Folds adapters (the active ones by default) into the projection's bias and, for scales, its weight.

        Raises ``EditError`` where that is not exact. ``safe_merge`` refuses values that are not finite.
        """
        adapters = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lofit_heads]
        if not adapters:
            return
        self.check_mergeable(adapters)
        merged = [*self.merged_adapters, *adapters]
        # From the weights as they were, so that what is merged later acts later.
        base = self._unmerged or Folded.of(self.base_layer)
        with torch.no_grad():
            folded = fold(base, *self.head_vectors(merged))
        if safe_merge and not folded.is_finite():
            raise error("merge-not-finite", adapters=", ".join(adapters), module=self.name)
        folded.put(self.base_layer)
        self._unmerged = base
        self.merged_adapters = merged

    def check_mergeable(self, adapters: list[str]) -> None:
        """Raises ``EditError`` if those of ``adapters`` that this layer has cannot be merged exactly; touches nothing."""
        own = [adapter for adapter in adapters if adapter in self.lofit_heads]
        if own:
            check_mergeable(self.base_layer, self.name, own)

    @property
    def gained_bias(self) -> bool:
        """Whether what is merged gave the projection a bias that it had not."""
        return self._unmerged is not None and self._unmerged.bias is None and self.bias is not None

    def unmerge(self) -> None:
        """Puts the projection's own weight and bias back, bit for bit."""
        if self._unmerged is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._unmerged.put(self.base_layer)
        self._unmerged = None
        self.merged_adapters = []
