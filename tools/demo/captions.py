"""What people say of a scene: all of it in a few set forms, or some of it in many, at times with unknown words.

A caption is written with marks first, "a large red#0 star#0 on white#b": each word that names something carries the
index of its shape, or b for the background. The text is what is left without the marks.
"""

import random
import re
import string
import zlib
from dataclasses import dataclass

from tools.demo.scenes import Pair, Scene, training_scene
from tools.demo.shapes import COLORS, SHAPES

SOLO_CAPTIONS = (
    "a {size} {color}#0 {shape}#0 {position} on a {background}#b background",
    "{size} {color}#0 {shape}#0 {position}, {background}#b background",
    "a {color}#0 {shape}#0, {size}, {position}, on {background}#b",
)
"""Complete captions of one shape."""
PAIR_CAPTIONS = (
    "a {color}#0 {shape}#0 {relation} a {other_color}#1 {other_shape}#1 on a {background}#b background",
    "{color}#0 {shape}#0 {relation} {other_color}#1 {other_shape}#1, {background}#b background",
)
"""Complete captions of two shapes."""
SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
POSITION_WORDS = {
    "in the center": ("in the center", "in the middle", "centered"),
    "on the left": ("on the left", "at the left", "left"),
    "on the right": ("on the right", "at the right", "right"),
    "at the top": ("at the top", "on top", "top"),
    "at the bottom": ("at the bottom", "on the bottom", "bottom"),
}
RELATION_WORDS = {
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
    "to the left of": ("to the left of", "on the left of", "left of"),
    "to the right of": ("to the right of", "on the right of", "right of"),
}
OPEN_RELATIONS = ("and", "and", "with")
"""What joins two shapes whose places are left open."""
OPEN_SHAPES = ("shape", "thing", "object")
"""What a shape is called that is left open."""
BACKGROUNDS = (
    "on a {}#b background", "on {}#b", "with a {}#b background", "{}#b background", "on the {}#b background",
)
ARTICLES = ("a ", "a ", "the ", "one ", "")
OPENINGS = ("a picture of ", "a drawing of ", "an image of ", "a photo of ", "draw ")
SAME_WORDS = {
    "little": "small", "tiny": "small", "big": "large", "huge": "large", "middle": "center", "centered": "center",
    "over": "above", "under": "below", "beneath": "below",
}
"""Words that begin to be learnt as if they were others."""
UNKNOWN_WORDS = (
    "fox", "cat", "dog", "house", "tree", "car", "horse", "astronaut", "moon", "dragon", "robot", "flower",
    "mountain", "river", "castle", "bird", "fish", "apple", "teapot", "portrait", "city", "forest", "ocean", "sky",
    "beach", "sunset", "knight", "wizard", "spaceship", "bicycle", "banana", "elephant", "tiger", "panda", "rabbit",
    "shiny", "detailed", "beautiful", "highly", "realistic", "cinematic", "photo", "8k", "4k", "cute", "dark",
    "bright", "glowing", "wooden", "golden", "purple", "orange", "gray", "brown", "style", "painting", "watercolor",
    "sketch", "very", "and", "nice", "night", "space", "dream", "old", "young", "fast", "wearing", "hat", "sitting",
    "standing", "flying", "under", "water", "fire", "snow", "rain", "happy", "sad", "wild", "ancient", "modern",
    "tall", "round", "sharp", "soft",
)
"""Some of what people say and the demo cannot draw."""

SOLO_PARTS = ("color", "shape", "size", "position", "background")
PAIR_PARTS = ("color", "shape", "relation", "other_color", "other_shape", "background")
SOLO_SHARES = {"color": 0.65, "shape": 0.75, "size": 0.4, "position": 0.4, "background": 0.4}
PAIR_SHARES = {"color": 0.8, "shape": 0.8, "relation": 0.75, "other_color": 0.8, "other_shape": 0.8, "background": 0.4}
"""How often a partial caption says each part of a scene."""
COMPLETE_SHARE = 0.2
SET_FORM_SHARE = 0.7
NOTHING_SHARE = 0.04
FULL_STOP_SHARE = 0.1
OPENING_SHARE = 0.08
UNKNOWN_SHARE = 0.12


@dataclass(frozen=True)
class Caption:
    """What is said of a scene."""

    text: str
    """The words."""
    said: frozenset[str]
    """The parts of the scene that the words tell, by the names of its fields."""
    named: tuple[tuple[str, str], ...] = ()
    """Each word that names a color or a shape, in order, and whose it is: "0", "1", or "b" for the background."""


def complete_captions(scene: Scene) -> tuple[str, ...]:
    """Every set form of a caption that tells all that the scene shows."""
    return tuple(_plain(marked) for marked in _complete_forms(scene))


def everything(scene: Scene) -> frozenset[str]:
    """The names of all parts of a scene."""
    return frozenset(PAIR_PARTS if isinstance(scene, Pair) else SOLO_PARTS)


def training_caption(rng: random.Random, scene: Scene) -> Caption:
    """Any caption of the scene that is not kept for judging: often one that leaves something open."""
    while True:
        caption = complete_caption(rng, scene) if rng.random() < COMPLETE_SHARE else partial_caption(rng, scene)
        if caption.said == everything(scene) or not held_out_text(caption.text):
            return caption


def captioned_scene(rng: random.Random) -> tuple[Caption, Scene]:
    """A scene that is not held out, and a caption of it."""
    scene = training_scene(rng)
    return training_caption(rng, scene), scene


