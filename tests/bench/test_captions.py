"""bench.captions: what may stand beside what."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import captions
from bench.shapes import environment


def row(ratio: float | None = 1.5, **other: Any) -> dict[str, Any]:
    known = {"setting": "pai", "mode": "generate", "goal": 1.08, "new_tokens": 256}
    return known | ({"error": "out of memory"} if ratio is None else {"ratio": ratio}) | other


def written(file: Path, **changed: Any) -> Path:
    content = {"meta": environment("bench.captions", [], "c") | changed, "rows": [row(1.25)]}
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


def test_ratios_of_the_rows_of_this_machine_stand_beside_each_other(tmp_path: Path) -> None:
    earlier = captions.rows_of_this_machine(written(tmp_path / "a.json", date="long ago"), environment("x", [], None))
    cells = captions.captions_table([row(), row(1.0, mode="replay")], earlier).splitlines()[-1].split("|")
    assert [cell.strip() for cell in cells[1:4]] == ["pai", "**1.50** (was 1.25)", "1.00"]
    # A row that failed, and captions of another length, are nothing to compare with.
    for other in ([row(None)], [row(new_tokens=6)]):
        assert "was" not in captions.captions_table([row()], other)


@pytest.mark.parametrize("name", captions.MACHINE)
def test_another_machine_is_refused_by_name(name: str, tmp_path: Path) -> None:
    meta = environment("x", [], None)
    with pytest.raises(ValueError, match=rf"measured elsewhere \({name} another there, "):
        captions.rows_of_this_machine(written(tmp_path / "a.json", **{name: "another"}), meta)


def test_other_files_are_refused(tmp_path: Path) -> None:
    meta = environment("x", [], None)
    with pytest.raises(ValueError, match=r"no file of bench\.captions: FileNotFoundError"):
        captions.rows_of_this_machine(tmp_path / "none.json", meta)
    for content in ("{", "[]", '{"rows": []}', '{"meta": {}, "rows": [{"mode": "prefill"}]}'):
        (tmp_path / "b.json").write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=r"no file of bench\.captions"):
            captions.rows_of_this_machine(tmp_path / "b.json", meta)


@pytest.mark.parametrize("arguments", [["--baseline", "FILE"], ["--resume", "--out", "FILE"]])
def test_nothing_is_measured_beside_another_machine(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path / "a.json", gpu="another")
    before = file.read_text(encoding="utf-8")
    given = [str(file) if argument == "FILE" else argument for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["captions", "--smoke", *given])
    monkeypatch.setattr(captions, "Captions", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit) as stopped:
        captions.main()
    assert stopped.value.code == 2
    assert "gpu another there" in capsys.readouterr().err
    assert file.read_text(encoding="utf-8") == before


def test_every_reference_writes_its_caption(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["captions", "--smoke", "--phases", "reference"])
    captions.main()
    table = capsys.readouterr().out.splitlines()
    measured = {cells[1].strip() for line in table if (cells := line.split("|"))[0] == "" and "." in cells[-3]}
    assert measured == {*captions.EDITED_WEIGHTS, *captions.OTHER_REFERENCES}
    assert "failed" not in table[-1]
