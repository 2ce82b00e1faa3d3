"""Training rows: real text, and retrieval tasks hidden in text, in the evaluations' exact words.

A row is assembled from pieces that were tokenised one by one. Every piece begins where the tokenizer starts a new
pre-token (a space, a line end, a digit), so the pieces' tokens are the tokens of the assembled text; the tests hold
that down. What the rows vary, the evaluations fix: numbers of needles, of questions, kinds of haystack, places.
"""

from __future__ import annotations

import functools
import itertools
import random
import re
import string
import sys
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "eval"))

from attn_eval import templates  # noqa: E402

PAD, BOS, EOS = 0, 1, 2
SPECIAL_TOKENS = 3

# What a row's loss counts: nothing, a token of an answer, a token of running text.
IGNORED, ANSWER, TEXT = 0, 1, 2

Tokens = list[int]


@dataclass(frozen=True)
class Corpus:
    """The tokens of one part, training or held out.

    Attributes:
        text: all documents, end to end.
        document_starts: where each document begins in ``text``, and the end.
        document_sources: the source of each document, an index into ``source_names``.
        document_bytes: UTF-8 bytes of each document, for bits a byte.
        source_names: names of the sources.
        sentences: all sentences, white space collapsed, each with a space before it, end to end.
        sentence_starts: where each sentence begins in ``sentences``, and the end.
    """

    text: np.ndarray
    document_starts: np.ndarray
    document_sources: np.ndarray
    document_bytes: np.ndarray
    source_names: tuple[str, ...]
    sentences: np.ndarray
    sentence_starts: np.ndarray

    @classmethod
    def load(cls, path: Path, part: str) -> Corpus:
        """Read ``part`` (``train`` or ``held_out``) of what ``prepare.py`` wrote."""
        with np.load(path) as arrays:
            return cls(
                text=arrays[f"{part}_text"],
                document_starts=_starts(arrays[f"{part}_text_lengths"]),
                document_sources=arrays[f"{part}_text_sources"],
                document_bytes=arrays[f"{part}_text_bytes"],
                source_names=tuple(str(name) for name in arrays["sources"]),
                sentences=arrays[f"{part}_sentences"],
                sentence_starts=_starts(arrays[f"{part}_sentence_lengths"]),
            )


