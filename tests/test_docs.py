"""README, CONTRIBUTING and docs/ are true: their code runs and prints what they show, their links and names exist.

Code of one page runs top to bottom in one namespace. A ``text`` block right behind a ``python`` block is what that block
prints; ``python -m tests.test_docs [PAGE ...]`` writes these blocks anew. A page's code is not run only where a comment
``<!-- not run: reason -->`` stands before it.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import itertools
import os
import re
import shlex
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import typer

import attn_hooks
from attn_eval.cli import app
from attn_eval.recipe import find_recipe, load_recipe, load_settings
from attn_eval.tasks import task_names
from attn_eval.training.recipe import LofitRecipe
from attn_hooks.registry import SHIPPED

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
PAGE_NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
NOT_RUN = "<!-- not run: "
# Written by scripts, as wide as their tables.
GENERATED = {"docs/errors.md", "docs/compatibility.md"}
every_page = pytest.mark.parametrize("name", PAGE_NAMES)


class Block(NamedTuple):
    """A fenced block: its language, its text, the line that it starts on, and the comment that keeps it from running."""

    language: str
    text: str
    line: int
    excuse: str


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks_of(page: str) -> list[Block]:
    blocks = []
    for found in re.finditer(r"^```(\w*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        before = page[: found.start()]
        last_line = before.rstrip().rpartition("\n")[2]
        excuse = last_line.removeprefix(NOT_RUN).removesuffix(" -->") if last_line.startswith(NOT_RUN) else ""
        blocks.append(Block(found[1], found[2], before.count("\n") + 2, excuse))
    return blocks


def printed_by(name: str) -> dict[int, str]:
    """Runs a page's code; line of each python block -> what it printed."""
    printed = {}
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in blocks_of(text_of(name)):
        if block.language != "python" or block.excuse:
            continue
        output = io.StringIO()
        # Line numbers in a traceback are the page's.
        code = compile("\n" * (block.line - 1) + block.text, str(ROOT / name), "exec", dont_inherit=True)
        with contextlib.redirect_stdout(output):
            exec(code, namespace)
        printed[block.line] = output.getvalue()
    return printed


def shown_outputs(page: str) -> dict[int, Block]:
    """Line of a python block -> the text block right behind it."""
    blocks = blocks_of(page)
    return {
        first.line: second
        for first, second in itertools.pairwise(blocks)
        if (first.language, second.language) == ("python", "text")
        and not first.excuse
        # Nothing but the two fences between them.
        and second.line - first.line == first.text.count("\n") + 2
    }


@every_page
def test_code_runs_and_prints_what_the_page_shows(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", attn_hooks.EditNeverActedWarning)
        printed = printed_by(name)
    for line, shown in shown_outputs(text_of(name)).items():
        assert printed[line] == shown.text, f"{name}:{line} prints something else; python -m tests.test_docs writes it"


def test_blocks_that_are_not_run_say_why() -> None:
    excuses = {name: [block.excuse for block in blocks_of(text_of(name)) if block.excuse] for name in PAGE_NAMES}
    assert {name: reasons for name, reasons in excuses.items() if reasons} == NOT_RUN_BLOCKS


# Every block of the docs that no test runs, and why.
NOT_RUN_BLOCKS: dict[str, list[str]] = {}


@every_page
def test_commands_exist(name: str) -> None:
    """``make`` targets, and ``attn-hooks`` commands with options and recipes that it takes."""
    targets = set(re.findall(r"^([\w-]+):", text_of("Makefile"), re.MULTILINE))
    for block in blocks_of(text_of(name)):
        if block.language != "bash":
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["make"]:
                assert {word for word in words[1:] if "=" not in word} <= targets, line
            if words[:1] == ["attn-hooks"]:
                check_command(words[1:])


def check_command(words: list[str]) -> None:
    command: Any = typer.main.get_command(app).get_command(None, words[0])  # type: ignore[attr-defined,arg-type]
    assert command is not None, words
    if words[0] == "lofit":
        command, words = command.get_command(None, words[1]), words[1:]
        assert command is not None, words
        given = command.make_context(words[0], list(words[1:])).params
        path = find_recipe(given["recipe"], attn_hooks.recipes_dir(), "lofit")
        load_settings(path, LofitRecipe, given["overrides"] or [])
        return
    given = command.make_context(words[0], list(words[1:])).params
    if "recipe" in given:
        path = find_recipe(given["recipe"], attn_hooks.recipes_dir())
        load_recipe(path, given["overrides"] or []).build_edits()


@every_page
def test_links_resolve(name: str) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text_of(name)):
        if not target.startswith(("http:", "https:")):
            assert (ROOT / name).parent.joinpath(target).exists(), target


