"""Where the data that ships with the package lies: in a checkout at its root, in a wheel inside the package."""

from __future__ import annotations

from pathlib import Path

from attn_hooks.errors import error

PACKAGE = Path(__file__).resolve().parent


def recipes_dir() -> Path:
    """The folder of the shipped recipes."""
    return _shipped("recipes")


def testbed_path(name: str = "testbed-lm") -> Path:
    """The folder of a shipped model, for ``AutoModelForCausalLM.from_pretrained``."""
    return _shipped(f"models/{name}")


def _shipped(relative: str) -> Path:
    for root in (PACKAGE, PACKAGE.parent):
        if (root / relative).is_dir():
            return root / relative
    raise error("missing-data", what=relative, path=PACKAGE)
