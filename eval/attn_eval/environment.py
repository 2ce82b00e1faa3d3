"""What a result was made with: versions, machine, commit."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "attn-hooks",
    "torch",
    "transformers",
    "tokenizers",
    "numpy",
    "peft",
    "wonderwords",
    "triton",
    "pillow",
    "nltk",
    "spacy",
)
# Those that can change what an unedited model answers.
PACKAGES_OF_ANSWERS = ("torch", "transformers", "tokenizers", "pillow")


def describe_environment() -> dict[str, Any]:
    """Versions of what can change a result, the commit of a checkout, and the device."""
    import torch

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch_threads": torch.get_num_threads(),
    }


def unlike(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """What of two environments can make an unedited model answer otherwise, or in another time: ``gpu A and B``, ..."""
    pairs = {"gpu": (first["gpu"], second["gpu"])}
    pairs |= {name: (first["packages"].get(name), second["packages"].get(name)) for name in PACKAGES_OF_ANSWERS}
    return [f"{name} {one or 'none'} and {other or 'none'}" for name, (one, other) in pairs.items() if one != other]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout that this package runs from, with ``+changes`` if its files differ from it; None for
    an installed package, even if that is installed inside some other repository."""
    package = Path(__file__).resolve().parent
    try:
        root = Path(_git(package, "rev-parse", "--show-toplevel"))
        if root / "eval" / "attn_eval" != package:
            return None
        changed = _git(root, "status", "--porcelain", "--", "attn_hooks", "kernels", "eval", "models")
        return _git(root, "rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()