def known_words() -> list[str]:
    """All words that the demo knows, sorted."""
    tables = (SIZE_WORDS, POSITION_WORDS, RELATION_WORDS)
    phrases = [*COLORS, *SHAPES, *(word for table in tables for words in table.values() for word in words)]
    phrases += [*OPEN_RELATIONS, *OPEN_SHAPES, *BACKGROUNDS, *ARTICLES, *OPENINGS, "something"]
    return sorted({word for phrase in phrases for word in re.findall("[a-z]+", phrase.replace("#b", ""))})


def held_out_text(text: str) -> bool:
    """Whether a caption that leaves something open is kept from training: one in ten, by checksum."""
    return zlib.crc32(" ".join(re.findall(r"\w+", text.lower())).encode()) % 10 == 0


def complete_caption(rng: random.Random, scene: Scene) -> Caption:
    """A caption that tells everything, in a set form or freely."""
    if rng.random() < SET_FORM_SHARE:
        marked = rng.choice(_complete_forms(scene))
    else:
        marked = _free(rng, scene, everything(scene))
    return _caption(_finished(rng, marked), everything(scene))


def partial_caption(rng: random.Random, scene: Scene) -> Caption:
    """A caption that leaves something open, perhaps with words that the demo does not know."""
    if rng.random() < NOTHING_SHARE:
        return _caption(_finished(rng, rng.choice(ARTICLES) + unknown_words(rng)), frozenset())
    shares = PAIR_SHARES if isinstance(scene, Pair) else SOLO_SHARES
    while True:
        said = frozenset(name for name, share in shares.items() if rng.random() < share)
        if said != everything(scene):
            break
    marked = _free(rng, scene, said)
    if rng.random() < UNKNOWN_SHARE:
        marked = _with_unknown(rng, marked)
    return _caption(_finished(rng, marked), said)


def unknown_words(rng: random.Random) -> str:
    """One to three words that the demo does not know, some of them of random letters."""
    words = [
        rng.choice(UNKNOWN_WORDS) if rng.random() < 0.7
        else "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9)))
        for _ in range(rng.choice((1, 1, 2, 3)))
    ]
    return " ".join(words)


def _complete_forms(scene: Scene) -> list[str]:
    words: dict[str, str] = vars(scene)
    return [form.format(**words) for form in (PAIR_CAPTIONS if isinstance(scene, Pair) else SOLO_CAPTIONS)]


def _free(rng: random.Random, scene: Scene, said: frozenset[str]) -> str:
    """A marked caption of what is said, in any order that people say it."""
    if isinstance(scene, Pair):
        return _free_pair(rng, scene, said)
    thing = _thing(rng, scene.color * ("color" in said), scene.shape * ("shape" in said), "0",
                   rng.choice(SIZE_WORDS[scene.size]) if "size" in said else "")
    chunks = []
    if "position" in said:
        chunks.append(rng.choice(POSITION_WORDS[scene.position]))
    if "background" in said:
        chunks.append(rng.choice(BACKGROUNDS).format(scene.background))
    if chunks and not said & {"color", "shape", "size"} and rng.random() < 0.4:
        thing = chunks.pop()
    return _joined(rng, thing, chunks)


def _free_pair(rng: random.Random, pair: Pair, said: frozenset[str]) -> str:
    article = rng.choice(ARTICLES)
    first = _thing(rng, pair.color * ("color" in said), pair.shape * ("shape" in said), "0", "", article)
    other = _thing(rng, pair.other_color * ("other_color" in said), pair.other_shape * ("other_shape" in said), "1",
                   "", article)
    relation = rng.choice(RELATION_WORDS[pair.relation] if "relation" in said else OPEN_RELATIONS)
    chunks = [rng.choice(BACKGROUNDS).format(pair.background)] if "background" in said else []
    return _joined(rng, f"{first} {relation} {other}", chunks)


def _thing(rng: random.Random, color: str, shape: str, mark: str, size: str, article: str | None = None) -> str:
    """A shape as it is called: "a small red star"; what is empty is left open."""
    noun = shape or rng.choice(OPEN_SHAPES)
    words = [size, color and f"{color}#{mark}", f"{noun}#{mark}"]
    if not shape and color and rng.random() < 0.2:
        words.pop()
    name = " ".join(word for word in words if word)
    if not shape and not color and not size and rng.random() < 0.3:
        return f"something#{mark}"
    return (rng.choice(ARTICLES) if article is None else article) + name


def _joined(rng: random.Random, thing: str, chunks: list[str]) -> str:
    rng.shuffle(chunks)
    if chunks and rng.random() < 0.2:
        parts = [thing, *chunks]
        rng.shuffle(parts)
        return ", ".join(parts)
    text = thing
    for chunk in chunks:
        text += rng.choice((" ", " ", ", ")) + chunk
    return text


def _with_unknown(rng: random.Random, marked: str) -> str:
    """With unknown words somewhere, or instead of the name of an open shape."""
    words = unknown_words(rng)
    way = rng.randrange(3)
    open_names = [f"{name}#{mark}" for name in OPEN_SHAPES for mark in "01" if f"{name}#{mark}" in marked]
    if open_names and way < 2:
        return marked.replace(rng.choice(open_names), words, 1)
    if way == 0:
        return f"{marked}, {words}"
    spots = marked.split(" ")
    spots.insert(rng.randrange(len(spots) + 1), words)
    return " ".join(spots)


def _finished(rng: random.Random, marked: str) -> str:
    opening = rng.choice(OPENINGS) if rng.random() < OPENING_SHARE else ""
    return opening + marked + ("." if rng.random() < FULL_STOP_SHARE else "")


def _plain(marked: str) -> str:
    return re.sub(r"#\w", "", marked)


def _caption(marked: str, said: frozenset[str]) -> Caption:
    return Caption(_plain(marked), said, tuple(re.findall(r"(\w+)#(\w)", marked)))
