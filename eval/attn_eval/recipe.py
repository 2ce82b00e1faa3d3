"""A recipe: the YAML file that says which model, which edits, which tasks, and what a paper reports.

Every mistake in it ends in one line that names the key and the nearest one that exists.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator, model_validator

from attn_eval.errors import EvaluationError, nearest
from attn_eval.tasks import TaskSettings, build_task, task_class

if TYPE_CHECKING:
    # Imported where it is used: it brings PyTorch, which a look at a recipe doesn't need.
    import attn_hooks


Settings = TypeVar("Settings", bound=BaseModel)


class GenerationSettings(BaseModel):
    """How answers are written.

    Attributes:
        do_sample: False is greedy decoding, RULER's setting.
        temperature, top_p, top_k: for sampling only.
        num_beams: beams of a search; 1: none.
        chat_template: put each prompt into the tokenizer's chat template, the answer prefix behind the opening of
            the assistant's turn. Questions about images always go through the processor's.
        image_prompt: in place of the processor's chat template, a text with ``{image}``, for the model's image token,
            and ``{question}``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    do_sample: bool = False
    temperature: Annotated[float, Field(gt=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: PositiveInt | None = None
    num_beams: PositiveInt = 1
    chat_template: bool = False
    image_prompt: str | None = None

    @field_validator("image_prompt")
    @classmethod
    def _prompt_has_both_places(cls, prompt: str | None) -> str | None:
        if prompt is not None and not all(prompt.count(place) == 1 for place in ("{image}", "{question}")):
            raise ValueError("generation.image_prompt needs {image} and {question}, each once")
        return prompt

    @model_validator(mode="after")
    def _sampling_options_need_sampling(self) -> Self:
        given = [name for name in ("temperature", "top_p", "top_k") if getattr(self, name) is not None]
        if given and not self.do_sample:
            raise ValueError(f"{', '.join(given)} has no effect without do_sample: true")
        return self


class PublishedFigure(BaseModel):
    """A figure that a paper reports, to stand beside ours.

    Attributes:
        metric: what was measured, with task and length.
        value: in the paper's own unit.
        source: paper, table or section.
        note: what differs from our measurement.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    metric: str
    value: float | str
    source: str
    note: str = ""


class Recipe(BaseModel):
    """A whole evaluation.

    Attributes:
        name: of the results; letters, digits, ``-``, ``_``, ``.`` and ``/``.
        description: what it shows.
        model: a folder, a model id of the Hugging Face hub, or ``testbed-lm`` (shipped).
        dtype: of the weights; ``auto`` takes that of the checkpoint.
        device: ``auto`` takes a GPU if there is one.
        edits: each ``{method: NAME, parameter: value, ...}`` or just ``NAME``, see ``attn-hooks methods``. Empty: the
            baseline alone.
        tasks: each ``{task: NAME, lengths: [...], ...}``.
        generation: how answers are written.
        seed: of the data, the sampling and the bootstrap.
        batch_size: prompts at a time, left-padded.
        published: figures of papers, or ``none`` where there is none for this model and method.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*$")]
    description: str = ""
    model: Annotated[str, Field(min_length=1)]
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    edits: tuple[dict[str, Any], ...] = ()
    tasks: Annotated[tuple[dict[str, Any], ...], Field(min_length=1)]
    generation: GenerationSettings = GenerationSettings()
    seed: int = 42
    batch_size: PositiveInt = 1
    published: Literal["none"] | tuple[PublishedFigure, ...] = "none"

    @field_validator("edits", mode="before")
    @classmethod
    def _names_are_edits(cls, edits: Any) -> Any:
        """A bare name is that method with its defaults, as in ``attn_hooks.wrap``."""
        if not isinstance(edits, list | tuple):
            return edits
        return [{"method": edit} if isinstance(edit, str) else edit for edit in edits]

    @field_validator("edits")
    @classmethod
    def _edits_have_methods(cls, edits: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        for index, edit in enumerate(edits):
            if not isinstance(edit.get("method"), str):
                raise ValueError(f"edit {index} names no method; write '- method: act', see 'attn-hooks methods'")
        return edits

    @field_validator("tasks")
    @classmethod
    def _tasks_are_known(cls, tasks: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        built = []
        for entry in tasks:
            try:
                built.append(build_task(entry))
            except ValidationError as error:
                owner = f"task {entry['task']!r}"
                raise ValueError(explain_faults(error, task_class(entry["task"]), owner)) from error
        names = [task.name for task in built]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two tasks are called {name!r}: give each a label of its own")
        return tasks

    def build_tasks(self, limit: int | None = None) -> list[TaskSettings]:
        """The tasks, each with at most ``limit`` samples."""
        tasks = [build_task(entry) for entry in self.tasks]
        if limit is None:
            return tasks
        return [task.limited(limit) for task in tasks]

    def build_edits(self) -> list[attn_hooks.Edit]:
        """The edits.

        Raises:
            EvaluationError: a method has no parameter of a name that is given; the message names the nearest.
            attn_hooks.AttnHooksError: no such method, or a value that it doesn't allow.
        """
        import attn_hooks

        methods = attn_hooks.methods()
        for edit in self.edits:
            method = methods.get(edit["method"])
            if method is None:
                continue
            for name in edit:
                if name != "method" and name not in method.model_fields:
                    raise EvaluationError(
                        f"the method {edit['method']!r} has no parameter {name!r}; {nearest(name, method.model_fields)}"
                    )
        return [attn_hooks.build_edit(edit) for edit in self.edits]

    def fingerprint(self) -> str:
        """The sha256 of everything that can change a result: all but name, description and published figures."""
        return self._sha256_without("name", "description", "published")

    def baseline_fingerprint(self) -> str:
        """The sha256 of everything that can change what the model as it is answers."""
        return self._sha256_without("name", "description", "published", "edits")

    def _sha256_without(self, *keys: str) -> str:
        relevant = self.model_dump(mode="json", exclude=set(keys))
        return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()


def find_recipe(recipe: str, shipped: Path, kind: Literal["", "lofit"] = "") -> Path:
    """The file of a recipe: a path, or the name of a shipped one such as ``testbed-lm/streaming``.

    Args:
        recipe: as given.
        shipped: the folder of the shipped recipes.
        kind: ``lofit`` looks among those of fine-tuning, which have a folder of their own.

    Raises:
        EvaluationError: neither is there; the message names the nearest shipped recipes.
    """
    given = Path(recipe).expanduser()
    shipped_name = recipe.removeprefix("recipes/").removeprefix(f"{kind}/").removesuffix(".yaml")
    shipped = shipped / kind
    for candidate in (given, shipped / f"{shipped_name}.yaml"):
        if candidate.is_file():
            return candidate
    names = [str(path.relative_to(shipped).with_suffix("")) for path in shipped.glob("*/*.yaml")]
    raise EvaluationError(
        f"no recipe {recipe!r}, neither as a file nor as a shipped one; {nearest(shipped_name, names)}"
    )


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe; see `load_settings`."""
    return load_settings(path, Recipe, overrides)


def load_settings(path: Path, kind: type[Settings], overrides: Sequence[str] = ()) -> Settings:
    """Read a YAML file of one kind of recipe and validate it.

    Args:
        path: the YAML file.
        kind: what it must be.
        overrides: ``key=value`` each; the key dotted (``generation.do_sample``, ``tasks.0.samples``, or
            ``tasks.niah_single_1.samples`` by the task's label, ``edits.act.beta`` by the method), the value YAML.

    Raises:
        EvaluationError: whatever is wrong, in one line.
    """
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"the recipe {path} can't be read: {error}") from error
    except yaml.YAMLError as error:
        raise EvaluationError(f"the recipe {path} is no valid YAML: {_one_line(str(error))}") from error
    if not isinstance(loaded, dict):
        raise EvaluationError(f"the recipe {path} must be a table of keys ({', '.join(kind.model_fields)})")
    for override in overrides:
        _apply(loaded, override, kind)
    try:
        return kind.model_validate(loaded)
    except ValidationError as error:
        raise EvaluationError(f"the recipe {path}: {explain_faults(error, kind)}") from error


def parse_override(override: str) -> tuple[str, Any]:
    """Key and value of ``key=value``, the value read as YAML.

    Raises:
        EvaluationError: it is not of that form.
    """
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise EvaluationError(f"--set {override!r} is not of the form key=value, e.g. --set batch_size=4")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise EvaluationError(f"--set {key}: the value {value!r} is no valid YAML: {_one_line(str(error))}") from error


def _apply(recipe: dict[str, Any], override: str, kind: type[BaseModel]) -> None:
    key, parsed = parse_override(override)
    *parents, last = key.split(".")
    first = key.split(".")[0]
    if first not in kind.model_fields:
        raise EvaluationError(f"--set {key}: a recipe has no key {first!r}; {nearest(first, kind.model_fields)}")
    if first == "generation":
        recipe.setdefault(first, {})
    owner: Any = recipe
    for part in parents:
        owner = _step(owner, part, key)
    if isinstance(owner, list):
        owner[_index(owner, last, key)] = parsed
    elif isinstance(owner, dict):
        owner[last] = parsed
    else:
        raise EvaluationError(f"--set {key}: {'.'.join(parents)} is a value and has no key {last!r}")


def _step(owner: Any, part: str, key: str) -> Any:
    if isinstance(owner, list):
        return owner[_index(owner, part, key)]
    if isinstance(owner, dict):
        if part not in owner:
            raise EvaluationError(f"--set {key}: nothing called {part!r} there; {nearest(part, map(str, owner))}")
        return owner[part]
    raise EvaluationError(f"--set {key}: {part!r} can't be looked up in a plain value")


def _index(entries: list[Any], part: str, key: str) -> int:
    names = [str(entry.get("label") or entry.get("task") or entry.get("method")) for entry in entries]
    if part in names:
        return names.index(part)
    if part.isdecimal() and int(part) < len(entries):
        return int(part)
    allowed = [*names, *map(str, range(len(entries)))]
    raise EvaluationError(f"--set {key}: no entry {part!r} there; {nearest(part, allowed)}")


def explain_faults(error: ValidationError, model: type[BaseModel], owner: str = "") -> str:
    """All the faults that pydantic found, in one line, with the nearest allowed key for an unknown one."""
    faults = []
    for fault in error.errors():
        location = [str(part) for part in fault["loc"]]
        where = ".".join(location) or "it"
        if fault["type"] == "extra_forbidden":
            allowed = _allowed_keys(model, location[:-1])
            faults.append(f"no key {where!r}; {nearest(location[-1], allowed)}")
        elif fault["type"] == "missing":
            faults.append(f"the key {where!r} is missing")
        elif fault["type"] == "value_error":
            faults.append(str(fault["ctx"]["error"]))
        else:
            wanted = fault["msg"].lower().replace("valid tuple", "list").replace("valid dictionary", "table of keys")
            faults.append(f"{where}: {wanted}, given {fault['input']!r}")
    text = _one_line("; ".join(dict.fromkeys(faults)))
    return f"{owner}: {text}" if owner else text


def _allowed_keys(model: type[BaseModel], parents: Sequence[str]) -> list[str]:
    """The keys of the model that the location's parents lead to; of several kinds, those of the one that is named."""
    owners = [model]
    for part in parents:
        inside = [kind for owner in owners if part in owner.model_fields for kind in _models_of(owner, part)]
        named = [owner for owner in owners if any(part in get_args(f.annotation) for f in owner.model_fields.values())]
        owners = inside or named or owners
    return sorted({name for owner in owners for name in owner.model_fields})


def _models_of(owner: type[BaseModel], field: str) -> list[type[BaseModel]]:
    found: list[type[BaseModel]] = []
    waiting: list[Any] = [owner.model_fields[field].annotation]
    while waiting:
        kind = waiting.pop()
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found.append(kind)
        waiting += get_args(kind)
    return found


def _one_line(text: str) -> str:
    return " ".join(text.split())