def _starts(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


class Words:
    """The words of wonderwords, and their tokens with and without a space before them."""

    def __init__(self, encode: Callable[[str], Tokens]) -> None:
        from attn_eval.words import all_words, words_of_kind

        self.adjectives, self.nouns, self.all = words_of_kind("adjective"), words_of_kind("noun"), all_words()
        self.spaced = {word: encode(" " + word) for word in {*self.all}}
        self.bare = {word: encode(word) for word in self.adjectives}
        self.behind_hyphen = {noun: encode("-" + noun) for noun in self.nouns}


@dataclass
class Row:
    """A sequence under construction: its tokens, and what each of them counts as in the loss."""

    tokens: Tokens = field(default_factory=lambda: [BOS])
    kinds: list[int] = field(default_factory=lambda: [IGNORED])

    def add(self, tokens: Sequence[int], kind: int = IGNORED) -> None:
        """Append tokens of one kind."""
        self.tokens.extend(tokens)
        self.kinds.extend([kind] * len(tokens))

    def padded(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Exactly ``length`` tokens and kinds."""
        tokens = np.full(length, PAD, dtype=np.int32)
        kinds = np.zeros(length, dtype=np.uint8)
        count = min(length, len(self.tokens))
        tokens[:count] = self.tokens[:count]
        kinds[:count] = self.kinds[:count]
        return tokens, kinds


@dataclass(frozen=True)
class Question:
    """A question, the words its answer begins with, and the answer."""

    question: str
    prefix: str
    answer: str


class RowMaker:
    """Draws rows. One instance belongs to one process and one seed."""

    def __init__(self, corpus: Corpus, tokenizer_file: Path, seed: int, *, augment: bool = True) -> None:
        """
        Args:
            corpus: the text to read and to hide needles in.
            tokenizer_file: the model's ``tokenizer.json``.
            seed: of every draw.
            augment: hide needles also in text whose words were exchanged, so that the text is not learned by heart
                in place of looking needles up.
        """
        self.corpus = corpus
        self.tokenizer = Tokenizer.from_file(str(tokenizer_file))
        self.rng = random.Random(seed)
        self.numpy_rng = np.random.default_rng(seed)
        self.augment = augment
        self.words = Words(self.encode)
        self.digits = {digit: self.encode(digit)[0] for digit in string.digits}
        self.space = self.encode(" 1")[0]
        self.line_end = self.encode("\n")
        self.noise_line = self.encode("\n" + templates.PASSKEY_NOISE)
        self.noise_first = self.encode(templates.PASSKEY_NOISE)
        self.noise_again = self.encode(" " + templates.PASSKEY_NOISE)
        self._cached = functools.lru_cache(maxsize=20_000)(self.encode)

    def encode(self, text: str) -> Tokens:
        """The tokens of a piece of text, no BOS."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def row(self, task: str, length: int) -> tuple[np.ndarray, np.ndarray]:
        """One row of a task (a key of `TASKS`), padded to ``length``; a row that came out too long is drawn anew."""
        while True:
            row = TASKS[task](self, length)
            if len(row.tokens) <= length:
                return row.padded(length)

    # ------------------------------------------------------------------ keys, values, haystacks

    def word_key(self) -> str:
        """``adjective-noun``."""
        return f"{self.rng.choice(self.words.adjectives)}-{self.rng.choice(self.words.nouns)}"

    def key_tokens(self, key: str, *, spaced: bool) -> Tokens:
        """The tokens of a word key, a single word or a UUID, with or without a space before it."""
        if key in self.words.spaced and spaced:
            return self.words.spaced[key]
        adjective, _, noun = key.partition("-")
        if adjective in self.words.bare and noun in self.words.behind_hyphen:
            return (self.words.spaced if spaced else self.words.bare)[adjective] + self.words.behind_hyphen[noun]
        return self.value_tokens(key) if spaced else self.value_tokens(key, space="")

    def value_tokens(self, value: str, space: str = " ") -> Tokens:
        """The tokens of a number, a UUID or a word, with a space before it."""
        if value in self.words.spaced and space:
            return self.words.spaced[value]
        tokens: Tokens = []
        for piece in re.findall(r" ?[a-z]+|\d|-| |[^a-z\d\- ]+", space + value):
            if piece in self.digits:
                tokens.append(self.digits[piece])
            else:
                tokens.extend(self._cached(piece))
        return tokens

    def draw_value(self, kind: str) -> str:
        """A value of a kind: ``numbers`` (7 digits), ``uuids`` or ``words``."""
        if kind == "numbers":
            return str(self.rng.randint(10**6, 10**7 - 1))
        if kind == "uuids":
            return str(uuid.UUID(int=self.rng.getrandbits(128), version=4))
        return self.rng.choice(self.words.nouns)

    def draw_distinct(self, draw: Callable[[], str], count: int) -> list[str]:
        """``count`` different draws."""
        found: dict[str, None] = {}
        while len(found) < count:
            found[draw()] = None
        return list(found)

    def text_haystack(self, size: int) -> tuple[list[Tokens], int]:
        """About ``size`` tokens of sentences, and how the loss counts them."""
        starts = self.corpus.sentence_starts
        first = self.rng.randrange(len(starts) - 1)
        first = min(first, int(np.searchsorted(starts, max(0, starts[-1] - size - 1))))
        last = max(first + 1, int(np.searchsorted(starts, starts[first] + size, side="right")) - 1)
        way = self.rng.random() if self.augment else 0.0
        if way >= 0.75:  # single sentences from everywhere
            chosen = [self.rng.randrange(len(starts) - 1) for _ in range(last - first)]
            pieces = [self.corpus.sentences[starts[index] : starts[index + 1]].tolist() for index in chosen]
            total = 0
            for count, piece in enumerate(pieces):
                total += len(piece)
                if total > size:
                    return pieces[:count], IGNORED
            return pieces, IGNORED
        tokens = self.corpus.sentences[starts[first] : starts[last]]
        kind = TEXT
        if 0.4 <= way < 0.6:  # the vocabulary exchanged: a text's structure without its words
            exchanged = np.arange(65536, dtype=np.uint16)
            vocabulary = self.tokenizer.get_vocab_size()
            exchanged[SPECIAL_TOKENS:vocabulary] = self.numpy_rng.permutation(np.arange(SPECIAL_TOKENS, vocabulary))
            tokens, kind = exchanged[tokens], IGNORED
        elif 0.6 <= way < 0.75:  # single tokens from everywhere
            tokens = self.corpus.sentences[self.numpy_rng.integers(0, len(self.corpus.sentences), len(tokens))]
            kind = IGNORED
        ends = (starts[first : last + 1] - starts[first]).tolist()
        flat = tokens.tolist()
        return [flat[start:end] for start, end in itertools.pairwise(ends)], kind

    def bare(self, piece: Tokens) -> Tokens:
        """The piece without the space before it, for the begin of a context."""
        return self.encode(self.tokenizer.decode(piece, skip_special_tokens=False).removeprefix(" "))

    def add_text(self, row: Row, needles: list[str], size: int) -> None:
        """Sentences of text joined by spaces, with needles between them."""
        needle_tokens = [self.encode(" " + needle.rstrip()) for needle in needles]
        lines, kind = self.text_haystack(max(8, size - sum(map(len, needle_tokens))))
        places = sorted(self.rng.randint(0, len(lines)) for _ in needles)
        if needles and self.rng.random() < 0.1:
            places[0] = 0
        for index in range(len(lines) + 1):
            while places and places[0] == index:
                places.pop(0)
                piece = needle_tokens.pop(0)
                row.add(self.bare(piece) if row.tokens[-1:] == self.line_end else piece)
            if index < len(lines):
                piece = lines[index]
                if row.tokens[-1:] == self.line_end:
                    piece = self.bare(piece)
                row.add(piece, kind)

    def add_noise_lines(self, row: Row, needles: list[str], size: int) -> None:
        """The repeated noise line, with needles on lines of their own."""
        needle_tokens = [self.encode("\n" + needle) for needle in needles]
        count = max(len(needles), (size - sum(map(len, needle_tokens))) // len(self.noise_line))
        self._add_lines(row, [self.noise_line] * count, needle_tokens)

    def _add_lines(self, row: Row, lines: list[Tokens], needles: list[Tokens]) -> None:
        """Lines with needles before lines drawn at random; each begins with a line end, which the first one loses."""
        places = sorted(self.rng.sample(range(len(lines)), len(needles)))
        placed: list[Tokens] = []
        for index, line in enumerate(lines):
            while places and places[0] == index:
                places.pop(0)
                placed.append(needles.pop(0))
            placed.append(line)
        row.add(placed[0][1:])
        for line in placed[1:]:
            row.add(line)

    def add_questions(self, row: Row, questions: Sequence[Question]) -> None:
        """The questions, each with its answer, a full stop and EOS."""
        for question in questions:
            row.add(self.encode(question.question + question.prefix))
            row.add(self.answer_tokens(question.answer), ANSWER)

    def answer_tokens(self, answer: str) -> Tokens:
        """A space, the answer, a full stop, EOS."""
        return [*self.encode(f" {answer}."), EOS]

    def room(self, length: int, intro: str, questions: Sequence[Question]) -> int:
        """Tokens left for the context."""
        asked = sum(len(self.encode(q.question + q.prefix)) + len(self.answer_tokens(q.answer)) for q in questions)
        return length - 1 - len(self.encode(intro)) - asked

    # ------------------------------------------------------------------ tasks

    def running_text(self, length: int) -> Row:
        """Text as it stands, nothing hidden in it."""
        start = self.rng.randrange(len(self.corpus.text) - length)
        row = Row()
        row.add(self.corpus.text[start : start + length - 1].tolist(), TEXT)
        return row

    def needles(self, haystack: str, length: int, **fixed: int | str) -> Row:
        """RULER's needles; ``fixed`` holds ``keys``, ``values``, ``queries``, ``key`` and ``value`` for a measurement."""
        rng = self.rng
        most = max(1, min(24, length // 110 if length <= 1024 else length // 250))
        value_kind = str(fixed.get("value") or rng.choices(["numbers", "uuids", "words"], [72, 16, 12])[0])
        key_kind = str(fixed.get("key") or rng.choices(["word", "uuid"], [88, 12])[0])
        if length < 512 and "value" not in fixed:
            value_kind, key_kind = ("numbers" if value_kind == "uuids" else value_kind), "word"
        if value_kind == "uuids" or key_kind == "uuid":
            most = max(1, most // 2)
        values_a_key = int(fixed.get("values") or (rng.randint(2, 4) if most >= 4 and rng.random() < 0.3 else 1))
        key_count = int(fixed.get("keys") or rng.randint(1, max(1, most // values_a_key)))
        draw_key = self.word_key if key_kind == "word" else functools.partial(self.draw_value, "uuids")
        keys = self.draw_distinct(draw_key, key_count)
        if value_kind == "words":
            values = self.draw_distinct(lambda: self.draw_value("words"), key_count * values_a_key)
        else:
            values = [self.draw_value(value_kind) for _ in range(key_count * values_a_key)]
        pairs = [(keys[index // values_a_key], value) for index, value in enumerate(values)]
        rng.shuffle(pairs)
        asked = self._queries(keys, values_a_key, length, fixed)
        questions = [self._needle_question(query, pairs, value_kind) for query in asked]
        intro = templates.NIAH_INTRO.format(type=value_kind)
        row = Row()
        row.add(self.encode(intro))
        room = self.room(length, intro, questions)
        lines = [templates.NEEDLE.format(type=value_kind, key=key, value=value) for key, value in pairs]
        if haystack == "text":
            self.add_text(row, lines, room)
        elif haystack == "noise":
            self.add_noise_lines(row, lines, room)
        else:
            self._add_distracting_needles(row, lines, room, value_kind, draw_key, {*keys})
        self.add_questions(row, questions)
        return row

    def many_values(self, length: int) -> Row:
        """A few keys, each with several values: all of a key's values are asked for."""
        most = max(2, min(24, length // 130))
        values = self.rng.randint(2, min(5, most))
        keys = self.rng.randint(1, max(1, min(4, most // values)))
        kind = self.rng.choices(["numbers", "words"], [85, 15])[0]
        haystack = self.rng.choices(["text", "noise"], [80, 20])[0]
        return self.needles(haystack, length, keys=keys, values=values, value=kind, key="word")

    def _queries(self, keys: list[str], values_a_key: int, length: int, fixed: dict[str, int | str]) -> list[list[str]]:
        """Which keys each question asks for; no key twice, since its answer would stand in an earlier question."""
        rng = self.rng
        left = rng.sample(keys, len(keys))
        if "queries" in fixed:
            return [left[: int(fixed["queries"])]]
        queries = []
        most = 1 if length <= 256 else 2 if length <= 512 else 4
        for _ in range(most):
            several = values_a_key == 1 and length > 256 and len(left) >= 2 and rng.random() < 0.35
            count = rng.randint(2, min(4, len(left))) if several else 1
            queries.append([left.pop() for _ in range(count)])
            if not left:
                break
        return queries

    @staticmethod
    def _needle_question(query: list[str], pairs: list[tuple[str, str]], value_kind: str) -> Question:
        values = [value for key in query for pair_key, value in pairs if pair_key == key]
        asked = templates.join_query(query)
        single = len(values) == 1
        kind = value_kind[:-1] if single else value_kind
        prefix = templates.NIAH_ANSWER_ONE if single else templates.NIAH_ANSWER_MANY
        return Question(
            templates.NIAH_QUESTION.format(type=kind, query=asked),
            prefix.format(type=kind, query=asked),
            templates.join_query(values),
        )

    def _add_distracting_needles(
        self, row: Row, lines: list[str], size: int, kind: str, draw_key: Callable[[], str], taken: set[str]
    ) -> None:
        """Lines of needles with other keys, as many as fit, the asked ones among them."""
        before, behind = self._cached(f"\nOne of the special magic {kind} for"), self._cached(" is:")
        stop = self._cached(".")
        needles = [self.encode("\n" + line) for line in lines]
        size -= sum(map(len, needles))
        others: list[Tokens] = []
        while True:
            key = draw_key()
            if key in taken:
                continue
            line = before + self.key_tokens(key, spaced=True) + behind + self.value_tokens(self.draw_value(kind)) + stop
            if len(line) > size and len(others) >= len(needles):
                break
            size -= len(line)
            others.append(line)
        self._add_lines(row, others, needles)

    def pass_key(self, length: int, *, haystack: str = "") -> Row:
        """A number on a line of its own in noise, sometimes between sentences of text."""
        value = str(self.rng.randint(1, 50_000))
        line = templates.PASSKEY_LINE.format(value=value)
        question = Question(templates.PASSKEY_QUESTION, templates.PASSKEY_ANSWER, value)
        row = Row()
        row.add(self.encode(templates.PASSKEY_INTRO))
        room = self.room(length, templates.PASSKEY_INTRO, [question])
        haystack = haystack or self.rng.choices(["noise", "text"], [65, 35])[0]
        if haystack == "text":
            self.add_text(row, [line], room)
        else:
            line_tokens = self.encode(f"\n{line}\n")
            characters = int(
                0.98 * (room - len(line_tokens) - 12) * len(templates.PASSKEY_NOISE) / len(self.noise_again)
            )
            before = round(self.rng.random() * characters)
            row.add(self.noise(before))
            row.add(line_tokens)
            row.add(self.noise(characters - before))
        self.add_questions(row, [question])
        return row

    def noise(self, characters: int) -> Tokens:
        """The first ``characters`` of the endless noise text, cut where they end."""
        unit = len(templates.PASSKEY_NOISE) + 1
        whole, rest = divmod(characters, unit)
        cut = (templates.PASSKEY_NOISE + " ")[:rest]
        if whole == 0:
            return self._cached(cut) if cut else []
        return self.noise_first + self.noise_again * (whole - 1) + self._cached(" " + cut)

    def key_value(self, length: int, *, kind: str = "") -> Row:
        """A table of keys and values; up to four different keys are asked for."""
        rng = self.rng
        kind = kind or rng.choices(["uuid", "number", "word"], [35 if length > 256 else 0, 35, 30])[0]
        draw_key: Callable[[], str] = self.word_key
        value_kind = {"uuid": "uuids", "number": "numbers", "word": "words"}[kind]
        if kind == "uuid":
            draw_key = functools.partial(self.draw_value, "uuids")
        elif kind == "word":
            draw_key = functools.partial(rng.choice, self.words.nouns)
        question_count = 1 if length <= 256 else rng.randint(1, 4)
        room = (
            length - 1 - len(self._cached(templates.KEY_VALUE_INTRO)) - question_count * (120 if kind == "uuid" else 46)
        )
        lines: list[tuple[str, str]] = []
        pieces: list[Tokens] = []
        taken: set[str] = set()
        while True:
            key, value = draw_key(), self.draw_value(value_kind)
            if key in taken:
                continue
            taken.add(key)
            key_tokens = self._cached("\n" + key)[1:] if kind == "word" else self.key_tokens(key, spaced=False)
            piece = [*self.line_end, *key_tokens, *self._cached(":"), *self.value_tokens(value)]
            room -= len(piece)
            if room < 0 and lines:
                break
            lines.append((key, value))
            pieces.append(piece)
        row = Row()
        row.add(self._cached(templates.KEY_VALUE_INTRO))
        row.add(pieces[0][1:])
        for piece in pieces[1:]:
            row.add(piece)
        asked = rng.sample(lines, min(question_count, len(lines)))
        self.add_questions(
            row,
            [
                Question(
                    templates.KEY_VALUE_QUESTION.format(key=key), templates.KEY_VALUE_ANSWER.format(key=key), value
                )
                for key, value in asked
            ],
        )
        return row

    def variable_tracking(self, length: int, *, hops: int = 0, haystack: str = "") -> Row:
        """Chains of assignments, in order, among noise or text; an example with its answer stands first at times."""
        row = Row()
        if length >= 1024 and self.rng.random() < 0.4:
            self._chains(row, self.rng.randint(200, 480), hops or self.rng.randint(1, 4), 1, "noise", example=True)
            row.add(self.line_end * 2)
        haystack = haystack or self.rng.choices(["noise", "text"], [65, 35])[0]
        most_chains = 1 if hops else min(3, length // 500)
        chains = self.rng.randint(1, max(1, most_chains))
        hops = hops or self.rng.randint(1, 4 if length > 256 else 2)
        self._chains(row, length - len(row.tokens), hops, chains, haystack, example=False)
        return row

    def _chains(self, row: Row, size: int, hops: int, chain_count: int, haystack: str, *, example: bool) -> None:
        rng = self.rng
        letters = 3 if example else rng.choice([3, 4, 5, 5])
        names = self.draw_distinct(
            lambda: "".join(rng.choices(string.ascii_uppercase, k=letters)), chain_count * (hops + 1)
        )
        values = self.draw_distinct(lambda: str(rng.randint(10_000, 99_998)), chain_count)
        chains, questions = [], []
        for index, value in enumerate(values):
            chain = names[index * (hops + 1) : (index + 1) * (hops + 1)]
            lines = [templates.TRACKING_FIRST.format(name=chain[0], value=value)]
            lines += [templates.TRACKING_HOP.format(name=chain[i + 1], source=chain[i]) for i in range(hops)]
            chains.append(lines)
            questions.append(
                Question(
                    templates.TRACKING_QUESTION.format(value=value),
                    templates.TRACKING_ANSWER.format(count=hops + 1, value=value),
                    " ".join(chain),
                )
            )
        lines = self._interleave(chains)
        row.add(self.encode(templates.TRACKING_INTRO))
        room = self.room(size, templates.TRACKING_INTRO, questions) + 1
        if haystack == "text":
            self.add_text(row, lines, room)
        else:
            self.add_noise_lines(row, lines, room)
        if example:
            shown = questions[0]
            row.add(self.encode(f"{shown.question}{shown.prefix} {shown.answer}"))
        else:
            rng.shuffle(questions)
            self.add_questions(row, questions)

    def _interleave(self, chains: list[list[str]]) -> list[str]:
        """All lines in a random order that keeps each chain's own."""
        order = [index for index, chain in enumerate(chains) for _ in chain]
        self.rng.shuffle(order)
        following = [iter(chain) for chain in chains]
        return [next(following[index]) for index in order]

    def common_words(self, length: int) -> Row:
        """A numbered list in which ten words stand more often."""
        often, seldom = (6, 1) if length < 4096 else (30, 3)
        row = Row()
        if length >= 2048 and self.rng.random() < 0.7:
            shown = self.rng.sample(self.words.all, 20 if length < 4096 else 40)
            times = (3, 1) if length < 4096 else (10, 3)
            self._listed_words(row, shown, times, example=True)
            row.add(self.line_end * 2)
        start = len(row.tokens)
        count = max(11, ((length - start) // 6 - 10 * often) // seldom + 10)
        while True:
            self._listed_words(row, self.rng.sample(self.words.all, min(count, 7000)), (often, seldom), example=False)
            if len(row.tokens) <= length or count <= 11:
                return row
            count = max(11, int(0.97 * count * (length - start) / (len(row.tokens) - start)))
            del row.tokens[start:], row.kinds[start:]

    def _listed_words(self, row: Row, words: list[str], times: tuple[int, int], *, example: bool) -> None:
        common = words[:10]
        listed = common * times[0] + words[10:] * times[1]
        self.rng.shuffle(listed)
        row.add(self._cached(templates.COMMON_WORDS_INTRO))
        dot = self._cached(".")
        for number, word in enumerate(listed, start=1):
            tokens = self.value_tokens(str(number), space="" if number == 1 else " ")
            row.add(tokens + dot + self.words.spaced[word])
        question = templates.COMMON_WORDS_QUESTION.format(count=10)
        prefix = templates.COMMON_WORDS_ANSWER.format(count=10)
        answer = " ".join(f"{number}. {word}" for number, word in enumerate(common, start=1))
        if example:
            row.add(self.encode(f"{question}{prefix} {answer}"))
        else:
            self.add_questions(row, [Question(question, prefix, answer)])

    def frequent_words(self, length: int) -> Row:
        """Coded words by Zipf's law; the three most frequent behind the dots are asked for."""
        ranks = max(length // 50, 5)
        words = self.draw_distinct(lambda: "".join(self.rng.choices(string.ascii_lowercase, k=6)), ranks)
        tokens = [self.encode(" ..."), *(self.encode(" " + word) for word in words[1:])]
        question = Question(templates.FREQUENT_WORDS_QUESTION, templates.FREQUENT_WORDS_ANSWER, " ".join(words[1:4]))
        room = self.room(length, templates.FREQUENT_WORDS_INTRO, [question])
        shares = [rank**-2.0 * 6 / np.pi**2 for rank in range(1, ranks + 1)]
        size = int(room / sum(share * len(piece) for share, piece in zip(shares, tokens, strict=True)))
        while True:
            counts = [int(size * share) for share in shares]
            fits = sum(count * len(piece) for count, piece in zip(counts, tokens, strict=True)) <= room
            if (fits and counts[3] > counts[4]) or size <= 60:
                break
            size -= 1
        listed = [index for index, count in enumerate(counts) for _ in range(count)]
        self.rng.shuffle(listed)
        row = Row()
        row.add(self.encode(templates.FREQUENT_WORDS_INTRO))
        first = listed[0]
        row.add(self.encode("..." if first == 0 else words[first]))
        for index in listed[1:]:
            row.add(tokens[index])
        self.add_questions(row, [question])
        return row


TASKS: dict[str, Callable[[RowMaker, int], Row]] = {
    "running_text": RowMaker.running_text,
    "needles_in_text": lambda maker, length: maker.needles("text", length),
    "needles_in_noise": lambda maker, length: maker.needles("noise", length),
    "needles_in_needles": lambda maker, length: maker.needles("needles", length),
    "many_values": RowMaker.many_values,
    "pass_key": RowMaker.pass_key,
    "key_value": RowMaker.key_value,
    "variable_tracking": RowMaker.variable_tracking,
    "common_words": RowMaker.common_words,
    "frequent_words": RowMaker.frequent_words,
}
