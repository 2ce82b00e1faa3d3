"""Every test runs on one thread and from the same random state.

ATTN_HOOKS_TEST_DEVICE=cuda runs tests/methods on a GPU (default: cpu).
"""

from __future__ import annotations

import os

import pytest
import torch

torch.set_num_threads(1)
torch.set_default_device(os.environ.get("ATTN_HOOKS_TEST_DEVICE", "cpu"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
