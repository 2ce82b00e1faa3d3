"""What the commands share: where tables go, and which progress bars are shown."""

from __future__ import annotations

import sys

from rich.console import Console

PIPED_WIDTH = 160


def silence_loading_bars() -> None:
    """One progress bar is enough: ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def out() -> Console:
    """The standard output, for tables."""
    # Piped into a file, a table must not be folded at the 80 columns that rich assumes there.
    return Console(width=None if sys.stdout.isatty() else PIPED_WIDTH)
