"""A public name is added or removed on purpose: here too."""

from __future__ import annotations

import importlib
import inspect
from types import ModuleType

import pytest

import attn_hooks
import attn_kernels
from attn_hooks import Edit
from attn_hooks.registry import SHIPPED

ATTN_HOOKS = {
    "ACT",
    "AGLA",
    "DAMRO",
    "EAH",
    "ITI",
    "PAI",
    "PASTA",
    "SPIN",
    "S2Attention",
    "VAR",
    "VCD",
    "VHR",
    "TriShape",
    "VerticalSlash",
    "XAttention",
    "Ablate",
    "AnchorAttention",
    "AttentionCall",
    "AttnHooksError",
    "BlipRelevance",
    "DynamicMask",
    "Edit",
    "EditError",
    "EditNeverActedWarning",
    "HeadAffine",
    "ImageSpan",
    "Imbalanced",
    "LayerInfo",
    "LoFiT",
    "MoBA",
    "ModelInfo",
    "Opera",
    "PatchGrid",
    "PowerAttention",
    "SinkScale",
    "Streaming",
    "TokenKind",
    "TokenLayout",
    "UnsupportedArgumentError",
    "UnsupportedModelError",
    "build_edit",
    "editing",
    "edits_in_force",
    "explain",
    "find_spans",
    "inspect_model",
    "layout_of",
    "load_edits",
    "methods",
    "recipes_dir",
    "report",
    "save_edits",
    "testbed_path",
    "unwrap",
    "wrap",
}
ATTN_KERNELS = {
    "AttentionInputs",
    "Fidelity",
    "Gate",
    "HeadAffine",
    "HeaviestKeys",
    "KeyTiles",
    "LogitMap",
    "Order",
    "Pattern",
    "PowerOfTwoBlocks",
    "Primitive",
    "Ranking",
    "Recall",
    "Regroup",
    "ShardedBlocks",
    "SinkAndWindow",
    "Sparsity",
    "Tap",
    "edited_attention",
    "edited_attention_reference",
    "edited_weights",
    "head_affine",
    "head_selection",
    "indices_of_heads",
    "measure_recall",
    "moved_mass",
    "read_taps",
}


@pytest.mark.parametrize(("package", "names"), [(attn_hooks, ATTN_HOOKS), (attn_kernels, ATTN_KERNELS)])
def test_public_names_are_pinned(package: ModuleType, names: set[str]) -> None:
    assert len(package.__all__) == len(set(package.__all__))
    assert set(package.__all__) == names
    assert all(hasattr(package, name) for name in names)


def test_the_registry_and_the_exported_methods_are_the_same() -> None:
    exported = {
        value
        for name in attn_hooks.__all__
        if inspect.isclass(value := getattr(attn_hooks, name)) and issubclass(value, Edit) and value is not Edit
    }
    assert set(attn_hooks.methods().values()) == exported
    assert list(attn_hooks.methods()) == sorted(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_method_lies_in_the_file_of_its_name(name: str) -> None:
    method = attn_hooks.methods()[name]
    assert method.method == name
    assert SHIPPED[name] == f"attn_hooks.methods.{name}:{method.__name__}"
    assert method.__module__ == f"attn_hooks.methods.{name}"


@pytest.mark.parametrize("name", SHIPPED)
def test_a_method_documents_itself(name: str) -> None:
    method = attn_hooks.methods()[name]
    module = importlib.import_module(method.__module__)
    assert "Source:" in (module.__doc__ or "")
    assert "arXiv" in method.source
    undocumented = [field for field, info in method.model_fields.items() if not info.description]
    assert undocumented == []


@pytest.mark.parametrize("name", sorted(ATTN_HOOKS))
def test_public_objects_have_docstrings(name: str) -> None:
    value = getattr(attn_hooks, name)
    inherited = value.__mro__[1].__doc__ if inspect.isclass(value) else None
    assert value.__doc__
    assert value.__doc__ != inherited
