"""One process of a launcher: selects heads with Trainer, and saves the trained scales of this rank.

Usage: accelerate launch -m tests.lofit.data_parallel_worker DIRECTORY, or python -m torch.distributed.run for several.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from tests.lofit.test_data_parallel import BATCH, select


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    found = select(folder / "out", batch=BATCH // int(os.environ.get("WORLD_SIZE", "1")))
    torch.save(found, folder / f"rank{os.environ.get('RANK', '0')}.pt")


if __name__ == "__main__":
    main()
