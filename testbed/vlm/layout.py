"""Which objects stand where: layouts drawn from strong co-occurrence, or with every companion missing."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from testbed.vlm.classes import CLASSES, COLOURS, GROUPS, INDEX, PERSON, UNITS
from testbed.vlm.draws import Draws, scene_keys

IMAGE_SIZE = 144
OBJECTS = 8
UNITS_A_SCENE = 4
PERSON_UNIT = UNITS_A_SCENE
COPIES = 3
SMALLEST, LARGEST, SIZES = 18, 64, 64
ANGLES, LARGEST_ANGLE = 64, 0.45
CELLS = 3


@dataclass(frozen=True)
class Difficulty:
    """What makes companions likely and pictures hard.

    Attributes:
        together: probability that a unit's companions are both there.
        foreign: probability that a unit comes from anywhere instead of the scene's group.
        faint: probability that an object is drawn nearly transparent, and the least and largest opacity then (of 256).
        noise: largest standard deviation of the pixel noise, of 255.
        blurred: probability of one, two and three passes of blur.
    """

    together: float = 0.9
    foreign: float = 0.12
    faint: float = 0.12
    faint_opacity: tuple[int, int] = (60, 150)
    noise: int = 46
    blurred: tuple[float, float, float] = (0.15, 0.15, 0.1)


@dataclass(frozen=True)
class Layout:
    """A batch of scenes. Objects are ``(batch, 8)`` int64 in drawing order; a class of -1 is an empty place.

    Attributes:
        keys: the scenes' keys, ``(batch,)`` int32.
        group: index into GROUPS, ``(batch,)``.
        classes: index into CLASSES.
        units: which unit of the scene the object belongs to, 0 to 4; a person who is just there is unit 4.
        x, y: the centre in half pixels.
        sizes: the larger side in pixels.
        angles: index of the angle.
        mirrored: whether it is drawn mirrored.
        paints: 0, or 1 + index into COLOURS.
        opacities: of 256.
        background: index into GROUPS of the background's colours, ``(batch,)``.
    """

    keys: Tensor
    group: Tensor
    classes: Tensor
    units: Tensor
    x: Tensor
    y: Tensor
    sizes: Tensor
    angles: Tensor
    mirrored: Tensor
    paints: Tensor
    opacities: Tensor
    background: Tensor

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, chosen: slice | Tensor) -> Layout:
        return Layout(**{field.name: getattr(self, field.name)[chosen] for field in fields(self)})

    def counts(self) -> Tensor:
        """How many objects of each class there are, ``(batch, classes)`` int64."""
        counts = torch.zeros(len(self), len(CLASSES) + 1, dtype=torch.int64, device=self.keys.device)
        counts.scatter_add_(1, self.classes + 1, torch.ones_like(self.classes))
        return counts[:, 1:]


@functools.cache
def _tables(device: torch.device) -> dict[str, Tensor]:
    most = max(len(group.units) for group in GROUPS)
    members, weights = [], []
    for group in GROUPS:
        numbers = [UNITS.index(unit) for unit in group.units]
        members.append(numbers + [0] * (most - len(numbers)))
        # Earlier units are drawn more often.
        weights.append([100 - 12 * place for place in range(len(numbers))] + [0] * (most - len(numbers)))
    tables = {
        "members": members,
        "weights": weights,
        "units": [[INDEX[unit[0]], INDEX[unit[1]] if len(unit) == 2 else -1] for unit in UNITS],
        "sizes": [round(SMALLEST * (LARGEST / SMALLEST) ** (step / (SIZES - 1))) for step in range(SIZES)],
        "painted": [entry.painted for entry in CLASSES],
    }
    return {name: torch.tensor(values, device=device) for name, values in tables.items()}


@functools.cache
def rotations(device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every angle index, times 4096."""
    angles = [LARGEST_ANGLE * (2 * step / (ANGLES - 1) - 1) for step in range(ANGLES)]
    cosines, sines = ([round(4096 * function(angle)) for angle in angles] for function in (math.cos, math.sin))
    return torch.tensor(cosines, device=device), torch.tensor(sines, device=device)


