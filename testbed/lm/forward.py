"""The Llama forward pass for training, on rows laid end to end, so that one compilation serves every length.

Everything but the attention works on one token at a time: it runs on a fixed number of tokens, whatever the length
of the rows, and is compiled once for all layers. The tests compare it with the model's own forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Precision:
    """What the matrix products run in; the weights and the residual stream stay in float32."""

    dtype: torch.dtype


def project(
    hidden: Tensor,
    norm: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cosine: Tensor,
    sine: Tensor,
    head_dim: int,
    epsilon: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys, rotated, and values, each (tokens, heads, head_dim)."""
    normed = F.rms_norm(hidden, (hidden.shape[-1],), norm, epsilon).to(dtype)

    def heads(weight: Tensor) -> Tensor:
        return F.linear(normed, weight.to(dtype)).view(hidden.shape[0], -1, head_dim)

    def rotate(states: Tensor) -> Tensor:
        first, second = states.float().chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
        return (states.float() * cosine[:, None] + turned * sine[:, None]).to(dtype)

    return rotate(heads(query)), rotate(heads(key)), heads(value)


def finish(
    hidden: Tensor,
    attended: Tensor,
    output: Tensor,
    norm: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    epsilon: float,
    dtype: torch.dtype,
) -> Tensor:
    """The attention's output projection and the feed-forward block, each with its residual connection."""
    hidden = hidden + F.linear(attended, output.to(dtype)).float()
    normed = F.rms_norm(hidden, (hidden.shape[-1],), norm, epsilon).to(dtype)
    inner = F.silu(F.linear(normed, gate.to(dtype))) * F.linear(normed, up.to(dtype))
    return hidden + F.linear(inner, down.to(dtype)).float()


class TrainingForward:
    """Runs a Hugging Face Llama on a batch of whole rows."""

    def __init__(self, model: Any, *, dtype: torch.dtype, compiled: bool) -> None:
        self.model = model
        self.dtype = dtype
        self.project: Callable[..., tuple[Tensor, Tensor, Tensor]] = torch.compile(project) if compiled else project
        self.finish: Callable[..., Tensor] = torch.compile(finish) if compiled else finish

    def __call__(self, tokens: Tensor, dropped: Tensor | None = None) -> Tensor:
        """The last hidden states (rows x length, hidden) of ``tokens`` (rows, length).

        Args:
            tokens: token ids, every row begins with BOS.
            dropped: multiplies the embeddings (rows x length, hidden), for dropout.
        """
        config, decoder = self.model.config, self.model.model
        rows, length = tokens.shape
        hidden = F.embedding(tokens.reshape(-1), decoder.embed_tokens.weight)
        if dropped is not None:
            hidden = hidden * dropped
        positions = torch.arange(length, device=tokens.device)[None]
        with torch.no_grad():
            cosine, sine = decoder.rotary_emb(hidden[:1], positions)
            cosine, sine = (table[0].float().repeat(rows, 1) for table in (cosine, sine))
        epsilon, head_dim = config.rms_norm_eps, config.head_dim
        for layer in decoder.layers:
            attention, feed_forward = layer.self_attn, layer.mlp
            states = self.project(
                hidden,
                layer.input_layernorm.weight,
                attention.q_proj.weight,
                attention.k_proj.weight,
                attention.v_proj.weight,
                cosine,
                sine,
                head_dim,
                epsilon,
                self.dtype,
            )
            query, key, value = (state.view(rows, length, -1, head_dim).transpose(1, 2) for state in states)
            attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
            hidden = self.finish(
                hidden,
                attended.transpose(1, 2).reshape(rows * length, -1),
                attention.o_proj.weight,
                layer.post_attention_layernorm.weight,
                feed_forward.gate_proj.weight,
                feed_forward.up_proj.weight,
                feed_forward.down_proj.weight,
                epsilon,
                self.dtype,
            )
        return F.rms_norm(hidden, (hidden.shape[-1],), decoder.norm.weight, epsilon)

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits; the embeddings are tied."""
        return F.linear(hidden.to(self.dtype), self.model.lm_head.weight.to(self.dtype)).float()
