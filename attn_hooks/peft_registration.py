"""Makes ``LOFIT`` known to PEFT as soon as both are imported, without importing PEFT, which takes seconds."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


class _AfterPeft(MetaPathFinder):
    """Finds PEFT as Python does, and registers once its module has run."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "peft":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            import_module("attn_hooks.lofit")

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def register_with_peft() -> None:
    """Now if PEFT is imported already, else when it is; never if it is not installed."""
    if sys.modules.get("peft") is not None:
        import_module("attn_hooks.lofit")
    elif not any(isinstance(finder, _AfterPeft) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterPeft())
