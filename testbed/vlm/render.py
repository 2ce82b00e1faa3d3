"""Layouts as pictures, in integer arithmetic: the same bits on a CPU and on a GPU, compiled or not."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from testbed.vlm.classes import COLOURS, GROUPS
from testbed.vlm.draws import GOLDEN, Draws, mixed
from testbed.vlm.glyphs import BORDER_BEFORE, LEVEL_OFFSETS, LEVELS, atlas, level_stride
from testbed.vlm.layout import IMAGE_SIZE, Difficulty, Layout, rotations

CLOUD_CELL = 32
CLOUD_SIDE = IMAGE_SIZE // CLOUD_CELL + 2
BLUR_PASSES = 3
# The sum of a hash's four bytes has this mean and standard deviation.
BYTES_MEAN, BYTES_DEVIATION = 510, 147.8


@functools.cache
def _tables(device: torch.device) -> dict[str, Tensor]:
    tables = {
        "stride": [level_stride(level) for level in LEVELS],
        "offset": LEVEL_OFFSETS,
        "level": LEVELS,
        # Painting multiplies a glyph's brightness: twice the colour, since glyphs are of middle brightness.
        "colours": [(0, 0, 0), *COLOURS.values()],
        "background": [group.colours for group in GROUPS],
    }
    return {name: torch.tensor(values, device=device, dtype=torch.int32) for name, values in tables.items()}


class Placement:
    """What sampling needs of every object, ``(batch, 8)`` int32 each."""

    def __init__(self, layout: Layout) -> None:
        tables = _tables(layout.keys.device)
        sizes = layout.sizes
        # The smallest level that still has a texel a pixel.
        level = (sizes <= LEVELS[1]).long() + (sizes <= LEVELS[2]).long()
        side = tables["level"][level].long()
        cosines, sines = (table[layout.angles] for table in rotations(layout.keys.device))
        mirror = torch.where(layout.mirrored, -1, 1)
        # Texels (times 2 ** 18) for each half pixel.
        along = cosines * side * 32 // sizes
        across = sines * side * 32 // sizes
        self.xx, self.xy = (along * mirror).int(), (across * mirror).int()
        self.yx, self.yy = (-across).int(), along.int()
        self.x, self.y = layout.x.int(), layout.y.int()
        self.centre = ((side // 2 + BORDER_BEFORE) * 256 - 128).int()
        self.last = ((side + BORDER_BEFORE) * 256).int()
        self.stride = tables["stride"][level]
        cell = layout.classes.clamp(min=0).int() * self.stride * self.stride
        self.start = tables["offset"][level] + cell
        self.opacity = torch.where(layout.classes >= 0, layout.opacities, 0).int()
        self.painted = layout.paints > 0
        self.colour = tables["colours"][layout.paints]

    def objects(self) -> list[tuple[Tensor, ...]]:
        """One object a scene after another, in drawing order: its values ``(batch,)``, its colour ``(batch, 1, 3)``."""
        values = (self.xx, self.xy, self.yx, self.yy, self.x, self.y, self.centre, self.last, self.stride, self.start,
                  self.opacity, self.painted, self.colour[:, :, None])  # fmt: skip
        # Contiguous, so that a compiled function meets the same layout eight times.
        return list(zip(*(value.transpose(0, 1).contiguous().unbind(0) for value in values), strict=True))


def _sample(texels: Tensor, placed: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One object a scene on the whole canvas: red, green, blue (multiplied by alpha) and alpha, ``(batch, H, W)``."""
    xx, xy, yx, yy, x, y, centre, last, stride, start, opacity, painted, colour = (
        value[:, None, None] if value.ndim == 1 else value for value in placed
    )
    half = 2 * torch.arange(IMAGE_SIZE, device=texels.device, dtype=torch.int32) + 1
    dx, dy = half[None, None, :] - x, half[None, :, None] - y
    u = (((dx * xx + dy * xy) >> 10) + centre).clamp(min=0)
    v = (((dx * yx + dy * yy) >> 10) + centre).clamp(min=0)
    u, v = torch.minimum(u, last), torch.minimum(v, last)
    column, row, right, low = u >> 8, v >> 8, u & 255, v & 255
    at = start + row * stride + column
    corners = [texels[at], texels[at + 1], texels[at + stride], texels[at + stride + 1]]
    weights = [(256 - right) * (256 - low), right * (256 - low), (256 - right) * low, right * low]

    def channel(shift: int) -> Tensor:
        return (
            sum((((c >> shift) & 255) * w for c, w in zip(corners, weights, strict=True)), torch.zeros_like(at)) >> 16
        )

    red, green, blue, alpha = (channel(shift) for shift in (0, 8, 16, 24))
    brightness = (77 * red + 150 * green + 29 * blue) >> 8
    shades = []
    for place, value in enumerate((red, green, blue)):
        paint = torch.minimum((brightness * colour[:, :, place, None]) >> 7, alpha)
        shades.append((torch.where(painted, paint, value) * opacity) >> 8)
    return shades[0], shades[1], shades[2], (alpha * opacity) >> 8


