"""The tuner: puts LoFiT's layers into a model and takes them out again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from attn_hooks.edit import ranges
from attn_hooks.errors import error
from attn_hooks.lofit.config import METHOD, LofitConfig
from attn_hooks.lofit.layer import LofitLayer
from attn_hooks.lofit.merging import keep_new_biases
from attn_hooks.model_info import LayerInfo, underlying_model
from attn_hooks.output_projection import output_projections


class LofitModel(BaseTuner):
    """LoFiT on a model with causal self-attention: one ``LofitLayer`` around the output projection of each layer that has a
    chosen head. In vision-language models the text decoder's alone."""

    prefix = "lofit_"
    tuner_layer_cls = LofitLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _prepare_adapter_config(self, peft_config: LofitConfig, model_config: dict[str, Any]) -> LofitConfig:
        return peft_config

    def _prepare_model(self, peft_config: LofitConfig, model: nn.Module) -> None:
        """Finds the projections; raises before anything is touched if the model lacks a layer or head of the config."""
        layers = {projection.name: projection.layer for projection in output_projections(model, METHOD)}
        check_heads(peft_config, list(layers.values()), type(underlying_model(model)).__name__)
        chosen = {name: layer for name, layer in layers.items() if peft_config.heads_in(layer.index, layer.num_heads)}
        self._layers = layers
        peft_config.target_modules = frozenset(chosen)

    @staticmethod
    def _check_target_module_exists(peft_config: LofitConfig, key: str) -> bool:
        return key in (peft_config.target_modules or ())

    def _create_and_replace(
        self,
        peft_config: LofitConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, LofitLayer):
            target.update_layer(adapter_name, peft_config, self.active_adapters)
            return
        layer = self._layers[current_key]
        wrapper = LofitLayer(target, current_key, layer.index, layer.num_heads, layer.value_dim)
        wrapper.update_layer(adapter_name, peft_config, self.active_adapters)
        self._replace_module(parent, target_name, wrapper, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise error("mixed-batch", method="LoFiT", names=kwargs["adapter_names"])
        yield

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        wrappers = [module for module in self.model.modules() if isinstance(module, LofitLayer)]
        for wrapper in wrappers:
            if merge:
                wrapper.check_mergeable(adapter_names or self.active_adapters)
            elif wrapper.merged:
                wrapper.unmerge()
        model: nn.Module = super()._unload_and_optionally_merge(
            merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )
        keep_new_biases(model, [wrapper.name for wrapper in wrappers if wrapper.gained_bias])
        return model


def check_heads(config: LofitConfig, layers: list[LayerInfo], model: str) -> None:
    """Raises ``EditError`` for the first layer or head of the config that the model does not have."""
    num_heads = {layer.index: layer.num_heads for layer in layers}
    for layer, head in config.heads or ():
        if layer not in num_heads:
            raise error(
                "layer-out-of-range", method=METHOD, layer=layer, model=model, layers=ranges(tuple(sorted(num_heads)))
            )
        if head >= num_heads[layer]:
            raise error(
                "head-out-of-range", method=METHOD, head=head, layer=layer, model=model, last=num_heads[layer] - 1
            )
