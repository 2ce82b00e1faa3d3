"""docs/errors.md, the catalogue, the code and the tests hold together."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from attn_hooks import AttnHooksError
from attn_hooks.errors import CATALOGUE, catalogue_as_markdown, error

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "attn_hooks").rglob("*.py"))

# The only raises in attn_hooks that do not go through the catalogue: exception class -> where it may stand, and why.
OUTSIDE_THE_CATALOGUE = {
    ("ValueError", "edit.py"): "inside pydantic validators: becomes bad-parameters",
    ("ValueError", "methods"): "inside pydantic validators: becomes bad-parameters",
    ("NotImplementedError", "edit.py"): "a method without primitives(): its author's mistake, not a user's",
}
MAKERS = {"error", "refuse_phase", "refuse", "_refused"}


def _raises() -> Iterator[tuple[Path, ast.Raise]]:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise):
                yield path, node


def _called_name(node: ast.expr | None) -> str | None:
    if not isinstance(node, ast.Call):
        return None
    if isinstance(node.func, ast.Name):
        return node.func.id
    return node.func.attr if isinstance(node.func, ast.Attribute) else None


def _is_allowed(path: Path, node: ast.Raise) -> bool:
    if node.exc is None or (isinstance(node.exc, ast.Name) and node.exc.id.islower()):
        # A bare re-raise, or a variable that holds an exception caught before.
        return True
    name = _called_name(node.exc)
    places = {path.name, path.parent.name}
    return name in MAKERS or any(name == kind and place in places for kind, place in OUTSIDE_THE_CATALOGUE)


def _codes_used() -> set[str]:
    used = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if _called_name(node) == "error" and node.args and isinstance(node.args[0], ast.Constant):
                used.add(node.args[0].value)
    return used


def test_docs_errors_is_what_the_catalogue_writes() -> None:
    written = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    assert written == catalogue_as_markdown(), "run: python -m attn_hooks.errors > docs/errors.md"


@pytest.mark.parametrize("code", CATALOGUE)
def test_each_row_of_docs_errors_is_complete(code: str) -> None:
    rows = [line for line in catalogue_as_markdown().splitlines() if line.startswith(f"| `{code}` |")]
    assert len(rows) == 1
    cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", rows[0])[1:-1]]
    assert len(cells) == 4
    assert all(cells)


def test_every_raise_goes_through_the_catalogue() -> None:
    stray = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"
        for path, node in _raises()
        if not _is_allowed(path, node)
    ]
    assert stray == []


def test_no_allowance_is_left_over() -> None:
    used = {
        (name, place)
        for path, node in _raises()
        for place in (path.name, path.parent.name)
        if (name := _called_name(node.exc)) is not None
    }
    assert OUTSIDE_THE_CATALOGUE.keys() <= used


def test_no_assertion_guards_what_a_user_may_do() -> None:
    """Assertions vanish under ``python -O``; each one left must say what cannot happen."""
    silent = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Assert) and node.msg is None and not _narrows_a_type(node.test)
    ]
    assert silent == []


def _narrows_a_type(test: ast.expr) -> bool:
    return (isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.IsNot)) or _called_name(test) == "isinstance"


def test_codes_raised_and_codes_in_the_catalogue_are_the_same() -> None:
    assert _codes_used() == set(CATALOGUE)


@pytest.mark.parametrize("code", CATALOGUE)
def test_each_code_is_raised_in_some_test(code: str) -> None:
    here = Path(__file__).resolve()
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py") if path != here]
    assert any(f'"{code}"' in text for text in texts)


@pytest.mark.parametrize("code", CATALOGUE)
def test_a_message_is_made_of_its_placeholders_only(code: str) -> None:
    template = CATALOGUE[code].message
    names = re.findall(r"{(\w+)(?:![rs])?}", template)
    assert names, "a message names what was given"
    made = error(code, **{name: f"<{name}>" for name in names})
    assert isinstance(made, AttnHooksError)
    assert made.code == code
    assert all(f"<{name}>" in str(made) for name in names)
    assert str(made).endswith(f"[{code}]")
