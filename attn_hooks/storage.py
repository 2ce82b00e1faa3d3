"""Edits on disk: ``edits.json`` for the parameters, ``edits.safetensors`` for tensors."""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from attn_hooks.blip_relevance import BlipRelevance
from attn_hooks.edit import Edit
from attn_hooks.errors import error
from attn_hooks.registry import build_edit
from attn_hooks.wrapping import wrapping_of

FORMAT_VERSION = 1
JSON_NAME, TENSORS_NAME = "edits.json", "edits.safetensors"


def save_edits(edits: nn.Module | Iterable[Edit], directory: str | Path) -> None:
    """Writes the edits in force on a model, or a list of edits, into ``directory`` (made if missing)."""
    chosen = wrapping_of(edits, "save").edits if isinstance(edits, nn.Module) else tuple(edits)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    rows = []
    for place, edit in enumerate(chosen):
        parameters = edit.model_dump(mode="json")
        for name, value in edit:
            if isinstance(value, BlipRelevance):
                raise error("not-saved", method=edit.method, value=value)
            if isinstance(value, Tensor):
                key = f"{place}.{name}"
                tensors[key] = value.contiguous().cpu()
                parameters[name] = {"tensor": key}
        rows.append({"method": edit.method, **parameters})
    content = {"format_version": FORMAT_VERSION, "attn_hooks_version": version("attn-hooks"), "edits": rows}
    (directory / JSON_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if tensors:
        save_file(tensors, directory / TENSORS_NAME)
    else:
        (directory / TENSORS_NAME).unlink(missing_ok=True)


def load_edits(directory: str | Path) -> tuple[Edit, ...]:
    """The edits that ``save_edits`` wrote, each checked against its method's schema."""
    path = Path(directory) / JSON_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise error("bad-saved-edits", path=path, detail=problem.strerror or str(problem)) from None
    except UnicodeDecodeError:
        raise error("bad-saved-edits", path=path, detail="not UTF-8 text") from None
    except json.JSONDecodeError as problem:
        raise error("bad-saved-edits", path=path, detail=f"not valid JSON: {problem}") from None
    if not isinstance(content, dict) or not isinstance(content.get("edits"), list):
        raise error("bad-saved-edits", path=path, detail="it has no list under 'edits'")
    if content.get("format_version") != FORMAT_VERSION:
        found = content.get("format_version")
        raise error("bad-saved-edits", path=path, detail=f"format version {found}, this one reads {FORMAT_VERSION}")
    return tuple(build_edit(_with_tensors(row, path)) for row in content["edits"])


def _with_tensors(row: Any, path: Path) -> Any:
    if not isinstance(row, dict):
        raise error("bad-saved-edits", path=path, detail=f"an edit is a mapping, got {row!r}")
    return {
        name: _read_tensor(value["tensor"], path) if isinstance(value, dict) and set(value) == {"tensor"} else value
        for name, value in row.items()
    }


def _read_tensor(key: str, path: Path) -> Tensor:
    tensors = path.with_name(TENSORS_NAME)
    try:
        with safe_open(tensors, framework="pt") as file:
            tensor: Tensor = file.get_tensor(key)
    except Exception as problem:
        raise error("bad-saved-edits", path=tensors, detail=f"cannot read tensor {key!r}: {problem}") from None
    return tensor
