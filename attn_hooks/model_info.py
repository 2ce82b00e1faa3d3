"""What can be edited in a model: its causal attention modules, their heads, and what stands in the way."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from attn_hooks.errors import AttnHooksError, error
from attn_hooks.layout import ImageSpan, TokenKind, TokenLayout
from attn_hooks.tensor_parallel import check_shards
from attn_hooks.vision_layout import VisionLayout, vision_layout_of

HONOURED_BACKENDS = ("sdpa", "eager")
IMPLEMENTATION_PREFIX = "attn_hooks_"
# By their names in configs.
MARKS_OF_IMAGE = (
    "vision_start_token_id",
    "vision_end_token_id",
    "boi_token_id",
    "eoi_token_id",
    "boi_token_index",
    "eoi_token_index",
)


@dataclass(frozen=True)
class LayerInfo:
    """One layer's causal self-attention."""

    index: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    sliding_window: int | None
    softcap: float | None
    sinks: bool
    backend: str
    module_name: str
    module: nn.Module = field(repr=False, compare=False)

    @property
    def decoder_layer(self) -> str | None:
        """Name of the decoder layer around the attention module: the innermost with a number; None without one."""
        name = self.module_name.rpartition(".")[0]
        while name and not name.rpartition(".")[2].isdigit():
            name = name.rpartition(".")[0]
        return name or None


@dataclass(frozen=True)
class ModelInfo:
    """The editable part of a model. ``image_token_id``: None where no key of self-attention is an image's."""

    model_class: str
    num_layers: int
    layers: tuple[LayerInfo, ...]
    image_token_id: int | None
    bos_token_id: int | None
    left_alone: dict[str, str] = field(default_factory=dict)
    vision: VisionLayout | None = field(default=None, repr=False, compare=False)
    text_config: Any = field(default=None, repr=False, compare=False)

    def layer(self, index: int) -> LayerInfo:
        return next(layer for layer in self.layers if layer.index == index)

    @property
    def layer_indices(self) -> tuple[int, ...]:
        return tuple(layer.index for layer in self.layers)

    @property
    def embeds_outside(self) -> bool:
        """Whether generate() runs the language model without the model's own forward."""
        return self.vision is not None and self.vision.family.embeds_outside

    def require_image_keys(self, method: str) -> None:
        """Raises ``EditError`` unless the images of this model are keys of its self-attention."""
        if self.vision is not None and self.vision.by_cross_attention:
            raise error("image-by-cross-attention", method=method, model=self.model_class)
        if self.image_token_id is None:
            raise error("needs-image", method=method, model=self.model_class)

    def image_and_marks(self, tokens: Tensor | None, layout: TokenLayout) -> Tensor:
        """Bool ``(B, N)``: the images of a prompt, and of its ``tokens`` those that open and close them in some families."""
        image = layout.kinds >= TokenKind.IMAGE
        if tokens is None or self.vision is None:
            return image
        marks = [getattr(self.vision.config, name, None) for name in MARKS_OF_IMAGE]
        known = torch.tensor([mark for mark in marks if mark is not None], device=image.device, dtype=torch.long)
        return image | torch.isin(tokens.to(image.device), known)

    def images_in(self, input_ids: Tensor | None, given: Mapping[str, Any]) -> tuple[ImageSpan, ...]:
        """The images in the tokens ``(B, N)`` of a forward with the arguments ``given``. Waits for the device."""
        return self.vision.images_in(input_ids, given) if self.vision is not None and input_ids is not None else ()

    def refusals(self) -> dict[str, str]:
        """Method name -> why it would be refused on this model with its default parameters.

        Methods without defaults (they need heads, spans or tensors) are not refused here.
        """
        from attn_hooks.registry import methods

        refused = {}
        for name, method in methods().items():
            try:
                method().check(self)
            except AttnHooksError as problem:
                if problem.code != "bad-parameters":
                    refused[name] = str(problem)
        return refused


def underlying_model(model: nn.Module) -> nn.Module:
    """The transformers model inside what torch.compile and PEFT return."""
    while True:
        # By structure, since importing either library to ask for its class takes seconds.
        if "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        elif hasattr(type(model), "get_base_model"):
            model = model.get_base_model()
        else:
            return model


