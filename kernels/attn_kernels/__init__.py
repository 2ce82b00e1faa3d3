"""Attention operations with edits: the primitives, their specification and the PyTorch path.

Knows torch and triton only: no models, no configs, no transformers.
"""

from attn_kernels.edited_attention.blocked import edited_attention, edited_weights, head_affine, moved_mass, read_taps
from attn_kernels.edited_attention.lowering import head_selection, indices_of_heads
from attn_kernels.edited_attention.recall import Fidelity, Recall, measure_recall
from attn_kernels.edited_attention.reference import edited_attention_reference
from attn_kernels.inputs import AttentionInputs
from attn_kernels.patterns import HeaviestKeys, KeyTiles, Pattern, PowerOfTwoBlocks, ShardedBlocks, SinkAndWindow
from attn_kernels.primitives import Gate, HeadAffine, LogitMap, Order, Primitive, Ranking, Regroup, Sparsity, Tap

__all__ = [
    "AttentionInputs",
    "Fidelity",
    "Gate",
    "HeadAffine",
    "HeaviestKeys",
    "KeyTiles",
    "LogitMap",
    "Order",
    "Pattern",
    "PowerOfTwoBlocks",
    "Primitive",
    "Ranking",
    "Recall",
    "Regroup",
    "ShardedBlocks",
    "SinkAndWindow",
    "Sparsity",
    "Tap",
    "edited_attention",
    "edited_attention_reference",
    "edited_weights",
    "head_affine",
    "head_selection",
    "indices_of_heads",
    "measure_recall",
    "moved_mass",
    "read_taps",
]
