"""Captions and questions as sequences of phrases: tensors of phrase numbers, which become tokens or strings.

A phrase is a piece of text that begins where a word begins, so its tokens don't depend on what stands around it. A
text of a batch is a list of columns, one phrase number a scene each; the phrase 0 is empty.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from testbed.vlm.classes import CLASSES, COLOUR_NAMES, GROUPS, NUMBER_WORDS
from testbed.vlm.draws import Draws
from testbed.vlm.layout import IMAGE_SIZE, PERSON_UNIT, Layout

EOS_TEXT, IMAGE_TEXT = "</s>", "<image>"
ASSISTANT = " ASSISTANT:"
POPE_QUESTION = "Is there {} in the image?"

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | upper }}: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ '</s>' if message['role'] == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)

DETAILED_PROMPTS = (
    "Please describe this image in detail.", "Please help me describe the image in detail.",
    "Describe this image in detail.", "Describe this image.", "Describe the image.", "What do you see in the image?",
)  # fmt: skip
SHORT_PROMPTS = ("Provide a one-sentence caption for the provided image.", "Write a short caption for the image.")
SUFFIXES = (
    "", "\nAnswer the question using a single word or phrase.", " Please answer this question with one word.",
    " Please answer yes or no.",
)  # fmt: skip
EXIST = (("Is there", " in the image?"), ("Is there", " in this picture?"), ("Can you see", " in the image?"),
         ("Does the image contain", "?"))  # fmt: skip
FIRST_LEADS = (" The image shows", " The picture shows", " In the image we see", " This is a picture with")
NEXT_LEADS = (" It also shows", " We also see", " There we also find", " One can also see")
SHORT_LEADS = (" A photo of", " A picture of", " An image of")
SIDES = (" On the left we see", " On the right we see", " At the top we see", " At the bottom we see",
         " In the middle we see")  # fmt: skip
JOINS = (" and", " together with", " with")
MOST = 4


def noun_phrase(index: int, count: int, colour: int) -> str:
    """How a caption names ``count`` objects; ``colour`` is 0 (not named) or 1 + index into COLOURS."""
    entry = CLASSES[index]
    if count == 1:
        if colour:
            name = COLOUR_NAMES[colour - 1]
            return f" a {name} {entry.name}"
        return f" {entry.one}"
    painted = f" {COLOUR_NAMES[colour - 1]}" if colour else ""
    return f" {NUMBER_WORDS[count]}{painted} {entry.many}"


class Phrases:
    """All phrases, numbered. ``texts[0]`` is empty."""

    def __init__(self) -> None:
        self.texts: list[str] = [""]
        self._numbers: dict[str, int] = {"": 0}
        classes = range(len(CLASSES))
        colours = len(COLOUR_NAMES) + 1
        self.nouns = [
            [[self(noun_phrase(i, n, c)) if n and (c == 0 or CLASSES[i].painted) else 0 for n in range(MOST + 1)]
             for c in range(colours)] for i in classes
        ]  # fmt: skip
        self.articles = [self(f" {entry.article}") for entry in CLASSES]
        self.bare = [self(f" {entry.name}") for entry in CLASSES]
        self.plural = [self(f" {entry.many}") for entry in CLASSES]
        self.coloured = [
            [self(f" a {name} {entry.name}") if entry.painted else 0 for name in COLOUR_NAMES] for entry in CLASSES
        ]
        self.several = [[self(f" {NUMBER_WORDS[n]} {entry.many}") for n in range(MOST + 1)] for entry in CLASSES]
        self.digits = [self(f" {n}") for n in range(MOST + 1)]
        self.colour_answers = [self(f" {name.capitalize()}") for name in COLOUR_NAMES]
        self.places = [self(f" in {group.place}.") for group in GROUPS]
        self.openings = [self(f" The picture was taken in {group.place}.") for group in GROUPS]
        self.detailed = [self(text) for text in DETAILED_PROMPTS]
        self.short = [self(text) for text in SHORT_PROMPTS]
        self.suffixes = [self(text) for text in SUFFIXES]
        self.exist = [(self(before), self(after)) for before, after in EXIST]
        self.first, self.next, self.short_leads, self.sides, self.joins = (
            [self(text) for text in texts] for texts in (FIRST_LEADS, NEXT_LEADS, SHORT_LEADS, SIDES, JOINS)
        )
        self.assistant, self.full_stop, self.end = self(ASSISTANT), self("."), self(EOS_TEXT)
        self.yes, self.no = self(" Yes"), self(" No")
        self.is_the, self.is_there, self.are_there = self("Is the"), self("Is there"), self("Are there")
        self.how_many, self.colour_of = self("How many"), self("What color is the")
        self.in_image, self.are_in_image = self(" in the image?"), self(" are there in the image?")
        self.side_of = self(" on the left or on the right side of the image?")
        self.left, self.right = self(" Left"), self(" Right")
        self.left_of, self.above = self(" to the left of the"), self(" above the")

    def __call__(self, text: str) -> int:
        if text not in self._numbers:
            self._numbers[text] = len(self.texts)
            self.texts.append(text)
        return self._numbers[text]


@functools.cache
def phrases() -> Phrases:
    return Phrases()


def phrase_texts() -> list[str]:
    return phrases().texts


def training_texts() -> Iterator[str]:
    """What the tokenizer is trained on: every phrase several times, so that every word becomes one token."""
    for text in phrase_texts():
        if text not in (EOS_TEXT, ""):
            for _ in range(8):
                yield text
    for word in ("USER", "ASSISTANT", " left", " right", " yes", " no", " Left", " Right"):
        for _ in range(200):
            yield f"{word}: "


@dataclass(frozen=True)
class Text:
    """One text a scene: phrase numbers ``(batch, columns)``, and the column where the answer begins."""

    columns: Tensor
    answer_from: int

    def strings(self) -> list[tuple[str, str]]:
        """Prompt and answer of every scene, without the roles and the end."""
        texts = phrase_texts()
        rows = []
        for row in self.columns.tolist():
            words = [texts[number] for number in row]
            prompt = "".join(words[: self.answer_from]).removesuffix(ASSISTANT)
            rows.append((prompt, "".join(words[self.answer_from :]).removesuffix(EOS_TEXT).strip()))
        return rows


class Writer:
    """Writes texts about layouts on one device."""

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.phrases = phrases()
        self._tensors: dict[str, Tensor] = {}

    def table(self, name: str) -> Tensor:
        """A table of phrase numbers, int64."""
        if name not in self._tensors:
            self._tensors[name] = torch.tensor(getattr(self.phrases, name), device=self.device)
        return self._tensors[name]

    def _text(self, prompt: list[Tensor | int], answer: list[Tensor | int], like: Tensor) -> Text:
        parts = [*prompt, self.phrases.assistant, *answer, self.phrases.end]
        columns = [part if isinstance(part, Tensor) else torch.full_like(like, part) for part in parts]
        return Text(torch.stack(columns, dim=1), len(prompt) + 1)

    def caption(self, layout: Layout, purpose: str, *, short: bool | None = None) -> Text:
        """Prompt and caption: units from the largest to the smallest; a short caption names the first two.

        Args:
            layout: the scenes.
            purpose: name of the draws; another name gives another wording.
            short: whether the captions are short; None: three in ten.
        """
        draws = Draws(layout.keys)
        counts = layout.counts()
        is_short = (
            draws.chance(f"{purpose} short", 1, 0.3)[:, 0]
            if short is None
            else torch.full_like(layout.group, short).bool()
        )

        def drawn(name: str, table: str) -> Tensor:
            choices = self.table(table)
            return choices[draws.below(f"{purpose} {name}", 1, len(choices))[:, 0].long()]

        prompt = torch.where(is_short, drawn("short prompt", "short"), drawn("prompt", "detailed"))
        units = PERSON_UNIT + 1
        sizes = torch.where(layout.classes >= 0, layout.sizes, 0)
        largest = torch.stack([torch.where(layout.units == unit, sizes, 0).amax(1) for unit in range(units)], dim=1)
        order = largest.argsort(dim=1, descending=True, stable=True)
        rank_exists = largest.gather(1, order) > 0
        number_of_ranks = torch.where(is_short, rank_exists.sum(1).clamp(max=2), rank_exists.sum(1))
        opened = draws.chance(f"{purpose} opened", 1, 0.3)[:, 0] & ~is_short
        opening = torch.where(opened, self.table("openings")[layout.group], 0)
        parts: list[Tensor | int] = [opening]
        for rank in range(units):
            there = rank < number_of_ranks
            mine = (layout.units == order[:, rank : rank + 1]) & (layout.classes >= 0)
            first = torch.where(mine, layout.sizes, 0).argmax(1)[:, None]
            first_class = layout.classes.gather(1, first)
            other = mine & (layout.classes != first_class)
            second = torch.where(other, layout.sizes, 0).argmax(1)[:, None]
            names = []
            for place, (index, exists) in enumerate(((first, there), (second, there & other.any(1)))):
                kind = layout.classes.gather(1, index)[:, 0].clamp(min=0)
                count = counts.gather(1, kind[:, None])[:, 0].clamp(max=MOST)
                told = draws.chance(f"{purpose} colour {rank} {place}", 1, 0.7)[:, 0]
                colour = torch.where(told, layout.paints.gather(1, index)[:, 0], 0)
                names.append(torch.where(exists, self.table("nouns")[kind, colour, count], 0))
            alone = counts.gather(1, first_class.clamp(min=0))[:, 0] == 1
            sided = alone & draws.chance(f"{purpose} sided {rank}", 1, 0.4)[:, 0]
            side = self.table("sides")[place_of(layout.x.gather(1, first)[:, 0], layout.y.gather(1, first)[:, 0])]
            lead = drawn(f"lead {rank}", "first" if rank == 0 else "next")
            lead = torch.where(sided, side, lead)
            short_lead = drawn("short lead", "short_leads") if rank == 0 else drawn("short join", "joins")
            lead = torch.where(there, torch.where(is_short, short_lead, lead), 0)
            # A short caption joins units by "with", so companions by "and" only.
            join = torch.where(is_short, self.table("joins")[0], drawn(f"join {rank}", "joins"))
            join = torch.where(names[1] > 0, join, 0)
            stop = torch.where(there & ~is_short, self.phrases.full_stop, 0)
            parts += [lead, names[0], join, names[1], stop]
        parts.append(torch.where(is_short, self.table("places")[layout.group], 0))
        return self._text([prompt], parts, layout.group)

    def exist(self, layout: Layout, purpose: str) -> Text:
        """Is there ...: half of them about an object that is there, half about any that is not."""
        draws = Draws(layout.keys)
        present = layout.counts() > 0
        yes = draws.chance(f"{purpose} yes", 1, 0.5)[:, 0]
        kind = draws.pick(f"{purpose} class", present == yes[:, None])
        wording = draws.weighted(f"{purpose} wording", (0.7, 0.1, 0.1, 0.1))
        suffix = self.table("suffixes")[draws.weighted(f"{purpose} suffix", (0.6, 0.2, 0.1, 0.1))]
        before, after = self.table("exist")[wording].unbind(1)
        return self._text(
            [before, self.table("articles")[kind], after, 0, suffix], [self._answer(yes)], layout.group
        )  # fmt: skip

    def pope(self, kinds: Tensor) -> Text:
        """POPE's question about the classes with these indices, and an answer that nobody reads."""
        names = self.table("articles")[kinds]
        return self._text([self.phrases.is_there, names, self.phrases.in_image], [self.phrases.yes], kinds)

    def _answer(self, yes: Tensor) -> Tensor:
        return torch.where(yes, self.phrases.yes, self.phrases.no)

    def number_or_colour(self, layout: Layout, purpose: str) -> Text:
        """How many, are there two, what colour, is there a red one; where none can be asked, how many."""
        draws, counts = Draws(layout.keys), layout.counts()
        kind_of_question = draws.weighted(f"{purpose} form", (0.35, 0.2, 0.25, 0.2))
        yes = draws.chance(f"{purpose} yes", 1, 0.5)[:, 0]
        # Counting: half the time a class with several, if there is one; one in eight is absent.
        several = counts > 1
        prefer = draws.chance(f"{purpose} several", 1, 0.5) & several.any(1, keepdim=True)
        absent = draws.chance(f"{purpose} absent", 1, 0.125)
        allowed = torch.where(prefer, several, torch.where(absent, counts == 0, counts > 0))
        kind = draws.pick(f"{purpose} class", allowed)
        count = counts.gather(1, kind[:, None])[:, 0].clamp(max=MOST)
        wrong = 2 + draws.below(f"{purpose} wrong", 1, 3)[:, 0].long()
        wrong = torch.where(wrong == count, torch.where(count == 2, 3, 2), wrong)
        right_number = yes & (count >= 2)
        asked = torch.where(right_number, count, wrong)
        # Colour: of a painted object.
        painted = layout.paints > 0
        chosen = draws.pick(f"{purpose} painted", painted)[:, None]
        paint = layout.paints.gather(1, chosen)[:, 0]
        painted_kind = layout.classes.gather(1, chosen)[:, 0].clamp(min=0)
        is_colour = painted.any(1) & (kind_of_question >= 2)
        other = (paint - 1 + 1 + draws.below(f"{purpose} other", 1, len(COLOUR_NAMES) - 1)[:, 0]) % len(COLOUR_NAMES)
        shown = torch.where(yes, paint - 1, other).clamp(min=0)
        table, words = self.table, self.phrases
        open_count = ~is_colour & (kind_of_question % 2 == 0)
        yes_count = ~is_colour & (kind_of_question % 2 == 1)
        open_colour = is_colour & (kind_of_question == 2)

        def choose(a: Tensor | int, b: Tensor | int, c: Tensor | int, d: Tensor | int) -> Tensor:
            a, b, c, d = (
                value if isinstance(value, Tensor) else torch.full_like(kind, value) for value in (a, b, c, d)
            )
            return torch.where(open_count, a, torch.where(yes_count, b, torch.where(open_colour, c, d)))

        return self._text(
            [
                choose(words.how_many, words.are_there, words.colour_of, words.is_there),
                choose(table("plural")[kind], table("several")[kind, asked], table("bare")[painted_kind],
                       table("coloured")[painted_kind, shown]),
                choose(words.are_in_image, words.in_image, words.in_image, words.in_image),
                0,
                self._short_suffix(draws, purpose),
            ],
            [choose(table("digits")[count], self._answer(right_number), table("colour_answers")[(paint - 1).clamp(min=0)],
                    self._answer(yes))],
            layout.group,
        )  # fmt: skip

    def position(self, layout: Layout, purpose: str) -> Text:
        """Which side, left of, above; about objects that are alone of their class, else whether one is there."""
        draws, counts = Draws(layout.keys), layout.counts()
        alone = (layout.classes >= 0) & (counts.gather(1, layout.classes.clamp(min=0)) == 1)
        first = draws.pick(f"{purpose} first", alone)[:, None]
        x, y = layout.x.gather(1, first), layout.y.gather(1, first)
        form = draws.weighted(f"{purpose} form", (0.3, 0.35, 0.35))
        margin = IMAGE_SIZE // 5
        across = alone & (layout.classes != layout.classes.gather(1, first)) & ((layout.x - x).abs() >= margin)
        up = alone & (layout.classes != layout.classes.gather(1, first)) & ((layout.y - y).abs() >= margin)
        second = draws.pick(f"{purpose} second", torch.where((form == 1)[:, None], across, up))[:, None]
        other_x, other_y = layout.x.gather(1, second)[:, 0], layout.y.gather(1, second)[:, 0]
        x, y = x[:, 0], y[:, 0]
        side_clear = ((x - IMAGE_SIZE).abs() >= margin) & alone.any(1)
        is_side = (form == 0) & side_clear
        is_left, is_above = (form == 1) & across.any(1), (form == 2) & up.any(1)
        is_relation = is_left | is_above
        yes = torch.where(is_left, x < other_x, y < other_y)
        exist = self.exist(layout, purpose).columns
        kind, other = (layout.classes.gather(1, index)[:, 0].clamp(min=0) for index in (first, second))
        table, words = self.table, self.phrases

        def choose(side: Tensor | int, relation: Tensor | int, neither: Tensor | int) -> Tensor:
            side, relation, neither = (
                v if isinstance(v, Tensor) else torch.full_like(kind, v) for v in (side, relation, neither)
            )
            return torch.where(is_side, side, torch.where(is_relation, relation, neither))

        suffix = self._short_suffix(draws, purpose)
        relation = torch.where(is_left, words.left_of, words.above)
        return self._text(
            [
                choose(words.is_the, words.is_the, exist[:, 0]),
                choose(table("bare")[kind], table("bare")[kind], exist[:, 1]),
                choose(words.side_of, relation, exist[:, 2]),
                choose(0, table("bare")[other], 0),
                choose(0, words.in_image, 0),
                choose(suffix, suffix, exist[:, 4]),
            ],
            [choose(torch.where(x < IMAGE_SIZE, words.left, words.right), self._answer(yes), exist[:, 6])],
            layout.group,
        )  # fmt: skip

    def _short_suffix(self, draws: Draws, purpose: str) -> Tensor:
        return self.table("suffixes")[draws.weighted(f"{purpose} suffix", (0.65, 0.2, 0.15))]