def inspect_model(model: nn.Module, *, to_edit: bool = True) -> ModelInfo:
    """Finds every causal self-attention that goes through transformers' AttentionInterface.

    Raises ``UnsupportedModelError`` if there is none and, unless ``to_edit`` is False, if the weights are not loaded or the
    attention runs on a backend whose calls cannot be read.
    """
    if not isinstance(model, nn.Module):
        raise error("not-a-model", given=type(model).__name__)
    model = underlying_model(model)
    model_class = type(model).__name__
    if to_edit and any(parameter.is_meta for parameter in model.parameters()) and not _is_offloaded(model):
        raise error("meta-device", model=model_class)
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    layers: list[LayerInfo] = []
    left_alone: dict[str, str] = {}
    for name, module in interface_modules(model):
        reason = _why_left_alone(name, module, text_config)
        if reason is None:
            if to_edit:
                _check_backend(name, module, model_class)
            layers.append(_layer_info(name, module))
        else:
            left_alone[name] = reason
    if not layers and not left_alone:
        raise error("no-attention-interface", model=model_class, detail=_closest_attention(model))
    if not layers:
        detail = "; ".join(sorted(set(left_alone.values())))
        raise error("no-causal-attention", model=model_class, detail=detail)
    if len({layer.index for layer in layers}) < len(layers):
        # Several stacks that each count from 0 (hrm_text): number all by appearance.
        layers = [replace(layer, index=index) for index, layer in enumerate(layers)]
    layers.sort(key=lambda layer: layer.index)
    vision = vision_of(config)
    return ModelInfo(
        model_class=model_class,
        num_layers=max(_number(text_config, "num_hidden_layers") or 0, layers[-1].index + 1),
        layers=tuple(layers),
        image_token_id=None if vision is None or vision.by_cross_attention else vision.image_token_id,
        bos_token_id=_first_number(text_config, "bos_token_id"),
        left_alone=left_alone,
        vision=vision,
        text_config=text_config,
    )


def layout_of(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None, **processor_output: Any
) -> TokenLayout:
    """What each position of a prompt holds, without running the model: ``layout_of(model, **processor(...))``.

    ``input_ids`` and ``attention_mask`` are ``(B, N)``; the rest is what the processor returned for the images, which tells
    their grids. The model need not be one that can be edited. Raises ``EditError`` for more images than can be told apart, and
    for tokens without a batch.
    """
    if input_ids.ndim != 2:
        raise error("token-shape", given=tuple(input_ids.shape))
    config: Any = underlying_model(model).config
    vision = vision_of(config)
    images = vision.images_in(input_ids, processor_output) if vision is not None else ()
    valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    bos_token_id = _first_number(config.get_text_config(decoder=True), "bos_token_id")
    return TokenLayout.of_tokens(input_ids, valid, bos_token_id, images)


def vision_of(config: Any) -> VisionLayout | None:
    """How images lie in a model's prompts; None without an image token in its config."""
    return vision_layout_of(config, _first_number(config, "image_token_id", "image_token_index"))


