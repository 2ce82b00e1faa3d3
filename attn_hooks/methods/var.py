"""VAR: visual attention redistribution, which gives what sinks take to the rest of the image.

Source: Kang et al., "See What You Are Told: Visual Attention Sink in Large Multimodal Models", ICLR 2025, arXiv 2503.03321.
With the hidden state x_j of token j as it enters the layer, D a few dimensions of the language model, V the image's keys:

    phi(x) = max over d in D of |x[d]| / sqrt(mean(x^2) + 1e-6)
    S  = { j in the prompt : phi(x_j) >= tau },  VS = S within V,  VN = V without VS
    a'[i, j] = p * a[i, j]                                    for j in S
    a'[i, j] = a[i, j] * (1 + (1 - p) * A_S(i) / A_VN(i))     for j in VN

in heads and rows with A_V(i) >= summ and A_VN(i) / A_V(i) >= rho, where A_G(i) is the sum of a[i, j] over G. Rows still sum
to 1. It acts on the text after an image, in prefill and decode, and only if that image (or one before) has a sink. Generated
tokens are no sinks. The identity is p 1.

D belongs to the language model: ``dims`` gives it, or the table of published ones, which goes by the backbone's shape;
``attn-hooks find-sinks MODEL`` measures it. One summary of the paper reads p as the part that is taken away (``p=0.4``).

The released code differs, and published figures were made with it. ``faithful="code"`` tests phi > tau and a sink share of at
most rho (not 1 - rho), edits the last layer too, which was meant to be left out, and edits all rows, which it does from the
second prompt on. From then on it also goes on with the first prompt's sinks; that is not reproduced, since an answer would
depend on the questions before it. Nor is its 576e-6 beside A_V in the gate.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from attn_hooks.call import AttentionCall
from attn_hooks.edit import Edit, Heads, Layers, NonNegative, Reads, Scope, Writes
from attn_hooks.errors import error
from attn_hooks.model_info import ModelInfo
from attn_hooks.prompt import image_keys, rows_after_images
from attn_kernels import Gate, Primitive, Regroup


class Backbone(NamedTuple):
    """What a config tells of a language model: its shape, and its vocabulary, to which image tokens may have been added."""

    model_types: tuple[str, ...]
    hidden_size: int
    layers: int
    kv_heads: int
    vocabulary: range


# The last two are second hand.
PUBLISHED_DIMS: dict[Backbone, tuple[int, ...]] = {
    Backbone(("llama",), 4096, 32, 32, range(32000, 32101)): (1415, 2533),  # LLaMA-2 and Vicuna 7B: LLaVA-1.5-7B
    Backbone(("llama",), 5120, 40, 40, range(32000, 32101)): (2100, 4743),  # the same in 13B
    Backbone(("qwen2_vl", "qwen2_vl_text"), 3584, 28, 4, range(152064, 152065)): (458, 2570),  # Qwen2-VL-7B
    Backbone(("llama", "internlm2"), 4096, 32, 8, range(92544, 92601)): (3584,),  # InternLM2 7B: InternVL2-8B
}


def published_dims(model: ModelInfo) -> tuple[int, ...] | None:
    """The hidden dimensions in which the sinks of this language model show, if they were published."""
    config = model.text_config
    shape = (config.hidden_size, config.num_hidden_layers, model.layers[0].num_kv_heads)
    for backbone, dims in PUBLISHED_DIMS.items():
        if (
            config.model_type in backbone.model_types
            and shape == (backbone.hidden_size, backbone.layers, backbone.kv_heads)
            and config.vocab_size in backbone.vocabulary
        ):
            return dims
    return None


def sink_strength(hidden: Tensor, dims: tuple[int, ...]) -> Tensor:
    """phi ``(B, N)`` of hidden states ``(B, N, E)``, at least in float32: their squares overflow float16."""
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    root_mean_square = (hidden.square().mean(-1) + 1e-6).sqrt()
    # Slices: an index would be copied to the device and waited for.
    return torch.stack([hidden[..., dim] for dim in dims]).abs().amax(0) / root_mean_square


class VAR(Edit):
    """p: factor that a sink keeps. tau: phi of a sink. summ, rho: which heads and rows look at the image enough."""

    method: ClassVar[str] = "var"
    source: ClassVar[str] = "VAR, arXiv 2503.03321"
    reads: ClassVar[frozenset[Reads]] = frozenset({"weights", "tokens", "hidden"})
    writes: ClassVar[Writes] = "weights"
    scope: ClassVar[Scope] = "per-row"
    head_indexed: ClassVar[bool] = True
    keeps_state: ClassVar[bool] = True
    fixed_in_decode: ClassVar[bool] = True

    p: float = Field(default=0.6, ge=0.0, le=1.0, description="factor kept on a sink's weight; 1: identity")
    rho: float = Field(
        default=0.5,
        ge=0.0,
        le=1.0,
        description="least share of a row's image mass outside sinks; paper: 0.5 hallucination, 0.8 VQA, 0.9 vision-centric",
    )
    summ: float = Field(default=0.2, ge=0.0, le=1.0, description="least mass of a row on the image")
    tau: float = Field(default=20.0, gt=0.0, description="a sink's phi")
    dims: Annotated[tuple[NonNegative, ...], Field(min_length=1)] | None = Field(
        default=None, description="hidden dimensions in which sinks show; None: the published ones of this backbone"
    )
    faithful: Literal["paper", "code"] = Field(default="paper", description="whose rules; see the method's page")
    layers: Layers | None = Field(
        default=None, description="layers edited; None: 2 to L-2, with the code's rules to L-1"
    )
    heads: Heads | None = Field(
        default=None,
        description="query heads that the gate is asked for, pairs (layer, head); None: all of those layers",
    )
    later_tokens: Literal["refuse", "keep", "extend"] = Field(
        default="refuse",
        description="several new tokens after the prompt: refuse, keep the prompt's sinks, or look for sinks among them",
    )

    def layers_in(self, model: ModelInfo) -> tuple[int, ...]:
        if self.heads is None and self.layers is None:
            last = model.num_layers - (2 if self.faithful == "paper" else 1)
            return tuple(layer for layer in model.layer_indices if 2 <= layer <= last)
        return super().layers_in(model)

    def check(self, model: ModelInfo) -> None:
        super().check(model)
        model.require_image_keys(self.method)
        size = model.text_config.hidden_size
        beyond = [dim for dim in self._dims_of(model) if dim >= size]
        if beyond:
            detail = (
                f"dims: {beyond[0]} is beyond the hidden states of {model.model_class}, which have {size} dimensions"
            )
            raise error("bad-parameters", method=self.method, detail=detail)

    def _dims_of(self, model: ModelInfo) -> tuple[int, ...]:
        dims = self.dims or published_dims(model)
        if dims is None:
            config = model.text_config
            backbone = f"{config.model_type}, {config.hidden_size} wide, {config.num_hidden_layers} layers"
            raise error("unknown-sink-dims", method=self.method, model=model.model_class, backbone=backbone)
        return dims

    def primitives(self, call: AttentionCall) -> list[Primitive]:
        if call.phase == "chunk" and self.later_tokens == "refuse":
            reason = (
                "these tokens may be prompt, which has sinks, or generated, which has none. Give the prompt in one forward, or "
                "set later_tokens='extend' for prompts in chunks and conversations, 'keep' for assisted generation."
            )
            raise self.refuse_phase(call, reason)
        if call.phase == "prefill" or (call.phase == "chunk" and self.later_tokens == "extend"):
            self._find_sinks(call)
        if "sinks" not in call.state:
            raise error("no-prefill", method=self.method, layer=call.layer, model=call.model)
        image = call.keys_at(image_keys(self, call))
        sinks = call.on_this_calls_keys(call.state["sinks"][:, None, :]) & call.inputs.key_valid[:, None, :]
        of_image = sinks & image
        rows = None
        if call.phase == "decode" or self.faithful == "code":
            sinks = sinks & of_image.any(-1, keepdim=True)
        else:
            rows = rows_after_images(call) & self._behind_a_sink_of_the_image(call)
        share = 1 - self.rho if self.faithful == "paper" else self.rho
        gate = Gate(of=image, at_least=self.summ, share=of_image, at_most=share)
        heads = call.select_heads(self.heads)
        return [Regroup(sinks, keep=self.p, target=image & ~sinks, gate=gate, heads=heads, rows=rows)]

    def _find_sinks(self, call: AttentionCall) -> None:
        """Puts bool ``(B, T)`` into the state: the sinks among all tokens so far. Tokens generated before are none."""
        assert call.info is not None, "a call of the engine's"
        assert call.hidden_states is not None, "a prompt has run"
        with torch.no_grad():
            strength = sink_strength(call.hidden_states, self._dims_of(call.info)).to(call.device)
        found = strength >= self.tau if self.faithful == "paper" else strength > self.tau
        before = call.layout.length - call.inputs.num_queries
        earlier = call.state.get("sinks", found[:, :0])[:, :before]
        call.state["sinks"] = torch.cat([functional.pad(earlier, (0, before - earlier.shape[1])), found], dim=1)

    def _behind_a_sink_of_the_image(self, call: AttentionCall) -> Tensor:
        """Row scope ``(B, N)``: tokens before which an image has had a sink, in this layer."""
        sinks: Tensor = call.state["sinks"]
        is_image = call.layout.is_image.to(call.device)[:, : sinks.shape[1]]
        seen = (sinks & is_image).cumsum(1) > 0
        missing = call.layout.length - seen.shape[1]
        if missing:
            seen = torch.cat([seen, seen[:, -1:].expand(-1, missing)], dim=1)
        return seen[:, -call.inputs.num_queries :]
