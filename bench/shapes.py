"""What the GPU benchmarks share: model shapes, where results go, how much time is left, and what an error is called."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

Row = dict[str, Any]
MIB = 2**20


@dataclass(frozen=True)
class AttentionShape:
    """Query heads, key and value heads, head_dim of one layer."""

    heads: int
    kv_heads: int
    head_dim: int = 128


SHAPES = {
    "llama-3.1-8b": AttentionShape(32, 8),
    "llava-1.5-7b": AttentionShape(32, 32),
    "qwen2.5-vl-7b": AttentionShape(28, 4),
}
SMOKE_SHAPES = {
    "llama-3.1-8b": AttentionShape(8, 2, 16),
    "llava-1.5-7b": AttentionShape(4, 4, 16),
}


class Budget:
    """Seconds that a run may take, counted from the process's start or from ``started`` (seconds since the epoch)."""

    def __init__(self, seconds: float | None, started: float | None = None) -> None:
        self.seconds = seconds
        self.started = time.time() if started is None else started

    @property
    def left(self) -> float:
        return float("inf") if self.seconds is None else self.seconds - (time.time() - self.started)


@dataclass
class Results:
    """Rows and what they were measured on; on disk after every change, so that a killed run keeps what it has."""

    path: Path | None  # None: kept in memory alone
    meta: dict[str, Any]
    identity: tuple[str, ...]  # the columns that tell rows apart
    rows: list[Row] = field(default_factory=list)

    def key_of(self, row: Row) -> tuple[Any, ...]:
        return tuple(row.get(name) for name in self.identity)

    def resume(self) -> None:
        """Takes over the rows and notes of an earlier run that wrote to the same file."""
        if self.path is not None and self.path.exists():
            earlier = json.loads(self.path.read_text(encoding="utf-8"))
            self.rows = earlier["rows"]
            for what in ("skipped", "lost"):
                notes = [note for note in earlier["meta"].get(what, []) if not note.endswith("out of time")]
                self.meta[what] = notes + self.meta.get(what, [])

    def has(self, row: Row) -> bool:
        return self.key_of(row) in {self.key_of(known) for known in self.rows}

    def put(self, *rows: Row) -> None:
        """Adds rows, in place of those with the same identity."""
        new = {self.key_of(row) for row in rows}
        self.rows = [row for row in self.rows if self.key_of(row) not in new] + list(rows)
        self.write()

    def note(self, what: str, entry: str) -> None:
        """Adds a line to a list in the meta data."""
        listed = self.meta.setdefault(what, [])
        if entry not in listed:
            listed.append(entry)
        self.write()

    def write(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".tmp")
        text = json.dumps({"meta": self.meta, "rows": self.rows}, indent=1, allow_nan=False, default=str)
        unfinished.write_text(text + "\n", encoding="utf-8")
        unfinished.replace(self.path)


def rounded(number: float | None, digits: int = 4) -> float | None:
    """Significant digits as a table needs them; infinities and NaN become None, which JSON has."""
    if number is None or number != number or number in (float("inf"), float("-inf")):
        return None
    return float(f"{number:.{digits}g}")


def environment(program: str, arguments: Sequence[str], commit: str | None) -> dict[str, Any]:
    """What the numbers were measured on."""
    gpu = torch.cuda.is_available()
    versions: dict[str, Any] = {"triton": None, "driver": None}
    with contextlib.suppress(ImportError):
        import triton

        versions["triton"] = triton.__version__
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        versions["driver"] = subprocess.run(asked, capture_output=True, text=True, timeout=10).stdout.split("\n")[0]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if gpu else None,
        **versions,
        "commit": commit or _commit(),
        "command": f"python -m {program} {' '.join(arguments)}".strip(),
        "skipped": [],
    }


def _commit() -> str | None:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
        return subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    return None


def short(problem: BaseException) -> str:
    """One line that says what went wrong."""
    if isinstance(problem, torch.OutOfMemoryError):
        return "out of memory"
    lines = str(problem).strip().splitlines()
    return f"{type(problem).__name__}: {lines[0] if lines else ''}"[:240]


def free_memory() -> None:
    """Gives cached blocks back, after a large or failed measurement."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def device_is_lost() -> bool:
    """True after an illegal access: every later call in this process would fail, too."""
    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


def go_on_in_a_fresh_process(program: str, arguments: Sequence[str], budget: Budget) -> None:
    """Replaces this process, whose device is lost, by one that resumes from the file. Does not return."""
    kept = [argument for argument in arguments if argument != "--resume" and not argument.startswith("--started=")]
    sys.stdout.flush()
    command = [sys.executable, "-m", program, *kept, "--resume", f"--started={budget.started}"]
    os.execv(sys.executable, command)


def add_common_options(parser: argparse.ArgumentParser) -> None:
    listed: dict[str, Any] = {"type": _list_of(str), "default": None, "metavar": "A,B"}
    parser.add_argument("--only", **listed, help="these methods alone")
    parser.add_argument("--shapes", **listed, help="these model shapes alone")
    parser.add_argument(
        "--phases",
        **listed,
        help="prefill, decode or both; end_to_end also has replay; captions: generate, replay, reference",
    )
    parser.add_argument("--lengths", type=_list_of(int), metavar="N,M", help="these numbers of keys alone")
    parser.add_argument("--budget-seconds", type=float, help="stop starting rows after so many seconds")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the output file already has")
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--commit", help="commit to record, where there is no git")
    parser.add_argument(
        "--smoke", action="store_true", help="tiny shapes on the CPU: tries the program, measures nothing"
    )


def _list_of(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: [kind(part) for part in text.split(",") if part]
