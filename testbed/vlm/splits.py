"""The held-out scenes and POPE's questions about them."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from testbed.vlm.classes import CLASSES
from testbed.vlm.draws import Draws
from testbed.vlm.layout import Difficulty, Layout, draw_layouts

TRAIN_SEED, STATISTICS_SEED = 1, 2
STATISTICS_SCENES = 20_000
POPE_SPLITS = ("random", "popular", "adversarial")
POSITIVES = 3
DIFFICULTY = Difficulty()


@dataclass(frozen=True)
class Split:
    """Held-out scenes: the first ``scenes`` of this seed that show at least three classes, as POPE's images do."""

    name: str
    seed: int
    broken: bool
    scenes: int = 500

    def layout(self, device: torch.device | str) -> Layout:
        indices = torch.arange(2 * self.scenes, dtype=torch.int32, device=device)
        layout = draw_layouts(self.seed, indices, broken=self.broken, difficulty=DIFFICULTY)
        enough = ((layout.counts() > 0).sum(1) >= POSITIVES).nonzero()[: self.scenes, 0]
        if len(enough) < self.scenes:
            raise ValueError(f"split {self.name}: {len(enough)} scenes with {POSITIVES} classes; raise the candidates")
        return layout[enough]


SPLITS = {
    "test": Split("test", seed=1001, broken=True),
    "val": Split("val", seed=1002, broken=False),
    # As test, for choosing hyperparameters.
    "tune": Split("tune", seed=1003, broken=True, scenes=250),
}
MEASURED = ("test", "val")


@functools.cache
def statistics() -> tuple[Tensor, Tensor]:
    """How often a class is in a training scene, ``(classes,)``, and two of them together, ``(classes, classes)``."""
    indices = torch.arange(STATISTICS_SCENES, dtype=torch.int32)
    layout = draw_layouts(STATISTICS_SEED, indices, broken=False, difficulty=DIFFICULTY)
    present = (layout.counts() > 0).double()
    together = present.T @ present
    frequency = together.diagonal().clone()
    together.fill_diagonal_(0)
    return frequency.long(), together.long()


def pope_classes(layout: Layout, split: str) -> Tensor:
    """The classes asked about, ``(scenes, 6)`` int64: one that is there, one that is not, three times.

    As POPE draws them: the absent one is any (random), the most frequent one (popular), or the one that most often
    stands together with the class asked before it (adversarial), none twice for an image.
    """
    draws = Draws(layout.keys.cpu())
    present = layout.counts().cpu() > 0
    scores = torch.where(present, draws.bits("pope positives", len(CLASSES)) + 1, 0)
    positives = scores.argsort(dim=1, descending=True, stable=True)[:, :POSITIVES]
    frequency, together = statistics()
    free = ~present
    columns = []
    rows = torch.arange(len(layout))
    for place in range(POSITIVES):
        chances = draws.bits(f"pope random {place}", len(CLASSES)).long()
        preferred = {
            "random": chances,
            "popular": frequency.expand_as(chances),
            # Where nothing free stands together with it, any.
            "adversarial": together[positives[:, place]] * 2**17 + chances,
        }[split]
        negative = torch.where(free, preferred, -1).argmax(1)
        free[rows, negative] = False
        columns += [positives[:, place], negative]
    return torch.stack(columns, dim=1)
