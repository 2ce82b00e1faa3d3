"""One rank of a tensor-parallel run on CPU: loads an adapter on a saved model, writes logits and what training says.

Usage: python -m torch.distributed.run --nproc-per-node 2 -m tests.lofit.tensor_parallel_worker DIRECTORY
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from peft import PeftModel
from transformers import LlamaForCausalLM
from transformers.distributed import DistributedConfig

from attn_hooks import AttnHooksError
from tests.hooks.tiny import logits, padded_batch


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    config = DistributedConfig(tp_size=dist.get_world_size())
    base = LlamaForCausalLM.from_pretrained(folder / "base", distributed_config=config).eval()
    model = PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)
    found = {"logits": logits(model, **padded_batch("left"))}
    for what, act in (("training", lambda: model(**padded_batch("left"))), ("merging", model.merge_adapter)):
        try:
            act()
        except AttnHooksError as refused:
            found[what] = refused.code
    torch.save(found, folder / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
