"""From text to the token positions that methods such as PASTA highlight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attn_hooks.errors import error


def find_spans(tokenizer: Any, prompt: str, substrings: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Token positions (start, stop) of each first occurrence of ``substrings`` in ``prompt``.

    Positions count from the prompt's first token as ``tokenizer(prompt)`` makes it (BOS included), padding left out: what
    ``PASTA(spans=(find_spans(...),))`` takes. A token that overlaps a substring belongs to it.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise error("slow-tokenizer", tokenizer=type(tokenizer).__name__)
    offsets = tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
    spans = []
    for substring in substrings:
        begin = prompt.find(substring)
        if begin < 0 or not substring:
            raise error("span-not-found", substring=substring)
        end = begin + len(substring)
        inside = [index for index, (start, stop) in enumerate(offsets) if start < end and stop > begin]
        spans.append((inside[0], inside[-1] + 1))
    return tuple(spans)