def draw_layouts(seed: int, indices: Tensor, *, broken: bool, difficulty: Difficulty) -> Layout:
    """The scenes with these numbers.

    Args:
        seed: of the split.
        indices: the scenes' numbers, ``(batch,)`` int32, on the device that shall draw.
        broken: every object's companion is missing.
        difficulty: see there.
    """
    keys = scene_keys(seed, indices)
    draws = Draws(keys)
    tables = _tables(keys.device)
    batch = len(keys)
    group = draws.weighted("group", tuple(float(entry.weight) for entry in GROUPS))

    # Units: the group's own, some replaced by one from anywhere, none twice.
    scores = draws.bits("unit order", tables["weights"].shape[1]) * tables["weights"][group]
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :UNITS_A_SCENE]
    unit = tables["members"][group].gather(1, order)
    wanted = 1 + draws.weighted("units", (0.0, 0.0, 0.5, 0.5) if broken else (0.2, 0.3, 0.3, 0.2))
    foreign = draws.chance("foreign", UNITS_A_SCENE, difficulty.foreign)
    exists = foreign | (tables["weights"][group].gather(1, order) > 0)
    unit = torch.where(foreign, draws.below("foreign unit", UNITS_A_SCENE, len(UNITS)).long(), unit)
    again = ((unit[:, :, None] == unit[:, None, :]).tril(-1) & exists[:, None, :]).any(2)
    place = torch.arange(UNITS_A_SCENE, device=keys.device)
    there = exists & ~again & (place < wanted[:, None])

    # Members: both companions, or one of them.
    pair = tables["units"][unit]
    both = draws.chance("together", UNITS_A_SCENE, difficulty.together) & (not broken)
    second_alone = draws.chance("which", UNITS_A_SCENE, 0.5) & (pair[..., 1] >= 0)
    has = torch.stack([both | ~second_alone, (both | second_alone) & (pair[..., 1] >= 0)], dim=2) & there[..., None]
    classes = torch.where(has, pair, -1).reshape(batch, 2 * UNITS_A_SCENE)
    units = place.repeat_interleave(2).expand(batch, -1)
    paints = torch.where(
        tables["painted"][classes.clamp(min=0)] & (classes >= 0),
        1 + draws.below("paint", classes.shape[1], len(COLOURS)).long(), 0,
    )  # fmt: skip

    # A person who is just there, and more of one object.
    person = draws.chance("person", 1, 0.25).long() * (PERSON + 1) - 1
    copied = draws.pick("copied", classes >= 0)[:, None]
    copies = draws.weighted("copies", (0.65, 0.15, 0.1, 0.1))[:, None]
    copy = (torch.arange(COPIES, device=keys.device) < copies).long() * (classes.gather(1, copied) + 1) - 1
    classes = torch.cat([classes, person, copy], dim=1)
    units = torch.cat([units, torch.full_like(person, PERSON_UNIT), units.gather(1, copied).expand(-1, COPIES)], dim=1)
    paints = torch.cat([paints, torch.zeros_like(person), paints.gather(1, copied).expand(-1, COPIES)], dim=1)

    # At most eight; then a random drawing order.
    kept = (classes < 0).long().argsort(dim=1, stable=True)[:, :OBJECTS]
    kept = kept.gather(1, draws.order("drawing order", OBJECTS))
    classes, units, paints = classes.gather(1, kept), units.gather(1, kept), paints.gather(1, kept)

    sizes = tables["sizes"][draws.below("size", OBJECTS, SIZES).long()]
    cell = draws.order("cell", CELLS * CELLS)[:, :OBJECTS]
    side = 2 * IMAGE_SIZE // CELLS
    jitter = side * 9 // 10
    x = (cell % CELLS) * side + side // 2 + draws.below("x", OBJECTS, jitter).long() - jitter // 2
    y = (cell // CELLS) * side + side // 2 + draws.below("y", OBJECTS, jitter).long() - jitter // 2
    margin = sizes * 3 // 4
    x, y = (torch.minimum(torch.maximum(value, margin), 2 * IMAGE_SIZE - margin) for value in (x, y))
    faint = draws.chance("faint", OBJECTS, difficulty.faint)
    low, high = difficulty.faint_opacity
    opacities = torch.where(faint, low + draws.below("opacity", OBJECTS, high - low).long(), 256)
    elsewhere = draws.chance("elsewhere", 1, 0.25)[:, 0]
    background = torch.where(elsewhere, draws.below("background", 1, len(GROUPS))[:, 0].long(), group)
    return Layout(
        keys, group, classes, units, x, y, sizes, draws.below("angle", OBJECTS, ANGLES).long(),
        draws.chance("mirrored", OBJECTS, 0.5), paints, opacities, background,
    )  # fmt: skip
