"""Every causal-LM family of the installed transformers, each as a tiny random model built from its own config class.

The families come from transformers' own causal-LM mapping, so a new release brings its new families by itself.
Sizes come from three places, later ones win: `GENERIC_SIZES` by field name, the layer kinds that the family's default
config names, and `FAMILY_SIZES` for what one family needs (both tables in `family_configs.py`).
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.family_configs import (
    FAMILY_SIZES,
    GENERIC_SIZES,
    ROW_FOR_EACH_CODEBOOK,
    VOCAB_SIZE,
)

SEED = 0
FIRST_ORDINARY_TOKEN, LAST_ORDINARY_TOKEN = 3, 90
INTERFACE_NAMES = ("ALL_ATTENTION_FUNCTIONS", "attention_interface")


@dataclass(frozen=True)
class Family:
    """One entry of the causal-LM mapping: the config's `model_type` and the name of its model class."""

    name: str
    model_class_name: str

    @property
    def config_class(self) -> type[PreTrainedConfig]:
        return CONFIG_MAPPING[self.name]

    @property
    def model_class(self) -> type[PreTrainedModel]:
        for model_type in (self.name, self.config_class.model_type):
            module_name = model_type_to_module_name(model_type)
            module = importlib.import_module(f"transformers.models.{module_name}")
            if hasattr(module, self.model_class_name):
                return getattr(module, self.model_class_name)
        return getattr(importlib.import_module("transformers"), self.model_class_name)


@functools.cache
def causal_lm_families() -> list[Family]:
    """All families of transformers' causal-LM mapping, sorted by name."""
    return [Family(name, class_name) for name, class_name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items())]


def family(name: str) -> Family:
    """The family of that `model_type`; KeyError when the installed transformers has none."""
    return Family(name, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name])


def _distinct(kinds: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(kinds))


def _is_stored(config: PreTrainedConfig, field: str) -> bool:
    """Neither an alias of another field nor computed from others."""
    return field not in type(config).attribute_map and not isinstance(getattr(type(config), field, None), property)


def _layer_kinds(default: PreTrainedConfig) -> dict[str, Any]:
    """One layer of each kind that the default config names, at least two layers, and lists of that length."""
    kinds_by_field = {
        field: _distinct(getattr(default, field))
        for field in ("layer_types", "mlp_layer_types", "layers_block_type")
        if _is_stored(default, field) and isinstance(getattr(default, field, None), (list, tuple))
    }
    if not kinds_by_field:
        return {}
    length = max(2, *(len(kinds) for kinds in kinds_by_field.values()))
    patterns: dict[str, Any] = {
        field: kinds + [kinds[-1]] * (length - len(kinds)) for field, kinds in kinds_by_field.items()
    }
    return patterns | {"num_hidden_layers": length}


def _latent_attention_sizes(default: PreTrainedConfig) -> dict[str, int]:
    """Multi-head latent attention expands one latent to every head, and often calls its rotary part `head_dim`."""
    fields = vars(default)
    if "kv_lora_rank" not in fields:
        return {}
    sizes = {"num_key_value_heads": GENERIC_SIZES["num_attention_heads"]}
    if "head_dim" in fields and fields["head_dim"] == fields.get("qk_rope_head_dim"):
        sizes["head_dim"] = GENERIC_SIZES["qk_rope_head_dim"]
    return sizes


def _small_token_ids(default: PreTrainedConfig) -> dict[str, int]:
    """Special token ids beyond the small vocabulary move to its end, each to its own place."""
    fields = [
        field
        for field, value in vars(default).items()
        if field.endswith(("_token_id", "_token_index")) and isinstance(value, int) and value >= VOCAB_SIZE
    ]
    return {field: VOCAB_SIZE - 1 - place for place, field in enumerate(fields)}


def _default_config(config_class: type[PreTrainedConfig], overrides: Mapping[str, Any]) -> PreTrainedConfig:
    try:
        return config_class()
    except Exception:
        # Some defaults contradict the class's own validation until the family's sizes mend them.
        return config_class(**overrides)


def tiny_config(config_class: type[PreTrainedConfig], overrides: Mapping[str, Any] | None = None) -> PreTrainedConfig:
    """A config of that class with every size small, its sub-configs too.

    `overrides` come on top of what `FAMILY_SIZES` says for the class's `model_type`; a mapping given for a sub-config
    holds for that sub-config's fields.
    """
    family_sizes = FAMILY_SIZES.get(config_class.model_type, {}) | dict(overrides or {})
    default = _default_config(config_class, family_sizes)
    known = set(vars(default)) | set(config_class.attribute_map)
    sizes: dict[str, Any] = {field: value for field, value in GENERIC_SIZES.items() if field in known}
    sizes |= _small_token_ids(default)
    sizes |= _latent_attention_sizes(default)
    sizes |= _layer_kinds(default)
    for field in config_class.sub_configs:
        nested = getattr(default, field, None)
        if isinstance(nested, PreTrainedConfig):
            family_sizes[field] = tiny_config(type(nested), family_sizes.get(field))
    return config_class(**(sizes | family_sizes))


def family_config(family: Family) -> PreTrainedConfig:
    """The tiny config of one family; for a composite, the sub-config that its causal-LM class is built from."""
    config = tiny_config(family.config_class)
    wanted = family.model_class.config_class
    if isinstance(config, wanted):
        return config
    nested = [getattr(config, field) for field in type(config).sub_configs]
    return next((sub_config for sub_config in nested if isinstance(sub_config, wanted)), config)


def build_tiny(family: Family, attn_implementation: str | None = None) -> PreTrainedModel:
    """A tiny random model of the family, fp32 on CPU in eval mode, the same weights at every call.

    `attn_implementation` None takes SDPA where the family allows it and eager where it refuses.
    """
    config = family_config(family)
    config._attn_implementation = attn_implementation
    torch.manual_seed(SEED)
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model = family.model_class(config)
    return model.to(torch.float32).eval()


def attention_modules(model: PreTrainedModel) -> list[tuple[str, torch.nn.Module]]:
    """Modules whose own forward dispatches through transformers' AttentionInterface, by name."""
    return [(name, module) for name, module in model.named_modules() if _dispatches(type(module))]


@functools.cache
def _dispatches(module_class: type[torch.nn.Module]) -> bool:
    try:
        source = inspect.getsource(module_class.forward)
    except (OSError, TypeError):
        return False
    return any(name in source for name in INTERFACE_NAMES)


def token_ids(family: Family, model: PreTrainedModel, length: int = 24) -> torch.Tensor:
    """Two prompts of ordinary tokens, the same for every family; audio decoders take one row for each codebook."""
    rows = 2 * model.config.num_codebooks if family.name in ROW_FOR_EACH_CODEBOOK else 2
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(FIRST_ORDINARY_TOKEN, LAST_ORDINARY_TOKEN, (rows, length), generator=generator)


def generation_arguments(family: Family) -> dict[str, Any]:
    """What generate() needs for this family beside the prompt."""
    if family.name not in ROW_FOR_EACH_CODEBOOK:
        return {}
    return {"decoder_start_token_id": VOCAB_SIZE - 1, "num_return_sequences": 1}
