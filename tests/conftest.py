"""Every test runs on one thread and from the same random state.

Without a GPU the Triton kernels run in Triton's interpreter. ATTN_HOOKS_TEST_DEVICE=cuda runs tests/methods on a GPU
(default: cpu).
"""

from __future__ import annotations

import os

import pytest
import torch

# Read when the first kernel is imported, by whichever test comes first. Set for processes that tests start, too.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)
torch.set_default_device(os.environ.get("ATTN_HOOKS_TEST_DEVICE", "cpu"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