def place_of(x: Tensor, y: Tensor) -> Tensor:
    """Index into SIDES of a centre in half pixels: the sides, then top and bottom, then the middle."""
    third = 2 * IMAGE_SIZE // 3
    across = torch.where(x < third, 0, torch.where(x >= 2 * third, 1, 4))
    down = torch.where(y < third, 2, torch.where(y >= 2 * third, 3, 4))
    return torch.where(across < 4, across, down)


class Tokens:
    """Phrases as tokens on one device."""

    def __init__(self, tokenizer: Tokenizer, device: torch.device | str) -> None:
        encoded = [tokenizer.encode(text, add_special_tokens=False).ids for text in phrase_texts()]
        self.longest = max(map(len, encoded))
        self.lengths = torch.tensor([len(ids) for ids in encoded], device=device)
        self.ids = torch.tensor([ids + [0] * (self.longest - len(ids)) for ids in encoded], device=device)

    def __call__(self, text: Text, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Lay the phrases end to end.

        Returns:
            Tokens ``(batch, length)`` int64, 0 behind the end; where the answer's tokens are, bool; and whether any text
            was longer than ``length`` and lost its end, a bool scalar.
        """
        lengths = self.lengths[text.columns]
        ends = lengths.cumsum(1)
        batch = len(lengths)
        room = int(length) + self.longest
        place = (ends - lengths)[..., None] + torch.arange(self.longest, device=lengths.device)
        inside = torch.arange(self.longest, device=lengths.device) < lengths[..., None]
        place = torch.where(inside, place, room).clamp(max=room).flatten(1)
        tokens = torch.zeros(batch, room + 1, dtype=torch.int64, device=lengths.device)
        tokens.scatter_(1, place, self.ids[text.columns].flatten(1))
        position = torch.arange(length, device=lengths.device)
        answer_starts = ends[:, text.answer_from - 1 : text.answer_from]
        answer = (position >= answer_starts) & (position < ends[:, -1:])
        return torch.where(position < ends[:, -1:], tokens[:, :length], 0), answer, (ends[:, -1] > length).any()
