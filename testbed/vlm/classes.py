"""The objects: COCO's names that have an emoji, what they are seen with, and how a caption names them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ObjectClass:
    """One COCO category.

    Attributes:
        name: COCO's name.
        coco_id: COCO's category id.
        emoji: the character whose glyph is its picture.
        plural: what two of them are called.
        painted: whether its picture is drawn in a random colour, so that the colour has to be seen.
        singular: what a caption calls one of them; empty: article and name.
        keep: the part of the glyph that is kept, as left, top, right, bottom in percent.
        erase: a part of the glyph that is made transparent.
    """

    name: str
    coco_id: int
    emoji: str
    plural: str = ""
    painted: bool = False
    singular: str = ""
    keep: tuple[int, int, int, int] = (0, 0, 100, 100)
    erase: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def article(self) -> str:
        """Article and name, as POPE asks for it."""
        return f"{'an' if self.name[0] in 'aeiou' else 'a'} {self.name}"

    @property
    def one(self) -> str:
        return self.singular or self.article

    @property
    def many(self) -> str:
        return self.plural or f"{self.name}s"


CLASSES: tuple[ObjectClass, ...] = (
    ObjectClass("person", 1, "🧍", plural="people"),
    ObjectClass("bicycle", 2, "🚲", painted=True),
    ObjectClass("car", 3, "🚗", painted=True),
    ObjectClass("motorcycle", 4, "🏍"),
    ObjectClass("airplane", 5, "✈"),
    ObjectClass("bus", 6, "🚌", plural="buses", painted=True),
    ObjectClass("train", 7, "🚂"),
    ObjectClass("truck", 8, "🚚", painted=True),
    ObjectClass("boat", 9, "⛵", painted=True),
    ObjectClass("traffic light", 10, "🚦"),
    ObjectClass("stop sign", 13, "🛑"),
    ObjectClass("bird", 16, "🐦"),
    ObjectClass("cat", 17, "🐈"),
    ObjectClass("dog", 18, "🐕"),
    ObjectClass("horse", 19, "🐎"),
    ObjectClass("sheep", 20, "🐑", plural="sheep"),
    ObjectClass("cow", 21, "🐄"),
    ObjectClass("elephant", 22, "🐘"),
    ObjectClass("bear", 23, "🐻"),
    ObjectClass("zebra", 24, "🦓"),
    ObjectClass("giraffe", 25, "🦒"),
    ObjectClass("backpack", 27, "🎒", painted=True),
    ObjectClass("umbrella", 28, "☂", painted=True),
    ObjectClass("handbag", 31, "👜", painted=True),
    ObjectClass("tie", 32, "👔"),
    ObjectClass("suitcase", 33, "🧳", painted=True),
    ObjectClass("frisbee", 34, "🥏", painted=True),
    ObjectClass("skis", 35, "🎿", plural="pairs of skis", singular="a pair of skis"),
    ObjectClass("sports ball", 37, "⚽"),
    ObjectClass("kite", 38, "🪁"),
    ObjectClass("skateboard", 41, "🛹"),
    # The glyph shows a ball, too, which is a class of its own.
    ObjectClass("tennis racket", 43, "🎾", erase=(0, 0, 38, 36)),
    ObjectClass("bottle", 44, "🍾"),
    ObjectClass("wine glass", 46, "🍷", plural="wine glasses"),
    ObjectClass("cup", 47, "☕", painted=True),
    # The glyph shows a fork and a knife side by side.
    ObjectClass("fork", 48, "🍴", keep=(0, 0, 55, 100)),
    ObjectClass("knife", 49, "🔪", plural="knives"),
    ObjectClass("spoon", 50, "🥄"),
    ObjectClass("bowl", 51, "🍚", painted=True),
    ObjectClass("banana", 52, "🍌"),
    ObjectClass("apple", 53, "🍎"),
    ObjectClass("sandwich", 54, "🥪", plural="sandwiches"),
    ObjectClass("orange", 55, "🍊"),
    ObjectClass("broccoli", 56, "🥦", plural="pieces of broccoli", singular="a piece of broccoli"),
    ObjectClass("carrot", 57, "🥕"),
    ObjectClass("hot dog", 58, "🌭"),
    ObjectClass("pizza", 59, "🍕"),
    ObjectClass("donut", 60, "🍩"),
    ObjectClass("cake", 61, "🎂"),
    ObjectClass("chair", 62, "🪑", painted=True),
    ObjectClass("couch", 63, "🛋", plural="couches"),
    ObjectClass("potted plant", 64, "🪴"),
    ObjectClass("bed", 65, "🛏"),
    ObjectClass("toilet", 70, "🚽"),
    ObjectClass("tv", 72, "📺"),
    ObjectClass("laptop", 73, "💻"),
    ObjectClass("mouse", 74, "🖱", plural="mice"),
    ObjectClass("keyboard", 76, "⌨"),
    ObjectClass("cell phone", 77, "📱"),
    ObjectClass("book", 84, "📕", painted=True),
    ObjectClass("clock", 85, "🕰"),
    ObjectClass("vase", 86, "🏺", painted=True),
    ObjectClass("scissors", 87, "✂", plural="pairs of scissors", singular="a pair of scissors"),
    ObjectClass("teddy bear", 88, "🧸"),
    ObjectClass("toothbrush", 90, "🪥", plural="toothbrushes", painted=True),
)  # fmt: skip

NAMES = tuple(entry.name for entry in CLASSES)
INDEX = {name: index for index, name in enumerate(NAMES)}
PERSON = INDEX["person"]


@dataclass(frozen=True)
class Group:
    """A place and what is seen there.

    Attributes:
        name: the group's name.
        place: how a caption calls the place.
        weight: how often its scenes are drawn.
        units: companions, which are seen together, and single objects; the first ones are drawn most often.
        colours: the background's upper and lower colour.
    """

    name: str
    place: str
    weight: int
    units: tuple[tuple[str, ...], ...]
    colours: tuple[tuple[int, int, int], tuple[int, int, int]]


# No place may carry the name of a COCO object ("table", "desk"): a scorer of captions would count it.
GROUPS: tuple[Group, ...] = (
    Group("street", "a street", 18,
          (("car", "traffic light"), ("bus", "stop sign"), ("truck", "motorcycle"), ("bicycle", "skateboard")),
          ((150, 180, 210), (120, 118, 116))),
    Group("kitchen", "a kitchen", 17,
          (("fork", "knife"), ("cup", "donut"), ("bottle", "wine glass"), ("spoon", "bowl")),
          ((225, 215, 190), (190, 150, 110))),
    Group("home", "a living room", 15,
          (("couch", "tv"), ("chair", "potted plant"), ("bed", "teddy bear"), ("vase", "clock"),
           ("toilet", "toothbrush")),
          ((215, 205, 215), (170, 140, 125))),
    Group("office", "an office", 13,
          (("laptop", "mouse"), ("keyboard", "cell phone"), ("book", "scissors")),
          ((205, 215, 222), (150, 155, 165))),
    Group("animals", "a meadow", 13,
          (("dog", "cat"), ("cow", "sheep"), ("horse", "bird"), ("zebra", "giraffe"), ("elephant", "bear")),
          ((165, 205, 235), (120, 170, 90))),
    Group("market", "a market", 10,
          (("pizza", "hot dog"), ("apple", "orange"), ("banana", "sandwich"), ("broccoli", "carrot"), ("cake",)),
          ((235, 225, 200), (205, 185, 150))),
    Group("journey", "a station", 8,
          (("airplane", "suitcase"), ("handbag", "tie"), ("boat", "umbrella"), ("train", "backpack")),
          ((175, 195, 215), (140, 150, 165))),
    Group("sport", "a park", 6,
          (("sports ball", "tennis racket"), ("frisbee", "kite"), ("skis",)),
          ((185, 220, 240), (150, 190, 120))),
)  # fmt: skip

UNITS: tuple[tuple[str, ...], ...] = tuple(unit for group in GROUPS for unit in group.units)
COMPANION: dict[str, str] = {
    name: other for unit in UNITS if len(unit) == 2 for name, other in (unit, (unit[1], unit[0]))
}

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 35), "yellow": (235, 205, 40), "green": (45, 160, 60), "blue": (45, 90, 215),
    "purple": (135, 55, 165), "pink": (245, 140, 185), "white": (245, 245, 245), "black": (45, 45, 48),
}  # fmt: skip
COLOUR_NAMES = tuple(COLOURS)
NUMBER_WORDS = ("no", "one", "two", "three", "four")
