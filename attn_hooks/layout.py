"""What each key position of a sequence holds: padding, BOS, text, an image."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor
from torch.nn import functional


class TokenKind(IntEnum):
    """One byte a key; image k and segment k are ``IMAGE + k``."""

    PADDING = 0
    BOS = 1
    TEXT = 2
    IMAGE = 16


@dataclass(frozen=True)
class TokenLayout:
    """The kinds of all tokens seen so far, one row a sample: ``kinds`` is uint8 ``(B, M)``.

    Built on the prompt and extended by each later forward. A beam takes its prompt's row: beams of one sample share
    the prompt, and generated tokens are text, so reordering beams leaves the layout as it is.
    """

    kinds: Tensor

    @property
    def valid(self) -> Tensor:
        """``(B, M)`` bool: real tokens."""
        return self.kinds != TokenKind.PADDING

    @property
    def position(self) -> Tensor:
        """``(B, M)`` long: how many real tokens came before; -1 on left padding.

        Counted over real tokens, so that right padding between a prompt and what follows opens no gap.
        """
        return self.valid.long().cumsum(dim=1) - 1

    @property
    def length(self) -> int:
        return self.kinds.shape[1]

    def extended(self, new: TokenLayout, past: int) -> TokenLayout:
        """This layout cut to its first ``past`` tokens (a cache may be cropped), then ``new``."""
        return TokenLayout(torch.cat([self.kinds[:, :past].to(new.kinds.device), new.kinds], dim=1))

    def filled_to(self, length: int) -> TokenLayout:
        """This layout with text up to ``length`` tokens: those that came while other edits were in force."""
        missing = max(0, length - self.length)
        return TokenLayout(functional.pad(self.kinds, (0, missing), value=TokenKind.TEXT))

    def padded_as(self, valid: Tensor) -> TokenLayout:
        """The same kinds under another 2-D attention mask."""
        kinds = torch.where(self.kinds == TokenKind.PADDING, TokenKind.TEXT, self.kinds)
        return TokenLayout(torch.where(valid, kinds, TokenKind.PADDING).to(torch.uint8))

    @classmethod
    def of_tokens(
        cls, input_ids: Tensor | None, valid: Tensor, bos_token_id: int | None, image_token_id: int | None
    ) -> TokenLayout:
        """From token ids ``(B, N)`` where there are any, and the 2-D mask ``valid``."""
        kinds = torch.full_like(valid, TokenKind.TEXT, dtype=torch.uint8)
        if input_ids is not None:
            if bos_token_id is not None:
                kinds[input_ids == bos_token_id] = TokenKind.BOS
            if image_token_id is not None:
                kinds[input_ids == image_token_id] = TokenKind.IMAGE
        return cls(torch.where(valid, kinds, TokenKind.PADDING).to(torch.uint8))
