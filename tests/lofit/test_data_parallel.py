"""The first stage under launchers (gloo, CPU): two processes, each of which sees half of a batch, end as one does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from transformers import Trainer, TrainingArguments

from attn_hooks.lofit import L1Penalty, LofitConfig, LofitLayer, select_heads
from tests.hooks.tiny import prompt, tiny_llama

ROOT = Path(__file__).resolve().parents[2]
BATCH = 4


def select(folder: Path, batch: int, weight: float = 0.02) -> tuple[Tensor, list[tuple[int, int]]]:
    """The trained scales of all heads, and the heads selected by them."""
    torch.manual_seed(5)
    model = get_peft_model(tiny_llama(), LofitConfig(component="scale"))
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        max_steps=6,
        learning_rate=1e-2,
        optim="sgd",
        lr_scheduler_type="constant",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in prompt(batch=8)]
    Trainer(model, arguments, train_dataset=rows, callbacks=[L1Penalty(weight)]).train()
    layers = [module for module in model.modules() if isinstance(module, LofitLayer)]
    return torch.cat([layer.lofit_scale["default"].detach() for layer in layers]), select_heads(model, k=3)


LAUNCHERS = {
    "accelerate": ["accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"],
    "torch": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_equals_one_process(launcher: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", *LAUNCHERS[launcher], "-m", "tests.lofit.data_parallel_worker", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert finished.returncode == 0, finished.stderr[-4000:]
    ranks = [torch.load(path) for path in sorted(tmp_path.glob("rank*.pt"))]
    assert len(ranks) == (2 if launcher == "torch" else 1)
    expected, expected_heads = select(tmp_path, BATCH)
    unpenalised, _ = select(tmp_path, BATCH, weight=0.0)
    assert (expected - unpenalised).abs().max() > 1e-4
    for scales, heads in ranks:
        torch.testing.assert_close(scales, expected, rtol=1e-3, atol=1e-6)
        assert heads == expected_heads
