"""Names of methods, and edits built from what users write."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import yaml

from attn_hooks.edit import Edit
from attn_hooks.errors import error

SHIPPED = {
    "ablate": "attn_hooks.methods.ablate:Ablate",
    "act": "attn_hooks.methods.act:ACT",
    "agla": "attn_hooks.methods.agla:AGLA",
    "anchor": "attn_hooks.methods.anchor:AnchorAttention",
    "dynamic_mask": "attn_hooks.methods.dynamic_mask:DynamicMask",
    "eah": "attn_hooks.methods.eah:EAH",
    "damro": "attn_hooks.methods.damro:DAMRO",
    "head_affine": "attn_hooks.methods.head_affine:HeadAffine",
    "imbalanced": "attn_hooks.methods.imbalanced:Imbalanced",
    "iti": "attn_hooks.methods.iti:ITI",
    "lofit": "attn_hooks.methods.lofit:LoFiT",
    "moba": "attn_hooks.methods.moba:MoBA",
    "opera": "attn_hooks.methods.opera:Opera",
    "pai": "attn_hooks.methods.pai:PAI",
    "pasta": "attn_hooks.methods.pasta:PASTA",
    "power": "attn_hooks.methods.power:PowerAttention",
    "s2": "attn_hooks.methods.s2:S2Attention",
    "sink_scale": "attn_hooks.methods.sink_scale:SinkScale",
    "spin": "attn_hooks.methods.spin:SPIN",
    "streaming": "attn_hooks.methods.streaming:Streaming",
    "trishape": "attn_hooks.methods.trishape:TriShape",
    "var": "attn_hooks.methods.var:VAR",
    "vcd": "attn_hooks.methods.vcd:VCD",
    "vertical_slash": "attn_hooks.methods.vertical_slash:VerticalSlash",
    "vhr": "attn_hooks.methods.vhr:VHR",
    "xattention": "attn_hooks.methods.xattention:XAttention",
}
ENTRY_POINT_GROUP = "attn_hooks.methods"


@cache
def methods() -> dict[str, type[Edit]]:
    """All methods by name: the shipped ones, then those of other packages' entry points."""
    places = dict(SHIPPED)
    for entry_point in entry_points(group=ENTRY_POINT_GROUP):
        if entry_point.name in places and places[entry_point.name] != entry_point.value:
            first, second = places[entry_point.name], entry_point.value
            raise error("duplicate-method", name=entry_point.name, first=first, second=second)
        places[entry_point.name] = entry_point.value
    return {name: _load(place) for name, place in sorted(places.items())}


def _load(place: str) -> type[Edit]:
    module, class_name = place.split(":")
    loaded: type[Edit] = getattr(import_module(module), class_name)
    return loaded


def build_edit(given: str | Mapping[str, Any] | Edit) -> Edit:
    """An edit from its name, from ``"name:path"`` of what was saved, from ``{"method": name, **parameters}``, or as it is."""
    if isinstance(given, Edit):
        return given
    if isinstance(given, str):
        name, colon, path = given.partition(":")
        return _method(name).from_saved(path) if colon else _method(name)()
    if isinstance(given, Mapping) and isinstance(given.get("method"), str):
        parameters = {str(key): value for key, value in given.items() if key != "method"}
        return _method(given["method"])(**parameters)
    raise error("bad-edit", given=repr(given))


def _method(name: str) -> type[Edit]:
    known = methods()
    if name in known:
        return known[name]
    nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    suggestion = f"Did you mean {' or '.join(nearest)}?" if nearest else f"There are: {', '.join(known)}."
    raise error("unknown-method", name=name, suggestion=suggestion)


def resolve_edits(given: tuple[object, ...]) -> tuple[Edit, ...]:
    """Edits from names, configs, mappings and paths of recipes (anything that ends in .yaml or .yml)."""
    edits: list[Edit] = []
    for item in given:
        if isinstance(item, Path) or (isinstance(item, str) and item.endswith((".yaml", ".yml"))):
            edits.extend(edits_of_recipe(Path(item)))
        elif isinstance(item, str | Mapping | Edit):
            edits.append(build_edit(item))
        else:
            raise error("bad-edit", given=repr(item))
    return tuple(edits)


def edits_of_recipe(path: Path) -> list[Edit]:
    """The edits of a recipe file; everything else in it is for the evaluation."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise error("bad-recipe", path=path, detail=problem.strerror or str(problem)) from None
    except UnicodeDecodeError:
        raise error("bad-recipe", path=path, detail="not UTF-8 text") from None
    except yaml.YAMLError as problem:
        raise error("bad-recipe", path=path, detail=f"not valid YAML: {problem}") from None
    listed = content.get("edits") if isinstance(content, dict) else None
    if not isinstance(listed, list):
        raise error("bad-recipe", path=path, detail="it has no list under `edits`")
    return [build_edit(item) for item in listed]
