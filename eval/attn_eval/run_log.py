"""The log of a run: one line a sample, written as it comes, so that a killed run goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from attn_eval.errors import EvaluationError

MANIFEST = "run.json"
FORMAT_VERSION = 1
SAMPLES = "samples.jsonl"
REPORTS = "reports.jsonl"
RESULTS = "results.json"
BASELINE, EDITED = "baseline", "edited"

Record = dict[str, Any]


class RunLog:
    """A folder with the manifest of a run and its samples so far.

    Args:
        folder: made if it isn't there.
        manifest: what must not change between the parts of one run: the recipe's and the data's hashes.

    Raises:
        EvaluationError: the folder can't be written, or holds a run with another manifest.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        existing = folder / MANIFEST
        if existing.is_file():
            before = _read_json(existing)
            changed = sorted(key for key in {*before, *manifest} if before.get(key) != manifest.get(key))
            if changed:
                raise EvaluationError(
                    f"{folder} holds a run that differs in its {' and '.join(changed).replace('_', ' ')}, so it can't be "
                    "gone on with: give another folder with -o, or --overwrite to begin anew"
                )
        else:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                existing.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
            except OSError as problem:
                raise EvaluationError(f"{folder} can't be written: {problem.strerror or problem}") from problem
        _mend(folder / SAMPLES)
        _mend(folder / REPORTS)
        self.records: dict[tuple[str, str], Record] = {}
        for record in _complete_lines(folder / SAMPLES):
            self.records[record["run"], record["id"]] = record

    def has(self, run: str, sample: str) -> bool:
        """Whether that sample of that run (baseline or edited) is in the log."""
        return (run, sample) in self.records

    def take_baseline(self, other: Path) -> None:
        """Copy the answers of the model as it is from another run's log, as far as it holds them."""
        self.add([record for record in _complete_lines(other / SAMPLES) if record["run"] == BASELINE])

    @staticmethod
    def check_baseline(other: Path, manifest: Record) -> None:
        """Whether a run with this manifest may take over the answers of another one's model as it is.

        Raises:
            EvaluationError: there is no run in the folder, or one whose model as it is might answer otherwise.
        """
        if not (other / MANIFEST).is_file():
            raise EvaluationError(f"no run.json in {other}: give --baseline the folder of another 'attn-hooks run'")
        mine, its = ({**given, "recipe": None} for given in (manifest, _read_json(other / MANIFEST)))
        changed = sorted(key for key in {*mine, *its} if mine.get(key) != its.get(key))
        if changed:
            raise EvaluationError(
                f"{other} holds a run that differs in its {' and '.join(changed).replace('_', ' ')}, so its baseline is not "
                "this one's: leave --baseline out"
            )

    def add(self, records: Iterable[Record]) -> None:
        """Write records that are not there yet; they are on the disk when this returns."""
        with (self.folder / SAMPLES).open("a", encoding="utf-8") as log:
            for record in records:
                key = record["run"], record["id"]
                if key not in self.records:
                    log.write(json.dumps(record) + "\n")
                    self.records[key] = record

    def add_report(self, task: str, samples: int, report: dict[str, Any]) -> None:
        """Keep what the edits say that they did over the last ``samples`` samples of a task."""
        with (self.folder / REPORTS).open("a", encoding="utf-8") as log:
            log.write(json.dumps({"task": task, "samples": samples, "report": report}) + "\n")

    def reports(self) -> list[dict[str, Any]]:
        """The reports so far, one for each part of a run and task that came to its end."""
        return _complete_lines(self.folder / REPORTS)


def forget_run(folder: Path) -> None:
    """Remove a run's files from a folder, and nothing else."""
    for name in (MANIFEST, SAMPLES, REPORTS, RESULTS):
        (folder / name).unlink(missing_ok=True)


def load_results(folder: Path) -> dict[str, Any]:
    """What `run_recipe` wrote to a folder.

    Raises:
        EvaluationError: there is no finished run in the folder, or one of a format that this version doesn't read.
    """
    path = folder / RESULTS
    if not path.is_file():
        raise EvaluationError(f"no results.json in {folder}: give the folder of a finished 'attn-hooks run'")
    results = _read_json(path)
    if results.get("format_version") != FORMAT_VERSION:
        raise EvaluationError(f"{path} has format {results.get('format_version')}, this version reads {FORMAT_VERSION}")
    return results


def _complete_lines(path: Path) -> list[Record]:
    """The JSON lines of a log, but for a last one that a kill cut short."""
    if not path.is_file():
        return []
    content = path.read_bytes()
    try:
        return [json.loads(line) for line in content[: content.rfind(b"\n") + 1].decode("utf-8").splitlines()]
    except ValueError as error:
        raise EvaluationError(f"{path} is damaged ({error}): give another folder, or --overwrite") from error


def _mend(path: Path) -> None:
    """Take a last line that a kill cut short off the file."""
    if path.is_file():
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            path.write_bytes(whole)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{path} can't be read: {error}") from error
    if not isinstance(loaded, dict):
        raise EvaluationError(f"{path} is not a table of keys")
    return loaded