def interface_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules whose forward hands its attention to ``ALL_ATTENTION_FUNCTIONS``."""
    for name, module in model.named_modules():
        if hasattr(module, "config") and "ALL_ATTENTION_FUNCTIONS" in _forward_source(type(module)):  # type: ignore[arg-type]
            yield name, module


@cache
def _forward_source(module_class: type[nn.Module]) -> str:
    try:
        return inspect.getsource(module_class.forward)
    except (AttributeError, OSError, TypeError):
        return ""


def _why_left_alone(name: str, module: nn.Module, text_config: Any) -> str | None:
    last_part = name.rsplit(".", 1)[-1]
    if getattr(module, "is_cross_attention", False) or re.search(
        r"cross|encoder_attn|encdec", last_part, re.IGNORECASE
    ):
        return "cross attention"
    if type(module.config) is not type(text_config):
        return "not the text decoder"
    if getattr(module, "is_causal", True) is False and not getattr(module, "is_decoder", False):
        return "not causal"
    return None


def _check_backend(name: str, module: nn.Module, model_class: str) -> None:
    backend = _backend(module)
    if backend not in HONOURED_BACKENDS:
        raise error("unsupported-backend", model=model_class, backend=backend)
    if _asks_for_the_backends_name(module, backend):
        raise error("backend-branch", model=model_class, module_class=type(module).__name__)
    layer = _layer_info(name, module)
    check_shards(module, layer.num_kv_heads, model_class, layer.index)
    if backend == "sdpa" and (layer.softcap is not None or layer.sinks):
        argument = "softcap" if layer.softcap is not None else "sink logits"
        raise error("backend-drops", model=model_class, argument=argument, backend=backend)


def _backend(module: nn.Module) -> str:
    config: Any = module.config
    backend = config._attn_implementation
    return backend.removeprefix(IMPLEMENTATION_PREFIX) if isinstance(backend, str) else backend


def _layer_info(name: str, module: nn.Module) -> LayerInfo:
    config: Any = module.config
    num_heads = _first_number(module, "num_heads", "num_attention_heads") or _number(config, "num_attention_heads")
    assert num_heads is not None, f"{type(module).__name__} names its heads nowhere"
    group = _number(module, "num_key_value_groups")
    num_kv_heads = num_heads // group if group else _first_number(config, "num_key_value_heads") or num_heads
    head_dim = _first_number(module, "head_dim", "qk_head_dim") or (_number(config, "hidden_size") or 0) // num_heads
    softcap = getattr(module, "attn_logit_softcapping", None)
    return LayerInfo(
        index=_layer_index(name, module),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        value_dim=_first_number(module, "v_head_dim") or head_dim,
        sliding_window=_sliding_window(module),
        softcap=float(softcap) if softcap is not None else None,
        sinks=getattr(module, "sinks", None) is not None,
        backend=_backend(module),
        module_name=name,
        module=module,
    )


def _layer_index(name: str, module: nn.Module) -> int:
    """The module's own number, else the last one in its path (blocks shared between layers have none)."""
    own = getattr(module, "layer_idx", None)
    if isinstance(own, int) and own >= 0:
        return own
    numbers = re.findall(r"\d+", name)
    return int(numbers[-1]) if numbers else 0


def _sliding_window(module: nn.Module) -> int | None:
    """The module's own window, else its config's where the forward reads it there (Mistral)."""
    if hasattr(module, "sliding_window"):
        return _number(module, "sliding_window")
    reads_config = "sliding_window" in _forward_source(type(module))  # type: ignore[arg-type]
    return _number(module.config, "sliding_window") if reads_config else None


def _asks_for_the_backends_name(module: nn.Module, backend: str) -> bool:
    """Whether the module would take another path under our name than under ``backend``."""
    source = _forward_source(type(module))  # type: ignore[arg-type]
    if "reorder_and_upcast_attn" in source:
        # GPT-2: the name matters for one option of the eager path only.
        return backend == "eager" and bool(getattr(module, "reorder_and_upcast_attn", False))
    # A module that hands over its selection of keys instead is followed by selected_keys_mask.
    return "_attn_implementation in (" in source and "indices" not in source


def eager_attention_of(module: nn.Module) -> Any:
    """The ``eager_attention_forward`` of the modeling file that defines the module's class."""
    for module_class in type(module).__mro__:
        function = getattr(sys.modules.get(module_class.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    raise error("unsupported-backend", model=type(module).__name__, backend="eager")


def _closest_attention(model: nn.Module) -> str:
    names = sorted({type(module).__name__ for module in model.modules() if "Attention" in type(module).__name__})
    return f"It computes attention in {', '.join(names)}." if names else "It has no attention module."


def _is_offloaded(model: nn.Module) -> bool:
    """Whether accelerate keeps the weights elsewhere between forwards."""
    return any(hasattr(module, "_hf_hook") for module in model.modules())


def _number(owner: object, name: str) -> int | None:
    value = getattr(owner, name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _first_number(owner: object, *names: str) -> int | None:
    return next((value for name in names if (value := _number(owner, name)) is not None), None)
