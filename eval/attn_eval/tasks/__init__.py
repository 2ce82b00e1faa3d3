"""The tasks by name. A name is a class and the parameters that make it that task; a recipe can override them."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, NamedTuple

from attn_eval.errors import EvaluationError, nearest
from attn_eval.tasks.base import Draft, GenerationTask, LengthTask, TaskSettings

__all__ = [
    "ENTRY_POINT_GROUP",
    "Draft",
    "GenerationTask",
    "LengthTask",
    "TaskSettings",
    "build_task",
    "task_class",
    "task_names",
]

ENTRY_POINT_GROUP = "attn_hooks.tasks"


class Preset(NamedTuple):
    """Where a task's class is, as ``module:Class``, and the parameters that its name stands for."""

    target: str
    parameters: dict[str, Any]


_NEEDLE = "attn_eval.tasks.needle:NeedleTask"

_PRESETS: dict[str, Preset] = {
    "needle_grid": Preset("attn_eval.tasks.needle_grid:NeedleGridTask", {}),
    "passkey": Preset("attn_eval.tasks.passkey:PasskeyTask", {}),
    "key_value": Preset("attn_eval.tasks.key_value:KeyValueTask", {}),
    "niah_single_1": Preset(_NEEDLE, {"haystack": "noise"}),
    "niah_single_2": Preset(_NEEDLE, {"haystack": "text"}),
    "niah_single_3": Preset(_NEEDLE, {"haystack": "text", "value": "uuid"}),
    "niah_multikey_1": Preset(_NEEDLE, {"haystack": "text", "keys": 4}),
    "niah_multikey_2": Preset(_NEEDLE, {"haystack": "needles"}),
    "niah_multikey_3": Preset(_NEEDLE, {"haystack": "needles", "key": "uuid", "value": "uuid"}),
    "niah_multivalue": Preset(_NEEDLE, {"haystack": "text", "values": 4}),
    "niah_multiquery": Preset(_NEEDLE, {"haystack": "text", "keys": 4, "queries": 4}),
    "variable_tracking": Preset("attn_eval.tasks.variable_tracking:VariableTrackingTask", {}),
    "common_words": Preset("attn_eval.tasks.common_words:CommonWordsTask", {}),
    "frequent_words": Preset("attn_eval.tasks.frequent_words:FrequentWordsTask", {}),
    "pope": Preset("attn_eval.tasks.pope:PopeTask", {}),
    "chair": Preset("attn_eval.tasks.chair:ChairTask", {}),
    "mme": Preset("attn_eval.tasks.mme:MmeTask", {}),
    "amber": Preset("attn_eval.tasks.amber:AmberTask", {}),
    "mmhal": Preset("attn_eval.tasks.mmhal:MmhalTask", {}),
    "perplexity": Preset("attn_eval.perplexity:PerplexityTask", {}),
}


def _presets() -> dict[str, Preset]:
    """Our tasks and those of other packages (entry points of the group ``attn_hooks.tasks``, name = module:Class).

    Raises:
        EvaluationError: another package claims a name that is taken.
    """
    found = dict(_PRESETS)
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if point.name in found:
            raise EvaluationError(f"two tasks are called {point.name!r}: {found[point.name].target} and {point.value}")
        found[point.name] = Preset(point.value, {})
    return found


def task_names() -> list[str]:
    """The names that a recipe's ``task:`` may have, sorted."""
    return sorted(_presets())


def task_class(name: str) -> type[TaskSettings]:
    """The class behind a task's name.

    Raises:
        EvaluationError: no such task; the message names the nearest.
    """
    presets = _presets()
    if name not in presets:
        raise EvaluationError(f"no task {name!r}; {nearest(name, presets)}")
    module, _, attribute = presets[name].target.partition(":")
    loaded: type[TaskSettings] = getattr(import_module(module), attribute)
    return loaded


def build_task(settings: Mapping[str, Any]) -> TaskSettings:
    """The task that a recipe's entry ``{task: NAME, lengths: [...], ...}`` describes.

    Raises:
        EvaluationError: no task of that name.
        pydantic.ValidationError: a parameter that the task doesn't have, or a value that it doesn't allow.
    """
    name = settings.get("task")
    if not isinstance(name, str):
        raise EvaluationError(f"every task needs its name, e.g. 'task: niah_single_1'; {nearest('', task_names())}")
    loaded = task_class(name)
    return loaded(**{**_presets()[name].parameters, **settings})
