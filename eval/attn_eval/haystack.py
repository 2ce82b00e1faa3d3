"""The text that needles are hidden in. Always local: a file of the user's, the shipped excerpts, or Python's sources.

Scores on different haystacks can't be compared (RULER's own is Paul Graham's essays, which we may not ship), so
every result records the haystack's name and sha256.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from attn_eval.errors import EvaluationError

HELD_OUT = "held_out"
PYTHON_SOURCES = "python_sources"
HELD_OUT_FOLDER = Path(__file__).parent / "data" / "held_out"
PYTHON_SOURCES_BYTES = 4_000_000

# A sentence ends at . ! or ?, closing quotes and brackets included, where white space follows.
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)\]]*\s+")
_WHITE_SPACE = re.compile(r"\s+")


@dataclass(frozen=True)
class Haystack:
    """A text with its name and the sha256 of its UTF-8 bytes."""

    name: str
    text: str
    sha256: str

    @functools.cached_property
    def sentences(self) -> tuple[str, ...]:
        """The sentences in order, white space collapsed to single spaces, as RULER prepares its essays."""
        sentences = []
        start = 0
        for end in _SENTENCE_END.finditer(self.text):
            sentences.append(self.text[start : end.end()])
            start = end.end()
        sentences.append(self.text[start:])
        collapsed = (_WHITE_SPACE.sub(" ", sentence).strip() for sentence in sentences)
        return tuple(sentence for sentence in collapsed if sentence)

    def sentences_from(self, rng: random.Random | None, count: int) -> list[str]:
        """``count`` sentences, from the first one or, with a generator, from one it draws; the text is repeated
        where it ends."""
        sentences = self.sentences
        first = 0 if rng is None else rng.randrange(len(sentences))
        return [sentences[(first + step) % len(sentences)] for step in range(count)]

    def words_from(self, rng: random.Random | None, count: int) -> str:
        """``count`` words joined by single spaces, beginning with a sentence as `sentences_from` does."""
        first = 0 if rng is None else self._sentence_starts[rng.randrange(len(self.sentences))]
        words = self._words
        return " ".join(words[(first + step) % len(words)] for step in range(count))

    @functools.cached_property
    def _words(self) -> tuple[str, ...]:
        return tuple(word for sentence in self.sentences for word in sentence.split(" "))

    @functools.cached_property
    def _sentence_starts(self) -> tuple[int, ...]:
        lengths = (len(sentence.split(" ")) for sentence in self.sentences)
        return (0, *itertools.accumulate(lengths))[:-1]


@functools.lru_cache(maxsize=8)
def get_haystack(name: str) -> Haystack:
    """The haystack of that name.

    Args:
        name: ``held_out`` (text shipped with the package, which the testbed model never saw), ``python_sources``
            (the standard library of the running interpreter, so its hash changes with the Python version), or the
            path of a UTF-8 text file, or of a folder whose ``*.txt`` files are read in the order of their names.

    Raises:
        EvaluationError: there is no such file, or it holds no text.
    """
    if name == HELD_OUT:
        text = _read_folder(HELD_OUT_FOLDER, "*.txt")
    elif name == PYTHON_SOURCES:
        text = _read_folder(Path(sysconfig.get_path("stdlib")), "*.py")[:PYTHON_SOURCES_BYTES]
    else:
        path = Path(name).expanduser()
        if path.is_dir():
            text = _read_folder(path, "*.txt")
        elif path.is_file():
            text = _read(path)
        else:
            raise EvaluationError(
                f"no haystack {name!r}: give {HELD_OUT!r}, {PYTHON_SOURCES!r}, or the path of a text file or folder"
            )
    if not text.strip():
        raise EvaluationError(f"the haystack {name!r} holds no text")
    return Haystack(name=name, text=text, sha256=hashlib.sha256(text.encode("utf-8")).hexdigest())


def _read_folder(folder: Path, pattern: str) -> str:
    return "\n\n".join(_read(path) for path in sorted(folder.glob(pattern)))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"the haystack file {path} can't be read as UTF-8 text: {error}") from error
