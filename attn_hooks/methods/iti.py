"""ITI, inference-time intervention: shift the heads whose outputs tell true answers from false ones.

Source: Li et al., "Inference-Time Intervention: Eliciting Truthful Answers from a Language Model", NeurIPS 2023, arXiv
2306.03341, equation 2. For the K heads whose linear probes are the most accurate (``attn_hooks.probes``):

    z[l, h] <- z[l, h] + alpha * sigma[l, h] * theta[l, h]        on the prompt's last row and on every generated one

before o_proj, with theta the normalised difference of the class means ("mass mean shift") and sigma the standard deviation of
z along theta. Published for LLaMA-7B: K 48, alpha 15. The identity is alpha 0.

That the answer begins with the prompt's last row, which makes its first token, follows the released generation; the released
scoring of given answers starts some tokens later.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from attn_hooks.call import AttentionCall
from attn_hooks.edit import Edit, Heads, Positive, Reads, Scope, TensorField, Writes
from attn_hooks.errors import error
from attn_hooks.head_vectors import check_head_vectors, offset_of_call
from attn_hooks.model_info import ModelInfo
from attn_hooks.prompt import answering_rows
from attn_kernels import HeadAffine, Primitive


class ITI(Edit):
    """``direction`` ``(heads, head_dim of the value)`` and ``sigma`` ``(heads,)``: one for each pair of ``heads``, in their order.

    ``prompt_length``: where an answer comes with its prompt in one forward, as in scoring; prompts end in the same column.
    """

    method: ClassVar[str] = "iti"
    source: ClassVar[str] = "ITI, arXiv 2306.03341, eq. 2"
    reads: ClassVar[frozenset[Reads]] = frozenset({"output", "tokens"})
    writes: ClassVar[Writes] = "output"
    scope: ClassVar[Scope] = "per-row"
    head_indexed: ClassVar[bool] = True
    # Of the prompt, where it ends.
    keeps_state: ClassVar[bool] = True
    fixed_in_decode: ClassVar[bool] = True

    heads: Heads = Field(description="query heads: pairs (layer, head) or {layer: [heads]}")
    direction: TensorField = Field(description="(heads, head_dim), unit vectors, one row for each pair of `heads`")
    sigma: TensorField = Field(description="(heads,), standard deviation along `direction`")
    alpha: float = Field(default=15.0, description="strength in standard deviations; 0: identity")
    rows: Literal["answer", "all"] = Field(
        default="answer", description="'answer': from the prompt's last row on; 'all': as a bias of o_proj would"
    )
    prompt_length: Positive | None = Field(
        default=None,
        description="padded length of the prompt, needed if more than it comes in the first forward, or less",
    )

    @model_validator(mode="after")
    def _one_row_for_each_head(self) -> ITI:
        if len(set(self.heads)) < len(self.heads):
            raise ValueError("heads: a head is listed twice")
        if self.direction.ndim != 2 or len(self.direction) != len(self.heads):
            raise ValueError(f"direction: {len(self.heads)} heads need as many rows, got {tuple(self.direction.shape)}")
        if tuple(self.sigma.shape) != (len(self.heads),):
            raise ValueError(f"sigma: {len(self.heads)} heads need as many values, got {tuple(self.sigma.shape)}")
        return self

    @classmethod
    def from_saved(cls, path: str) -> ITI:
        """The one ITI among the edits that ``save_edits`` wrote into the folder ``path``. Raises ``EditError`` if there is none."""
        from attn_hooks.storage import load_edits

        found = [edit for edit in load_edits(Path(path)) if isinstance(edit, cls)]
        if len(found) != 1:
            raise error("bad-saved-edits", path=path, detail=f"it holds {len(found)} edits of {cls.method}, not one")
        return found[0]

    def check(self, model: ModelInfo) -> None:
        super().check(model)
        check_head_vectors(self, "direction", self.direction, self.heads, model)

    def is_settled(self, call: AttentionCall) -> bool:
        # The prompt may come one token at a time.
        return self.prompt_length is None or call.layout.length >= self.prompt_length

    def primitives(self, call: AttentionCall) -> list[Primitive]:
        shift = self.alpha * self.sigma[:, None] * self.direction
        offset, heads = offset_of_call(self.heads, shift, call)
        rows = None if self.rows == "all" else answering_rows(self, call, self.prompt_length)
        return [HeadAffine(offset=offset, rows=rows, heads=heads)]
