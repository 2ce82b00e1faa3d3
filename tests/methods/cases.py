"""The methods under the shared tests. A new method joins by one line."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attn_hooks import (
    ACT,
    EAH,
    ITI,
    PAI,
    PASTA,
    SPIN,
    VAR,
    Ablate,
    AnchorAttention,
    DynamicMask,
    Edit,
    HeadAffine,
    LoFiT,
    MoBA,
    PowerAttention,
    S2Attention,
    SinkScale,
    Streaming,
    TriShape,
    VerticalSlash,
    XAttention,
)
from tests.models import SIZES

LAYERS, HEADS, HEAD_DIM = SIZES["num_hidden_layers"], SIZES["num_attention_heads"], SIZES["head_dim"]
GAIN = torch.linspace(0.5, 2.0, LAYERS * HEADS).reshape(LAYERS, HEADS)
OFFSET = torch.linspace(-0.1, 0.1, LAYERS * HEADS * HEAD_DIM).reshape(LAYERS, HEADS, HEAD_DIM)
PROMPT = 14

# Their tests are their own: they need more of a model than the tiny language models here have.
NEED_A_VISION_TOWER = {"agla", "damro", "imbalanced", "opera", "vcd", "vhr"}


@dataclass(frozen=True)
class Case:
    """A method with parameters that change nothing (None: it has none) and some that do.

    ``frozen_on_prompt``: what it does in decode depends on where the prompt ended. ``chunks``: takes a prompt in parts.
    """

    active: Edit
    neutral: Edit | None
    frozen_on_prompt: bool = False
    chunks: bool = True


CASES = [
    Case(Ablate(heads=((1, 2), (3, 0))), None),
    Case(ACT(beta=0.1, alpha=1.1), ACT(beta=1.0, alpha=1.1), frozen_on_prompt=True, chunks=False),
    Case(
        AnchorAttention(theta=-100.0, block=2, step=2),
        AnchorAttention(sink_blocks=500, block=2, step=2),
        frozen_on_prompt=True,
        chunks=False,
    ),
    Case(
        DynamicMask(window=4, a=GAIN[:, :2] - 1, dt_weight=OFFSET.view(LAYERS, 2, 2 * HEAD_DIM) * 20),
        DynamicMask(window=4096),
    ),
    Case(EAH(threshold=1e-6, layers=(1, 2)), EAH(threshold=1.0), frozen_on_prompt=True, chunks=False),
    Case(HeadAffine(gain=GAIN, offset=OFFSET), HeadAffine(gain=torch.ones_like(GAIN), offset=torch.zeros_like(OFFSET))),
    Case(
        ITI(heads=((1, 2), (3, 0)), direction=OFFSET[1, :2], sigma=torch.ones(2)),
        ITI(heads=((1, 2),), direction=OFFSET[1, :1], sigma=torch.ones(1), alpha=0.0),
        frozen_on_prompt=True,
        chunks=False,
    ),
    Case(LoFiT(heads=((1, 2), (3, 0)), offset=OFFSET[1, :2]), LoFiT(heads=((1, 2),), offset=torch.zeros(1, HEAD_DIM))),
    Case(MoBA(block=2, top_k=2), MoBA(block=2, top_k=500), frozen_on_prompt=True, chunks=False),
    Case(PAI(gamma=1.0, alpha=0.9), PAI(gamma=1.0, alpha=0.0), frozen_on_prompt=True, chunks=False),
    Case(
        PASTA(spans=(((1, 3),),), alpha=0.05, prompt_length=PROMPT),
        PASTA(spans=(((1, 3),),), alpha=1.0, prompt_length=PROMPT),
    ),
    Case(PowerAttention(block=2, window_blocks=1, sink_blocks=0), PowerAttention(block=64, window_blocks=4)),
    Case(S2Attention(block=2, local_blocks=1, stride=2), S2Attention(block=2, local_blocks=500, stride=2)),
    Case(SinkScale(scale=0.05), SinkScale(scale=1.0)),
    Case(SPIN(r=0.5, eps=0.1), SPIN(r=1.0), frozen_on_prompt=True, chunks=False),
    Case(Streaming(sinks=1, window=3), Streaming(window=4096)),
    Case(TriShape(sinks=1, window=3, dense_rows=2), TriShape(window=4096), frozen_on_prompt=True, chunks=False),
    Case(
        VAR(p=0.1, rho=0.0, summ=0.05, tau=1.5, dims=(0, 5, 9)),
        VAR(p=1.0, rho=0.0, summ=0.05, tau=1.5, dims=(0, 5, 9)),
        frozen_on_prompt=True,
        chunks=False,
    ),
    Case(
        VerticalSlash(vertical=2, slash=2, first=1, nearest=1, last=3, query_block=2, block=2),
        VerticalSlash(vertical=1000, slash=2, first=1, nearest=1, last=3, query_block=2, block=2),
        frozen_on_prompt=True,
        chunks=False,
    ),
    Case(
        XAttention(threshold=0.1, stride=1, block=2),
        XAttention(threshold=1.0, stride=1, block=2),
        frozen_on_prompt=True,
        chunks=False,
    ),
]
