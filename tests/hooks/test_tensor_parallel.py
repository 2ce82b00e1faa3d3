"""Edits at global heads are the same under transformers' tensor parallelism (2 gloo processes on CPU) and on one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.hooks.tensor_parallel_worker import CASES, results
from tests.hooks.tiny import tiny_llama

ROOT = Path(__file__).resolve().parents[2]
RANKS = (0, 1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Results of one process, of each of two ranks, and what each rank said of a model with one kv head."""
    folder = tmp_path_factory.mktemp("tensor_parallel")
    model = tiny_llama()
    model.save_pretrained(folder / "divisible")
    tiny_llama(num_key_value_heads=1).save_pretrained(folder / "one_kv_head")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(len(RANKS))]
    command += ["-m", "tests.hooks.tensor_parallel_worker", str(folder), str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr[-4000:]
    found: dict[str, Any] = {"one process": results(model)}
    for rank in RANKS:
        found[f"rank {rank}"] = torch.load(folder / f"rank{rank}.pt")
        refused = folder / f"refused{rank}.txt"
        found[f"refused {rank}"] = refused.read_text() if refused.exists() else None
    return found


def _of(runs: dict[str, Any], run: str, case: str, what: str) -> Tensor:
    return runs[run][case][what]


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("case", CASES)
def test_an_edit_at_global_heads_equals_one_process(runs: dict[str, Any], case: str, rank: int) -> None:
    alone, plain = _of(runs, "one process", case, "logits"), _of(runs, "one process", "no edit", "logits")
    if case != "no edit":
        assert (alone - plain).abs().max() > 1e-2
    # Splitting o_proj's and down_proj's sums over ranks costs a few float32 roundings of logits of size 10.
    torch.testing.assert_close(_of(runs, f"rank {rank}", case, "logits"), alone, rtol=1e-4, atol=1e-4)
    assert torch.equal(_of(runs, f"rank {rank}", case, "tokens"), _of(runs, "one process", case, "tokens"))


@pytest.mark.parametrize("case", [case for case, edits in CASES.items() if edits])
def test_the_ranks_together_count_each_edited_head_once(runs: dict[str, Any], case: str) -> None:
    over_ranks = sum(_of(runs, f"rank {rank}", case, "heads") for rank in RANKS)
    assert torch.equal(over_ranks, _of(runs, "one process", case, "heads"))


@pytest.mark.parametrize("rank", RANKS)
def test_kv_heads_that_the_ranks_cannot_share_are_refused_at_wrap_time(runs: dict[str, Any], rank: int) -> None:
    refused = runs[f"refused {rank}"]
    assert refused is not None, "the forward would fail inside transformers, with a shape error that names nothing"
    assert refused.startswith("tensor-parallel\n")
    assert "LlamaForCausalLM" in refused