@every_page
def test_anchors_resolve(name: str) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)]*)\)", text_of(name)):
        if not target.startswith(("http:", "https:")):
            page = (ROOT / name).parent / target if target else ROOT / name
            headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{target}#{anchor}"


@every_page
def test_named_files_exist(name: str) -> None:
    """Paths of the repository in backticks, such as `tests/methods/cases.py`; NAME is a placeholder."""
    for path in re.findall(
        r"`((?:attn_hooks|kernels|eval|recipes|tests|bench|testbed|models|docs)/[\w./-]+)`", text_of(name)
    ):
        if "NAME" not in path:
            assert (ROOT / path).exists(), path


@every_page
def test_lines_are_short(name: str) -> None:
    if name not in GENERATED:
        long = [line for line in text_of(name).splitlines() if len(line) > 120 and not line.startswith("|")]
        assert long == []


def test_every_public_name_is_documented() -> None:
    words = set(re.findall(r"\w+", text_of("docs/api.md")))
    assert sorted(set(attn_hooks.__all__) - words) == []


def test_every_method_has_a_section_with_all_its_parameters() -> None:
    sections: dict[str, str] = {}
    for page in sorted((ROOT / "docs" / "methods").glob("*.md")):
        for section in re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
            sections[section.split("\n")[0].split(":")[0].strip("`")] = section
    assert set(SHIPPED) <= set(sections)
    for name, method in attn_hooks.methods().items():
        missing = [field for field in method.model_fields if f"`{field}`" not in sections[name]]
        assert missing == [], name
        numbers = re.findall(r"arXiv (\d+\.\d+)", method.source)
        assert all(number in sections[name] for number in numbers), f"{name} names its paper"


@pytest.mark.parametrize("name", SHIPPED)
def test_every_method_has_a_row_in_the_readme(name: str) -> None:
    assert len(re.findall(rf"^\| \[`{name}`\]", text_of("README.md"), re.MULTILINE)) == 1


def test_every_task_is_documented() -> None:
    page = text_of("docs/evaluation.md")
    assert [name for name in task_names() if f"`{name}`" not in page] == []


def test_default_values_stand_in_the_parameter_tables() -> None:
    """A row of a parameter table is | `name` | default | ...; the default is the code's."""
    for name, method in attn_hooks.methods().items():
        section = next(
            section
            for page in (ROOT / "docs" / "methods").glob("*.md")
            for section in re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
            if section.startswith(f"`{name}`")
        )
        for field, about in method.model_fields.items():
            shown = re.search(rf"^\| `{field}` \| (.*?) \|", section, re.MULTILINE)
            assert shown, (name, field)
            expected = "required" if about.is_required() else inspect.cleandoc(f"`{about.default!r}`")
            assert shown[1] == expected, (name, field)


def test_the_readme_counts_the_families_that_the_table_counts() -> None:
    counts = re.findall(
        r"^\| (?:use transformers|of these pass).*? \| (\d+)", text_of("docs/compatibility.md"), re.MULTILINE
    )
    assert f"[{counts[1]} of {counts[0]}](docs/compatibility.md)" in text_of("README.md")


def write_outputs(names: list[str]) -> None:
    """Puts what the code prints today into the pages."""
    home = Path.cwd()
    for name in names:
        page = text_of(name)
        if not shown_outputs(page):
            continue
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            torch.manual_seed(0)
            printed = printed_by(name)
            os.chdir(home)
        lines = page.splitlines(keepends=True)
        for line, shown in sorted(shown_outputs(page).items(), reverse=True):
            start = shown.line - 1
            lines[start : start + shown.text.count("\n")] = [printed[line]]
        (ROOT / name).write_text("".join(lines), encoding="utf-8")
        print(f"wrote {name}", file=sys.stderr)


if __name__ == "__main__":
    torch.set_num_threads(1)
    write_outputs(sys.argv[1:] or PAGE_NAMES)
