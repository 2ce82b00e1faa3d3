"""Edits on disk: JSON for parameters, safetensors for tensors, checked on the way back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import attn_hooks
from attn_hooks import ACT, PASTA, Ablate, Edit, HeadAffine, Streaming, load_edits, save_edits
from tests.hooks.tiny import ACTING_EDITS, HEAD_DIM, NUM_HEADS, NUM_LAYERS, gain_at, logits, tiny_llama

OFFSET = torch.randn(NUM_LAYERS, NUM_HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(3))
SAVED: dict[str, tuple[Edit, ...]] = {
    **{name: (edit,) for name, edit in ACTING_EDITS.items()},
    "all at once": tuple(edit for name, edit in ACTING_EDITS.items() if name == "streaming" or not edit.by_pattern),
    "gain and offset": (HeadAffine(gain=gain_at(0, 1, 2.0), offset=OFFSET),),
    "two of one method": (HeadAffine(gain=gain_at(0, 1, 2.0)), HeadAffine(offset=OFFSET)),
    "image spans": (PASTA(spans="image"),),
    "spans of two prompts": (PASTA(spans=(((0, 3), (5, 6)), ((1, 2),)), mode="include", prompt_length=9),),
    "every field": (ACT(beta=0.25, alpha=3.0, absolute=0.2, faithful="code", layers=(1, 3), later_tokens="keep"),),
    "none": (),
}


def fields(edit: Edit) -> dict[str, object]:
    """Parameters with tensors as lists, so that two edits can be compared."""
    return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in edit}


@pytest.mark.parametrize("name", SAVED)
def test_what_is_saved_is_what_is_loaded(name: str, tmp_path: Path) -> None:
    save_edits(SAVED[name], tmp_path)
    loaded = load_edits(str(tmp_path))
    assert [type(edit) for edit in loaded] == [type(edit) for edit in SAVED[name]]
    assert [fields(edit) for edit in loaded] == [fields(edit) for edit in SAVED[name]]


@pytest.mark.parametrize("name", ["all at once", "two of one method"])
def test_loaded_edits_act_as_the_saved_ones(name: str, tmp_path: Path) -> None:
    model = attn_hooks.wrap(tiny_llama(), *SAVED[name])
    expected = logits(model)
    save_edits(model, tmp_path / "deep" / "folder")
    other = attn_hooks.wrap(tiny_llama(), *load_edits(tmp_path / "deep" / "folder"))
    assert torch.equal(logits(other), expected)


def test_the_files_are_json_and_safetensors(tmp_path: Path) -> None:
    save_edits(SAVED["gain and offset"] + (Streaming(window=7),), tmp_path)
    content = json.loads((tmp_path / "edits.json").read_text())
    assert content["format_version"] == 1
    assert content["edits"][1] == {"method": "streaming", "sinks": 4, "window": 7, "layers": None, "heads": None}
    with safe_open(tmp_path / "edits.safetensors", framework="pt") as file:
        stored = {key: file.get_tensor(key) for key in sorted(file.keys())}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["edits.json", "edits.safetensors"]
    assert sorted(stored) == ["0.gain", "0.offset"]
    assert torch.equal(stored["0.offset"], OFFSET)


def test_saving_again_leaves_no_tensor_of_before(tmp_path: Path) -> None:
    save_edits(SAVED["gain and offset"], tmp_path)
    save_edits([Streaming()], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["edits.json"]
    assert load_edits(tmp_path) == (Streaming(),)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_tensors_keep_their_dtype_and_digits(dtype: torch.dtype, tmp_path: Path) -> None:
    offset = (OFFSET.double() / 3).to(dtype)
    save_edits([HeadAffine(offset=offset)], tmp_path)
    (loaded,) = load_edits(tmp_path)
    assert loaded.offset.dtype == dtype
    assert torch.equal(loaded.offset, offset)


def test_tensors_that_share_memory_can_be_saved(tmp_path: Path) -> None:
    gain = gain_at(0, 1, 2.0)
    views = OFFSET.expand(2, -1, -1, -1)
    edits = (HeadAffine(gain=gain), HeadAffine(gain=gain), HeadAffine(offset=views[0]), HeadAffine(offset=views[1]))
    save_edits(edits, tmp_path)
    assert [fields(edit) for edit in load_edits(tmp_path)] == [fields(edit) for edit in edits]


def test_edits_are_equal_by_their_parameters_tensors_too() -> None:
    assert HeadAffine(gain=gain_at(0, 1, 2.0)) == HeadAffine(gain=gain_at(0, 1, 2.0))
    assert HeadAffine(gain=gain_at(0, 1, 2.0)) != HeadAffine(gain=gain_at(0, 1, 3.0))
    assert HeadAffine(gain=gain_at(0, 1, 2.0)) != HeadAffine(gain=gain_at(0, 1, 2.0), offset=OFFSET)
    assert Ablate(heads={1: [3]}) == Ablate(heads=[(1, 3)])


def test_edits_of_a_block_are_saved_with_those_beneath(tmp_path: Path) -> None:
    model = attn_hooks.wrap(tiny_llama(), Ablate(heads={1: [3]}))
    with attn_hooks.editing(model, "streaming"):
        logits(model)
        save_edits(model, tmp_path)
    assert load_edits(tmp_path) == (Ablate(heads={1: [3]}), Streaming())


@pytest.mark.parametrize("name", ACTING_EDITS)
def test_the_json_form_of_an_edit_builds_it_again(name: str) -> None:
    edit = ACTING_EDITS[name]
    row = json.loads(json.dumps({"method": edit.method, **edit.model_dump(mode="json")}))
    assert fields(attn_hooks.build_edit(row)) == fields(edit)


@pytest.mark.parametrize("name", ACTING_EDITS)
def test_each_schema_describes_every_parameter(name: str) -> None:
    schema = type(ACTING_EDITS[name]).model_json_schema()
    assert schema["additionalProperties"] is False
    assert all("description" in field for field in schema["properties"].values())
    assert json.loads(json.dumps(schema)) == schema
