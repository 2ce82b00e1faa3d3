"""Scale the attention sink: one factor on the weight of the first keys, before the rows are normalised again.

Source: the sink steering family (comparison in Xiao et al., StreamingLLM, arXiv 2309.17453, section 3.1, of what the
first tokens carry); the one-group case of a logit map.

    s[i, j] <- s[i, j] + log(scale)        for j < sinks, then softmax

so the unnormalised weight of the first ``sinks`` keys (BOS) is multiplied by ``scale``. The identity is scale 1; 0 hides
the sink.
"""

from __future__ import annotations

import math
from typing import ClassVar

from pydantic import Field

from attn_hooks.call import AttentionCall
from attn_hooks.edit import Edit, Heads, Layers, Positive, Reads, Scope, Writes
from attn_kernels import LogitMap, Primitive


class SinkScale(Edit):
    """scale: factor on the sink's unnormalised weight. sinks: how many first tokens count as the sink."""

    method: ClassVar[str] = "sink_scale"
    source: ClassVar[str] = "sink steering; StreamingLLM, arXiv 2309.17453, section 3.1"
    reads: ClassVar[frozenset[Reads]] = frozenset({"query", "key"})
    writes: ClassVar[Writes] = "logits"
    scope: ClassVar[Scope] = "per-row"
    head_indexed: ClassVar[bool] = True
    fixed_in_decode: ClassVar[bool] = True
    same_in_layers: ClassVar[bool] = True

    scale: float = Field(default=0.5, ge=0.0, description="factor on the sink's weight; 1: identity")
    sinks: Positive = Field(default=1, description="number of first tokens that form the sink")
    layers: Layers | None = Field(default=None, description="layers edited, from 0; None: all")
    heads: Heads | None = Field(default=None, description="query heads edited, pairs (layer, head); None: all")

    def is_settled(self, call: AttentionCall) -> bool:
        return call.fewest_tokens >= self.sinks

    def primitives(self, call: AttentionCall) -> list[Primitive]:
        position = call.inputs.key_position
        keys = call.shared_by_layers(
            (id(self), "keys"), lambda: call.keys_at((position >= 0) & (position < self.sinks))
        )
        bias = math.log(self.scale) if self.scale > 0 else -math.inf
        return [LogitMap(keys, bias=bias, heads=call.select_heads(self.heads))]
