"""What each edit did while it was in force."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attn_hooks.call import Phase


@dataclass
class EditRecord:
    """Counts of one edit. Sums stay on their device until somebody asks, so that recording never waits for a GPU."""

    calls: Counter[Phase] = field(default_factory=Counter)
    layers: set[int] = field(default_factory=set)
    heads: set[tuple[int, int]] = field(default_factory=set)
    rows: dict[torch.device, Tensor] = field(default_factory=dict)
    rows_without_padding: int = 0
    moved: dict[torch.device, Tensor] = field(default_factory=dict)
    measured: int = 0
    # Of a second stream: forwards that could have asked for it, and those that were certain without.
    steps: int = 0
    skipped: int = 0

    def rows_edited(self) -> int:
        """Real query rows, summed over calls; padding left out."""
        return self.rows_without_padding + sum(int(rows) for rows in self.rows.values())

    def mass_moved(self) -> float | None:
        """Mean over calls of the share of a row's weight that went elsewhere; None if the edit moves no weight."""
        return sum(float(moved) for moved in self.moved.values()) / self.measured if self.measured else None


logger = logging.getLogger("attn_hooks")


def _add(sums: dict[torch.device, Tensor], value: Tensor) -> None:
    sums[value.device] = sums[value.device] + value if value.device in sums else value


@dataclass
class Recorder:
    """One record for each edit, by its place in the list, and the paths that computed the calls.

    ``ran_without_host``: decode steps were compiled in one graph or captured, and nobody counts how often they run.
    """

    records: dict[int, EditRecord]
    paths: dict[tuple[Phase, str, str], set[int]] = field(default_factory=dict)
    ran_without_host: bool = False

    def record_path(self, phase: Phase, layer: int, path: str, why: str) -> None:
        """Notes, and logs once for each phase, which path computed a layer and why."""
        place = (phase, path, why)
        if place not in self.paths:
            self.paths[place] = set()
            logger.info("%s: %s (%s), first in layer %d", phase, path, why, layer)
        self.paths[place].add(layer)

    def record(
        self,
        position: int,
        phase: Phase,
        layer: int,
        heads: Callable[[], Iterable[int]],
        rows: Tensor | int,
    ) -> None:
        """Adds one call; ``rows`` is the number of its real queries, still on the device if padded."""
        record = self.records[position]
        if layer not in record.layers:
            record.layers.add(layer)
            record.heads.update((layer, head) for head in heads())
        self.count(position, phase, rows)

    def count(self, position: int, phase: Phase, rows: Tensor | int) -> None:
        """Adds one call in a layer, and under edits of heads, that are known from an earlier one."""
        record = self.records[position]
        record.calls[phase] += 1
        if isinstance(rows, int):
            record.rows_without_padding += rows
        else:
            _add(record.rows, rows)

    def record_moved(self, position: int, masses: Sequence[Tensor]) -> None:
        """Adds what the primitives of one call moved, if they move weight."""
        if masses:
            record = self.records[position]
            _add(record.moved, torch.stack([mass.detach() for mass in masses]).sum())
            record.measured += 1
