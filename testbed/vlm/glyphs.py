"""The pictures of the objects as one flat tensor of texels, in three sizes."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from testbed.vlm import MODEL
from testbed.vlm.classes import CLASSES

SHEET = MODEL / "scenes" / "glyphs.png"
SHEET_COLUMNS = 13
GLYPH = 64
LEVELS = (64, 32, 16)
# Texels around a glyph that stay transparent: sampling clamps to them.
BORDER_BEFORE, BORDER_AFTER = 1, 2


def level_stride(level: int) -> int:
    """The side of one glyph's cell at this size, borders included."""
    return level + BORDER_BEFORE + BORDER_AFTER


LEVEL_OFFSETS = tuple(
    sum(len(CLASSES) * level_stride(before) ** 2 for before in LEVELS[:index]) for index in range(len(LEVELS))
)


@functools.cache
def glyph_pixels() -> np.ndarray:
    """The sheet's glyphs, ``(classes, 64, 64, 4)`` int64, colours multiplied by alpha."""
    from PIL import Image

    with Image.open(SHEET) as image:
        sheet = np.asarray(image.convert("RGBA")).astype(np.int64)
    rows = sheet.shape[0] // GLYPH
    cells = sheet.reshape(rows, GLYPH, SHEET_COLUMNS, GLYPH, 4).transpose(0, 2, 1, 3, 4).reshape(-1, GLYPH, GLYPH, 4)
    cells = cells[: len(CLASSES)]
    alpha = cells[..., 3:]
    return np.concatenate([(cells[..., :3] * alpha + 127) // 255, alpha], axis=-1)


def atlas(device: torch.device | str) -> Tensor:
    """All glyphs at all levels, one int32 a texel (red, green, blue, alpha from the low byte on)."""
    parts = []
    for level in LEVELS:
        factor = GLYPH // level
        cells = glyph_pixels().reshape(len(CLASSES), level, factor, level, factor, 4).sum(axis=(2, 4))
        cells = (cells + factor**2 // 2) // factor**2
        border = (BORDER_BEFORE, BORDER_AFTER)
        cells = np.pad(cells, ((0, 0), border, border, (0, 0)))
        packed = cells[..., 0] | cells[..., 1] << 8 | cells[..., 2] << 16 | cells[..., 3] << 24
        parts.append(packed.reshape(-1))
    return torch.from_numpy(np.concatenate(parts).astype(np.uint32).view(np.int32)).to(device)