def _background(upper: Tensor, lower: Tensor, cloud: Tensor) -> Tensor:
    """The empty canvas, ``(3, batch, H, W)`` int32, 0 to 255."""
    batch = len(upper)
    line = torch.arange(IMAGE_SIZE, device=upper.device, dtype=torch.int32)
    cell, part = line // CLOUD_CELL, line % CLOUD_CELL
    first = torch.arange(batch, device=upper.device)[:, None, None]
    rows, columns, down, along = cell[None, :, None], cell[None, None, :], part[None, :, None], part[None, None, :]
    side = CLOUD_CELL
    haze = (
        (cloud[first, rows, columns] * (side - along) + cloud[first, rows, columns + 1] * along) * (side - down)
        + (cloud[first, rows + 1, columns] * (side - along) + cloud[first, rows + 1, columns + 1] * along) * down
    ) >> 10
    height = (line * 256 // IMAGE_SIZE)[None, :, None]
    channels = []
    for place in range(3):
        high, low = upper[:, place, None, None], lower[:, place, None, None]
        channels.append((high + (((low - high) * height) >> 8) + haze).clamp(0, 255))
    return torch.stack(channels)


def _draw(canvas: Tensor, texels: Tensor, *placed: Tensor) -> Tensor:
    """The canvas with one object more."""
    *shades, alpha = _sample(texels, placed)
    rest = 256 - (alpha + (alpha >> 7))
    return torch.stack([((channel * rest) >> 8) + shade for channel, shade in zip(canvas, shades, strict=True)])


def _finish(canvas: Tensor, keys: Tensor, gain: Tensor, shift: Tensor, blur: Tensor, noise: Tensor) -> Tensor:
    """Contrast and brightness, blur, then noise; ``(batch, 3, H, W)`` uint8."""
    picture = canvas.transpose(0, 1)
    picture = ((((picture - 128) * gain[:, None, None, None]) >> 8) + 128 + shift[:, None, None, None]).clamp(0, 255)
    for step in range(BLUR_PASSES):
        wide = torch.cat([picture[..., :1], picture, picture[..., -1:]], dim=-1)
        wide = (wide[..., :-2] + 2 * wide[..., 1:-1] + wide[..., 2:] + 2) >> 2
        tall = torch.cat([wide[..., :1, :], wide, wide[..., -1:, :]], dim=-2)
        tall = (tall[..., :-2, :] + 2 * tall[..., 1:-1, :] + tall[..., 2:, :] + 2) >> 2
        picture = torch.where((blur > step)[:, None, None, None], tall, picture)
    number = torch.arange(3 * IMAGE_SIZE * IMAGE_SIZE, device=keys.device, dtype=torch.int32) * GOLDEN
    hashed = mixed(mixed(keys ^ 0x5EED)[:, None] + number).view_as(picture)
    total = (hashed & 255) + ((hashed >> 8) & 255) + ((hashed >> 16) & 255) + ((hashed >> 24) & 255) - BYTES_MEAN
    return (picture + ((total * noise[:, None, None, None]) >> 16)).clamp(0, 255).to(torch.uint8)


class Renderer:
    """Draws layouts on one device.

    Args:
        device: where.
        difficulty: noise and blur.
        compiled: whether ``torch.compile`` fuses the drawing, which pays for training only.
    """

    def __init__(self, device: torch.device | str, difficulty: Difficulty, *, compiled: bool = False) -> None:
        self.texels = atlas(device)
        self.difficulty = difficulty
        # One object at a time: a graph of all eight takes half a minute to compile and is hardly faster.
        parts: list[Callable[..., Tensor]] = [_background, _draw, _finish]
        self.background, self.draw, self.finish = (
            [torch.compile(part, dynamic=False) for part in parts] if compiled else parts
        )

    def __call__(self, layout: Layout) -> Tensor:
        """The pictures, ``(batch, 3, 144, 144)`` uint8."""
        draws = Draws(layout.keys)
        base = _tables(layout.keys.device)["background"][layout.background]
        jitter = draws.below("background jitter", 6, 61).view(-1, 2, 3) - 30
        upper, lower = (base + jitter).clamp(0, 255).unbind(1)
        strength = draws.below("cloud strength", 1, 50)
        cloud = ((draws.below("cloud", CLOUD_SIDE * CLOUD_SIDE, 513) - 256) * strength >> 8).view(
            -1, CLOUD_SIDE, CLOUD_SIDE
        )
        gain = 150 + draws.below("gain", 1, 140)[:, 0]
        shift = draws.below("shift", 1, 51)[:, 0] - 25
        once, twice, thrice = self.difficulty.blurred
        blur = draws.weighted("blur", (1 - once - twice - thrice, once, twice, thrice)).int()
        deviation = draws.below("noise", 1, self.difficulty.noise + 1)[:, 0]
        noise = (deviation.long() * round(65536 * 16 / BYTES_DEVIATION) // 16).int()
        canvas = self.background(upper, lower, cloud)
        for placed in Placement(layout).objects():
            canvas = self.draw(canvas, self.texels, *placed)
        return self.finish(canvas, layout.keys, gain, shift, blur, noise)

    def visible(self, layout: Layout) -> tuple[Tensor, Tensor]:
        """Where each object is seen.

        Returns:
            The mask of the pixels that the object covers, not behind another one, ``(batch, 8, H, W)`` bool, and how
            many pixels it would cover alone, ``(batch, 8)`` int64. A faint object counts as a full one.
        """
        whole = Placement(layout)
        whole.opacity = torch.where(layout.classes >= 0, 256, 0).int()
        covered = torch.stack([_sample(self.texels, placed)[3] >= 128 for placed in whole.objects()], dim=1)
        behind = covered.flip(1).int().cumsum(1).flip(1) - covered.int()
        return covered & (behind == 0), covered.flatten(2).sum(2)


def pixel_values(pictures: Tensor) -> Tensor:
    """Pictures as the model's image processor gives them: -1 to 1, float32."""
    return (pictures.float() / 255 - 0.5) / 0.5
