"""One rank of a tensor-parallel run on CPU: wraps a saved model with each case's edits and writes its logits.

Usage: python -m torch.distributed.run --nproc-per-node 2 -m tests.hooks.tensor_parallel_worker MODEL_DIR RESULT_DIR
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.distributed import DistributedConfig

import attn_hooks
from attn_hooks import ACT, PASTA, Ablate, AttnHooksError, Edit, HeadAffine, SinkScale
from tests.hooks.tiny import HEAD_DIM, NUM_HEADS, NUM_LAYERS, gain_at, generated, padded_batch

# Head 1 lies on rank 0 and heads 5 and 6 on rank 1.
CASES: dict[str, tuple[Edit, ...]] = {
    "no edit": (),
    "ablate": (Ablate(heads={1: [5]}),),
    "head_affine gain": (HeadAffine(gain=gain_at(2, 6, 3.0)),),
    "head_affine offset": (
        HeadAffine(
            offset=torch.linspace(-1, 1, NUM_LAYERS * NUM_HEADS * HEAD_DIM).view(NUM_LAYERS, NUM_HEADS, HEAD_DIM)
        ),
    ),
    "act": (ACT(beta=0.1, alpha=1.05, heads={2: [5]}),),
    "act on both ranks": (ACT(beta=0.1, alpha=1.05, heads={1: [1, 5], 2: [6]}),),
    "sink_scale": (SinkScale(scale=6.0, heads={0: [5]}),),
    "pasta": (PASTA(spans=(((3, 6),),), alpha=0.05, heads={0: [1], 3: [6]}),),
    "two edits": (SinkScale(scale=6.0, heads={1: [5]}), Ablate(heads={1: [5, 1]})),
}


def results(model: Any) -> dict[str, dict[str, Tensor]]:
    """Logits, generated tokens and heads counted of each case. The edits are off again at the end."""
    batch = padded_batch("left")
    found = {}
    for name, edits in CASES.items():
        with attn_hooks.editing(model, *edits), torch.no_grad():
            outputs = {"logits": model(**batch).logits, "tokens": generated(model, new_tokens=3, **batch)}
            counted = [edit.heads for edit in attn_hooks.report(model).edits]
            found[name] = {**outputs, "heads": torch.tensor(counted, dtype=torch.long)}
    return found


def load(directory: Path) -> Any:
    config = DistributedConfig(tp_size=dist.get_world_size())
    return LlamaForCausalLM.from_pretrained(directory, distributed_config=config).eval()


def main() -> None:
    models, target = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.save(results(load(models / "divisible")), target / f"rank{rank}.pt")
    indivisible = load(models / "one_kv_head")
    try:
        attn_hooks.wrap(indivisible, CASES["ablate"][0])
    except AttnHooksError as refused:
        (target / f"refused{rank}.txt").write_text(f"{refused.code}\n{refused}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
