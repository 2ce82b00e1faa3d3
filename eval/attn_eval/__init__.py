"""Long-context tasks, perplexity, hallucination benchmarks, and a runner that measures what an edit of attention does.

The names below are loaded when they are first used: the tasks and their texts need no PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PLACES = {
    "EvaluationError": "attn_eval.errors",
    "Recipe": "attn_eval.recipe",
    "Row": "attn_eval.rows",
    "build_task": "attn_eval.tasks",
    "compare_results": "attn_eval.comparison",
    "get_haystack": "attn_eval.haystack",
    "image_task": "attn_eval.answers",
    "load_recipe": "attn_eval.recipe",
    "load_results": "attn_eval.run_log",
    "run_recipe": "attn_eval.runner",
    "score_answers": "attn_eval.answers",
    "task_names": "attn_eval.tasks",
}

__all__ = sorted(_PLACES)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'attn_eval' has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)
