"""The package's public names, and that its tasks load without PyTorch."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import attn_eval

ROOT = Path(__file__).resolve().parents[2]


def test_public_names_are_the_ones_meant() -> None:
    assert attn_eval.__all__ == [
        "EvaluationError",
        "Recipe",
        "Row",
        "build_task",
        "compare_results",
        "get_haystack",
        "image_task",
        "load_recipe",
        "load_results",
        "run_recipe",
        "score_answers",
        "task_names",
    ]
    assert all(getattr(attn_eval, name).__module__.startswith("attn_eval") for name in attn_eval.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        attn_eval.nothing  # noqa: B018


def test_tasks_need_no_pytorch() -> None:
    script = (
        "import sys\nfrom attn_eval import build_task, templates\n"
        "build_task({'task': 'passkey', 'lengths': [100]})\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_every_extra_that_an_error_or_a_page_names_is_there() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    files = [file for part in ("eval/**/*.py", "attn_hooks/**/*.py", "docs/**/*.md") for file in ROOT.glob(part)]
    named = {name for file in files for name in re.findall(r"attn-hooks\[(\w+)\]", file.read_text(encoding="utf-8"))}
    assert {"chair", "amber", "eval"} <= named <= extras.keys()
    # The words of both scripts are tagged by one release.
    assert set(extras["chair"]) < set(extras["amber"])
