"""RED, representation editing: a scale and a bias on the output of each layer's feed-forward network. A baseline of LoFiT.

Source: Wu et al., "Advancing Parameter Efficiency in Fine-tuning via Representation Editing", ACL 2024, arXiv 2402.15179.

    h <- s * h + b        elementwise, on every position, in every layer; s starts at 1 and b at 0

Published for Llama-2-7B: 262,144 trained numbers, learning rate 2e-5, 3 epochs, batch 128. Here it is trained, saved, loaded,
switched and disabled by PEFT, and not merged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from attn_hooks.edit import ranges
from attn_hooks.errors import error
from attn_hooks.lofit.peft_type import own_peft_type
from attn_hooks.model_info import LayerInfo, inspect_model, underlying_model

METHOD = "red"
# Not RED alone: PEFT knows parameters by the prefix, and red_ is in the names of shared_ experts.
PEFT_NAME = "FFN_RED"
NAMES = ("down_proj", "fc2", "dense_4h_to_h", "c_proj", "fc_out", "wo", "w2")
# BERT and its like hold it in the layer itself.
NAME_IN_LAYER = "output.dense"


@dataclass
class RedConfig(PeftConfig):
    """``layers``: indices from 0; None: all. ``get_peft_model`` raises where the model lacks one, or it has no single
    feed-forward network, as with experts."""

    layers: list[int] | None = field(default=None, metadata={"help": "Layers edited, counted from 0; None: all."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = own_peft_type(PEFT_NAME, RedConfig)
        # Found in the model, not chosen: PEFT reads it from the object, and it is not part of the file.
        self.target_modules: frozenset[str] | None = None
        if self.layers is not None:
            self.layers = sorted(set(self.layers))
            if not self.layers:
                raise error(
                    "bad-parameters", method=METHOD, detail="layers: the list is empty, so nothing would be trained"
                )


class RedLayer(nn.Module, BaseTunerLayer):
    """``ffn_red_scale[adapter]`` and ``ffn_red_bias[adapter]``: s and b, ``(hidden size,)``."""

    adapter_layer_names = ("ffn_red_scale", "ffn_red_bias")
    other_param_names = ()

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.ffn_red_scale = nn.ParameterDict()
        self.ffn_red_bias = nn.ParameterDict()
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []

    def update_layer(self, adapter_name: str, config: RedConfig, active: list[str]) -> None:
        """Adds an adapter; it is active and trainable if its name is among ``active``."""
        base = self.get_base_layer()
        width = base.nf if isinstance(base, Conv1D) else base.out_features
        self.ffn_red_scale[adapter_name] = nn.Parameter(torch.ones(width))
        self.ffn_red_bias[adapter_name] = nn.Parameter(torch.zeros(width))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(active, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return output
        edited = output
        for adapter in self.active_adapters:
            if adapter in self.ffn_red_scale:
                edited = self.ffn_red_scale[adapter] * edited + self.ffn_red_bias[adapter]
        # The vectors are float32 beside a half-precision model; the result is rounded once.
        return edited.to(output.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise error("red-not-merged", adapters=", ".join(adapter_names or self.active_adapters))


class RedModel(BaseTuner):
    """RED on a model with causal self-attention: one ``RedLayer`` around the last projection of each chosen layer's feed-forward
    network. In vision-language models the text decoder's alone."""

    prefix = "ffn_red_"
    tuner_layer_cls = RedLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _prepare_adapter_config(self, peft_config: RedConfig, model_config: dict[str, Any]) -> RedConfig:
        return peft_config

    def _prepare_model(self, peft_config: RedConfig, model: nn.Module) -> None:
        """Finds the projections; raises before anything is touched if the model lacks a layer of the config."""
        layers = {layer.index: layer for layer in inspect_model(model, to_edit=False).layers}
        model_class = type(underlying_model(model)).__name__
        chosen = list(layers) if peft_config.layers is None else peft_config.layers
        for index in chosen:
            if index not in layers:
                known = ranges(tuple(sorted(layers)))
                raise error("layer-out-of-range", method=METHOD, layer=index, model=model_class, layers=known)
        names = {index: _feed_forward_output(model, layers[index]) for index in chosen}
        for index, name in names.items():
            if name is None:
                raise error("no-feed-forward", model=model_class, layer=index)
        peft_config.target_modules = frozenset(name for name in names.values() if name is not None)

    @staticmethod
    def _check_target_module_exists(peft_config: RedConfig, key: str) -> bool:
        return key in (peft_config.target_modules or ())

    def _create_and_replace(
        self,
        peft_config: RedConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        wrapper = target if isinstance(target, RedLayer) else RedLayer(target)
        wrapper.update_layer(adapter_name, peft_config, self.active_adapters)
        if wrapper is not target:
            self._replace_module(parent, target_name, wrapper, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise error("mixed-batch", method="RED", names=kwargs["adapter_names"])
        yield


def _feed_forward_output(model: nn.Module, layer: LayerInfo) -> str | None:
    """The path of the one projection that ends the feed-forward network of a decoder layer; None if there is not exactly one.

    Those of experts lie deeper, or are no modules.
    """
    around = layer.decoder_layer
    if around is None:
        return None
    attention = layer.module_name.removeprefix(around + ".")
    found = [
        f"{around}.{name}"
        for name, module in model.get_submodule(around).named_modules()
        if name.count(".") <= 1
        and not f"{name}.".startswith(f"{attention}.")
        and (name.rpartition(".")[2] in NAMES or name == NAME_IN_LAYER)
        and (isinstance(module, Conv1D | BaseTunerLayer) or hasattr(module, "out_features"))
    ]
    return found[0] if len(found) == 1 else None
