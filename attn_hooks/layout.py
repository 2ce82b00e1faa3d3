"""What each key position of a sequence holds: padding, BOS, text, an image; and how an image's patches lie."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from itertools import groupby, pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from attn_hooks.errors import error


class TokenKind(IntEnum):
    """One byte a key; image k and segment k are ``IMAGE + k``."""

    PADDING = 0
    BOS = 1
    TEXT = 2
    IMAGE = 16


class TokenSpan(NamedTuple):
    """Neighbouring keys of one kind, from ``start`` to before ``stop``; ``image`` is the number of the image they are of."""

    start: int
    stop: int
    kind: TokenKind
    image: int | None


MOST_IMAGES = 256 - TokenKind.IMAGE


@dataclass(frozen=True)
class PatchGrid:
    """A rectangle of patches among the tokens of one image, row by row.

    ``offset``: its first patch, counted in the image's own tokens. ``row_stride``: tokens from one row to the next, more than
    ``columns`` where something else ends a row. ``shows``: the whole image, a crop of it, or one frame of a video.
    ``place``: (row, column) of a crop among the crops, None where that is unknown.
    """

    offset: int
    rows: int
    columns: int
    row_stride: int
    shows: Literal["image", "crop", "frame"] = "image"
    place: tuple[int, int] | None = None


@dataclass(frozen=True)
class ImageSpan:
    """Where image (or video) number ``image`` of one sample lies, and how.

    ``runs``: its tokens as (start, stop) over the key positions of the row, padding counted; text may stand between them.
    ``grids``: its rectangles of patches in token order; None where they are unknown, and ``why_no_grid`` says why. Tokens in
    no grid are separators, such as the newlines of LLaVA-NeXT.
    """

    sample: int
    image: int
    runs: tuple[tuple[int, int], ...]
    grids: tuple[PatchGrid, ...] | None
    video: bool = False
    why_no_grid: str = ""

    @property
    def start(self) -> int:
        return self.runs[0][0]

    @property
    def stop(self) -> int:
        """One past the last token; the text after the image starts here."""
        return self.runs[-1][1]

    @property
    def tokens(self) -> int:
        return sum(stop - start for start, stop in self.runs)

    @property
    def positions(self) -> Tensor:
        """``(tokens,)`` long: the key positions of its tokens, in order."""
        return torch.cat([torch.arange(start, stop) for start, stop in self.runs])

    @property
    def frames(self) -> int | None:
        """Frames of a video as the tokens have them, 1 for an image; None without a grid."""
        return None if self.grids is None else max(1, self._showing("frame"))

    @property
    def crops(self) -> int | None:
        """Crops that stand beside or in place of the whole image; None without a grid."""
        return None if self.grids is None else self._showing("crop")

    def _showing(self, what: str) -> int:
        return sum(grid.shows == what for grid in self.grids or ())

    def patches(self, grid: PatchGrid) -> Tensor:
        """``(rows, columns)`` long: the key position of each patch of one of its grids."""
        rows, columns = torch.arange(grid.rows)[:, None], torch.arange(grid.columns)[None, :]
        return self.positions[grid.offset + rows * grid.row_stride + columns]

    def separators(self) -> Tensor:
        """Long: the key positions of its tokens that are no patches. Empty without a grid, where that is unknown."""
        positions = self.positions
        if self.grids is None:
            return positions[:0]
        patches = torch.cat([self.patches(grid).flatten() for grid in self.grids])
        return positions[~torch.isin(positions, patches)]

    def grid_text(self) -> str:
        """The grids in words, crops and frames that are alike counted, e.g. ``3 crops of 8 x 8 + 8 x 8``."""
        if self.grids is None:
            return f"unknown: {self.why_no_grid}"
        parts = []
        for (shows, rows, columns), alike in groupby(
            self.grids, key=lambda grid: (grid.shows, grid.rows, grid.columns)
        ):
            count = len(list(alike))
            shapes = [f"{rows} x {columns}"] * count
            parts += shapes if shows == "image" else [f"{count} {shows}{'s' if count > 1 else ''} of {shapes[0]}"]
        return " + ".join(parts)

    def cut(self, length: int) -> ImageSpan | None:
        """What is left of it in the first ``length`` positions; a part of an image has no grid."""
        if self.stop <= length:
            return self
        runs = tuple((start, min(stop, length)) for start, stop in self.runs if start < length)
        return replace(self, runs=runs, grids=None, why_no_grid="the cache was cropped inside it") if runs else None

    def moved(self, by: int, image: int) -> ImageSpan:
        """The same image ``by`` positions further on, with another number."""
        return replace(self, image=image, runs=tuple((start + by, stop + by) for start, stop in self.runs))


@dataclass(frozen=True)
class TokenLayout:
    """The kinds of all tokens seen so far, one row a sample: ``kinds`` is uint8 ``(B, M)``. ``images`` by sample, then number.

    Built on the prompt and extended by each later forward. A beam takes its prompt's row: beams of one sample share
    the prompt, and generated tokens are text, so reordering beams leaves the layout as it is. Images of a later forward
    (the next turn of a chat) are numbered on. ``held`` is ``kinds`` before the last mask, which a later one may lift.
    """

    kinds: Tensor
    images: tuple[ImageSpan, ...] = ()
    held: Tensor | None = None

    @property
    def valid(self) -> Tensor:
        """``(B, M)`` bool: real tokens."""
        return self.kinds != TokenKind.PADDING

    @property
    def is_image(self) -> Tensor:
        """``(B, M)`` bool: tokens of an image."""
        return self.kinds >= TokenKind.IMAGE

    @property
    def position(self) -> Tensor:
        """``(B, M)`` long: how many real tokens came before; -1 on left padding.

        Counted over real tokens, so that right padding between a prompt and what follows opens no gap.
        """
        return self.valid.long().cumsum(dim=1) - 1

    @property
    def length(self) -> int:
        return self.kinds.shape[1]

    def images_of(self, sample: int) -> tuple[ImageSpan, ...]:
        """The images of one row, image k at place k."""
        return tuple(span for span in self.images if span.sample == sample)

    def spans(self, sample: int) -> list[TokenSpan]:
        """One row from its first key to its last, by what they hold. Waits for the device."""
        held = self.kinds[sample].tolist()
        edges = [0, *(place + 1 for place, (left, right) in enumerate(pairwise(held)) if left != right), len(held)]
        spans = []
        for start, stop in pairwise(edges):
            image = held[start] - TokenKind.IMAGE if held[start] >= TokenKind.IMAGE else None
            kind = TokenKind(held[start]) if image is None else TokenKind.IMAGE
            spans.append(TokenSpan(start, stop, kind, image))
        return spans

    def extended(self, new: TokenLayout, past: int) -> TokenLayout:
        """This layout cut to its first ``past`` tokens (a cache may be cropped), then ``new``."""
        kept = [part for span in self.images if (part := span.cut(past)) is not None]
        before = Counter(span.sample for span in kept)
        came = [span.moved(past, before[span.sample] + span.image) for span in new.images]
        kinds = new.kinds
        if came and before:
            refuse_too_many_images(came)
            numbers = torch.tensor([before[sample] for sample in range(len(kinds))], device=kinds.device)
            kinds = torch.where(kinds >= TokenKind.IMAGE, kinds + numbers[:, None], kinds).to(torch.uint8)
        images = tuple(sorted([*kept, *came], key=lambda span: (span.sample, span.image)))

        def then_new(earlier: Tensor) -> Tensor:
            return torch.cat([earlier[:, :past].to(kinds.device), kinds], dim=1)

        return TokenLayout(then_new(self.kinds), images, None if self.held is None else then_new(self.held))

    def filled_to(self, length: int) -> TokenLayout:
        """This layout with text up to ``length`` tokens: those that came while other edits were in force."""
        missing = max(0, length - self.length)
        return replace(
            self,
            kinds=functional.pad(self.kinds, (0, missing), value=TokenKind.TEXT),
            held=None if self.held is None else functional.pad(self.held, (0, missing), value=TokenKind.TEXT),
        )

    def first_rows(self, rows: int) -> TokenLayout:
        """Of the first ``rows`` sequences alone."""
        return TokenLayout(
            self.kinds[:rows],
            tuple(image for image in self.images if image.sample < rows),
            None if self.held is None else self.held[:rows],
        )

    def padded_as(self, valid: Tensor) -> TokenLayout:
        """The same kinds under another 2-D attention mask."""
        held = self.kinds if self.held is None else self.held
        kinds = torch.where(held == TokenKind.PADDING, TokenKind.TEXT, held)
        return replace(self, kinds=torch.where(valid, kinds, TokenKind.PADDING).to(torch.uint8), held=held)

    @classmethod
    def of_tokens(
        cls, input_ids: Tensor | None, valid: Tensor, bos_token_id: int | None, images: Sequence[ImageSpan] = ()
    ) -> TokenLayout:
        """From token ids ``(B, N)`` where there are any, the 2-D mask ``valid``, and the images that were found in them."""
        kinds = torch.full_like(valid, TokenKind.TEXT, dtype=torch.uint8)
        if input_ids is not None and bos_token_id is not None:
            kinds[input_ids == bos_token_id] = TokenKind.BOS
        refuse_too_many_images(images)
        for span in images:
            for start, stop in span.runs:
                kinds[span.sample, start:stop] = TokenKind.IMAGE + span.image
        return cls(torch.where(valid, kinds, TokenKind.PADDING).to(torch.uint8), tuple(images))


def refuse_too_many_images(images: Sequence[ImageSpan]) -> None:
    """Raises where a row has more images than a byte a key can tell apart."""
    for span in images:
        if span.image >= MOST_IMAGES:
            raise error("too-many-images", row=span.sample, most=MOST_IMAGES)
