"""docs/compatibility.md out of the sweep's results: ``python -m tests.compat.write_table`` or ``make compat``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from tests.compat.checks import CHECK_NAMES, ERROR_FACTOR, GAIN, FamilyResult, Interface, check_family
from tests.compat.known_gaps import KNOWN_GAPS, KNOWN_GAPS_ON_EAGER
from tests.families import Family, causal_lm_families

TABLE_PATH = Path(__file__).resolve().parents[2] / "docs" / "compatibility.md"

INTRODUCTION = """\
# Model families

Measured, not claimed: `make compat` builds a tiny random model of every family in the causal-LM mapping of transformers
{version}, from the family's own config class, puts edits on it and writes this page. The sizes are in
`tests/family_configs.py`: two to four layers, one of each kind that the family has (sliding, chunked, linear, full
attention, experts), grouped-query heads where it has them, windows and top-k small enough to bite on 24 tokens.

{summary}

Checks, all in float32 on CPU, on two prompts of which one is left-padded:

- **identity**: wrapped without an edit, the logits are equal bit for bit.
- **Regroup**: every third key of every head and layer keeps a quarter of its weight, the rest of the row takes what is
  freed. The logits match an oracle that builds all N x M weights in float64 and changes them literally
  (`tests/compat/oracle.py`), within {error_factor:.0f} times what the unedited model errs against the same oracle.
- **HeadAffine**: one head of the last attention layer times {gain:.0f}, against the same oracle.
- **generate**: greedy generation under the Regroup, from the padded batch and with a cache: the logits of every new token
  match the oracle's, and, where the family's own cache is exact, those without a cache.
- **unwrap**: logits bit for bit as before; no hook, attribute or config left behind, nor after a refused call.

The backend is the one that the family runs on by default: `eager` where it refuses SDPA. The column "on eager" repeats
all checks on eager attention. "Layers" counts the attention modules that a forward on token ids calls; in hybrids the
others are linear attention or state space.
"""

TITLES: dict[Interface, str] = {
    "no": "Families whose attention does not go through the interface",
    "no attention": "Families without softmax attention",
    "not built": "Families that the installed packages cannot build",
}
EXPLANATIONS: dict[Interface, str] = {
    "no": "`wrap()` refuses them and says so.",
    "no attention": "`wrap()` refuses them and says so.",
    "not built": "Nothing is known of them.",
}


@dataclass(frozen=True)
class Row:
    """One family on its default backend and, where that is another, on eager."""

    default: FamilyResult
    eager: FamilyResult

    @property
    def note(self) -> str:
        """Reasons for what does not pass, ours if we know them, else what the checks said; then remarks."""
        family = self.default.family
        reasons = [KNOWN_GAPS.get(family) or said(self.default)] if self.default.failures else []
        if self.eager.failures and not self.default.failures:
            reasons.append(KNOWN_GAPS_ON_EAGER.get(family) or f"on eager: {said(self.eager)}")
        return "; ".join([*reasons, *self.default.notes])


def measure(family: Family) -> Row:
    """All checks on one family."""
    default = check_family(family)
    on_other_backend = default.interface == "yes" and default.backend != "eager"
    return Row(default, check_family(family, "eager") if on_other_backend else default)


def said(result: FamilyResult) -> str:
    """What the failed checks said, each thing once."""
    messages = (message.removeprefix(f"{result.model_class}: ") for message in result.failures.values())
    return "; ".join(dict.fromkeys(messages))


def pass_rate(rows: Sequence[Row]) -> float:
    """Share of the families that use the interface which pass every check on their default backend."""
    interface = [row.default for row in rows if row.default.interface == "yes"]
    return sum(result.passed for result in interface) / len(interface)


def render(rows: Sequence[Row]) -> str:
    """The page's text."""
    introduction = INTRODUCTION.format(
        version=transformers.__version__, summary=_summary(rows), error_factor=ERROR_FACTOR, gain=GAIN
    )
    lines = [introduction, "## Families that use the interface", ""]
    header = ["family", "model class", "backend", "layers", "identity", "Regroup", "HeadAffine", "generate", "unwrap"]
    lines += _table([*header, "on eager", "note"], [_cells(row) for row in rows if row.default.interface == "yes"])
    for interface, title in TITLES.items():
        cells = [
            [row.default.family, row.default.model_class, row.note]
            for row in rows
            if row.default.interface == interface
        ]
        if cells:
            lines += ["", f"## {title}", "", EXPLANATIONS[interface], ""]
            lines += _table(["family", "model class", "why"], cells)
    return "\n".join(lines) + "\n"


def write(rows: Sequence[Row], path: Path = TABLE_PATH) -> None:
    path.write_text(render(rows))


def _summary(rows: Sequence[Row]) -> str:
    def count(interface: Interface) -> int:
        return sum(row.default.interface == interface for row in rows)

    passed = sum(row.default.passed for row in rows)
    passed_on_both = sum(row.default.passed and row.eager.passed for row in rows)
    counts = [
        ["in the mapping", str(len(rows))],
        ["use transformers' AttentionInterface", str(count("yes"))],
        ["of these pass every check", f"{passed} ({pass_rate(rows):.1%})"],
        ["of these pass every check on eager, too", str(passed_on_both)],
        ["do not use the interface", str(count("no"))],
        ["have no softmax attention", str(count("no attention"))],
        ["cannot be built here", str(count("not built"))],
    ]
    return "\n".join(_table(["families", "number"], counts))


def _cells(row: Row) -> list[str]:
    result = row.default
    verdicts = ["fail" if name in result.failures else "pass" for name in CHECK_NAMES]
    on_eager = "pass" if row.eager.passed else "fail"
    return [
        result.family,
        result.model_class,
        result.backend,
        str(result.attention_layers),
        *verdicts,
        on_eager,
        row.note,
    ]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines]


if __name__ == "__main__":
    # Threads that wait for each other take minutes over models this small.
    torch.set_num_threads(1)
    write([measure(family) for family in causal_lm_families()])
