"""An adapter on a model that transformers has split over two ranks (gloo, CPU): head 1 lies on rank 0, heads 5, 6 on rank 1."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from attn_hooks import AttnHooksError
from attn_hooks.lofit import LofitConfig, LofitLayer
from tests.hooks.tiny import logits, padded_batch, tiny_llama

ROOT = Path(__file__).resolve().parents[2]
RANKS = (0, 1)


@pytest.fixture(scope="module", params=["offset", "scale"])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tensor, list[Any]]:
    """The logits of one process, and what each rank found."""
    folder = tmp_path_factory.mktemp("tensor_parallel")
    tiny_llama().save_pretrained(folder / "base")
    config = LofitConfig(heads=[(0, 1), (2, 5), (2, 6)], component=request.param, init_std=0.5)
    model = get_peft_model(tiny_llama(), config).eval()
    model.save_pretrained(folder / "adapter")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(len(RANKS))]
    command += ["-m", "tests.lofit.tensor_parallel_worker", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr[-4000:]
    return logits(model, **padded_batch("left")), [torch.load(folder / f"rank{rank}.pt") for rank in RANKS]


@pytest.mark.parametrize("rank", RANKS)
def test_equals_one_process(runs: tuple[Tensor, list[Any]], rank: int) -> None:
    alone, of_ranks = runs
    assert (alone - logits(tiny_llama(), **padded_batch("left"))).abs().max() > 1e-2
    torch.testing.assert_close(of_ranks[rank]["logits"], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", RANKS)
def test_training_and_merging_are_refused(runs: tuple[Tensor, list[Any]], rank: int) -> None:
    _, of_ranks = runs
    assert of_ranks[rank]["training"] == "tensor-parallel"
    assert of_ranks[rank]["merging"] == "not-mergeable"


@torch.no_grad()
def test_a_width_that_nothing_explains_is_refused() -> None:
    layer = LofitLayer(nn.Linear(32, 5), "o_proj", layer=0, num_heads=4, head_dim=8)
    layer.update_layer("default", LofitConfig(), active=["default"])
    with pytest.raises(AttnHooksError) as refused:
        layer(torch.zeros(1, 3, 16))
    assert refused.value.code == "tensor-parallel"
