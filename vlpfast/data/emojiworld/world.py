"""What an emojiworld is made from: every option in one place."""

from __future__ import annotations

from dataclasses import dataclass

from vlpfast.types import UserError

DOMAINS = ("twemoji", "openmoji")
LANGUAGES = ("en", "es", "ja", "ko", "pt", "it", "fr", "de", "fa", "id", "zh", "ru", "tr", "ar")
MAX_OBJECTS = 4
WRITTEN = 100  # objects in vocabulary.json


@dataclass(frozen=True)
class World:
    """Options of a world. Raises UserError for a value that cannot be built."""

    seed: int = 0
    vocabulary: int | str = WRITTEN  # that many objects of the written list, or "all": every named emoji without its skin tones
    size: int = 96  # width and height of the pictures in pixels
    objects: tuple[int, int] = (1, MAX_OBJECTS)  # fewest and most objects of a scene, for splits that do not say otherwise
    domain: str = "twemoji"  # whose artwork: twemoji or openmoji
    language: str = "en"  # of the names and captions
    format: str = "jpg"  # or png
    quality: int = 92  # of the JPEG
    pictures: int = 1  # of a sample; 2: half as many samples as scenes, with statements about both pictures
    translations: bool = False  # each object's names in all languages into the JSON

    def __post_init__(self) -> None:
        object.__setattr__(self, "objects", tuple(self.objects))
        _whole("seed", self.seed, 0, 2**63 - 1)
        if self.vocabulary != "all":
            _whole("vocabulary", self.vocabulary, MAX_OBJECTS, WRITTEN, ' or "all"')
        _whole("size", self.size, 64, 1024)
        _range("objects", self.objects)
        _whole("pictures", self.pictures, 1, 2)
        _one_of("domain", self.domain, DOMAINS)
        _one_of("language", self.language, LANGUAGES)
        _one_of("format", self.format, ("jpg", "png"))
        _whole("quality", self.quality, 1, 100)


@dataclass(frozen=True)
class Split:
    """How many scenes a split has and of how many objects (None: as the world says).

    No scene of one split means the same as a scene of another. `heldout`: nor does any other scene of the same split, and no
    caption occurs twice."""

    num_scenes: int
    objects: tuple[int, int] | None = None
    heldout: bool = False

    def __post_init__(self) -> None:
        _whole("num_scenes", self.num_scenes, 1, 10**9)
        if self.objects is not None:
            object.__setattr__(self, "objects", tuple(self.objects))
            _range("objects", self.objects)


def default_splits(num_scenes: int = 20_000, heldout: int = 1_000) -> dict[str, Split]:
    """What the demo trains and is measured on: `train` with the world's numbers of objects, `heldout` with pairs (retrieval),
    `heldout_single` with single objects (zero-shot classification; the label is the object's name, each as frequent as any
    other)."""
    return {
        "train": Split(num_scenes),
        "heldout": Split(heldout, (2, 2), heldout=True),
        "heldout_single": Split(heldout, (1, 1), heldout=True),
    }


def _whole(name: str, value: object, low: int, high: int, otherwise: str = "") -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise UserError(f"emojiworld: {name} must be a whole number from {low} to {high}{otherwise}, got {value!r}")


def _range(name: str, value: tuple[int, ...]) -> None:
    if len(value) != 2 or not all(isinstance(n, int) for n in value) or not 1 <= value[0] <= value[1] <= MAX_OBJECTS:
        raise UserError(f"emojiworld: {name} must be two numbers low <= high from 1 to {MAX_OBJECTS}, got {value!r}")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"emojiworld: {name} must be one of {', '.join(known)}, got {value!r}")
