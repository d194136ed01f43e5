"""Changes of documents and of bytes by chance. The chance is a `Random`: a seeded one, or one of hypothesis."""

import json
import struct
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

# A step into a document: a key of an object, or a place in a list.
Step = str | int

COUNTS = (0, 1, 2, 3, 7, 10**3, 10**6, 10**7, 10**9, 2**31, 2**63, 10**30)
NUMBERS = (*COUNTS, *(-count for count in COUNTS if count), 0.0, 0.5, -1.5, 1e-320, 1e308)
WORDS = ("", "x", "0", "none", "../..", "/etc/passwd", "\u202e\x1b[31m", "a" * 5000, "org/name@main", "float32",
         "auto")


def change_document(random: Random, document: Any) -> str:
    """Change a JSON document in one to three places; what was changed, in words."""
    return "; ".join(_change_once(random, document) for _ in range(random.randint(1, 3)))


def _change_once(random: Random, document: Any) -> str:
    at = _somewhere(random, document)
    if not at:
        return "nothing is left to change"
    inside = _inside(document, at[:-1])
    match random.randrange(8):
        case 0:
            del inside[at[-1]]
            return f"{_spelled(at)} taken away"
        case 1 if isinstance(inside, dict):
            key, value = random.choice([*WORDS, *inside]), any_value(random)
            inside[key] = value
            return f"{_spelled((*at[:-1], key))} = {_shown(value)}"
        case 2:
            other = _inside(document, _somewhere(random, document))
            inside[at[-1]] = json.loads(json.dumps(other))
            return f"{_spelled(at)} = {_shown(inside[at[-1]])}, of another place"
        case _:
            inside[at[-1]] = like(random, inside[at[-1]])
            return f"{_spelled(at)} = {_shown(inside[at[-1]])}"


def like(random: Random, value: Any) -> Any:
    """Another value, mostly one of the same kind: what gets past a look at types."""
    if random.randrange(3) == 0:
        return any_value(random)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return random.choice(NUMBERS)
    if isinstance(value, str):
        return random.choice(WORDS)
    if isinstance(value, list):
        made = [like(random, item) for item in value[:100]] or [any_value(random)]
        longer = random.randrange(2)
        return made * random.choice((1, 1, 2, 50)) if longer else made[: random.randrange(len(made) + 1)]
    return any_value(random)


def any_value(random: Random) -> Any:
    """A JSON value."""
    kinds: Sequence[Callable[[], Any]] = (
        lambda: random.choice(NUMBERS), lambda: random.choice(WORDS), lambda: None, lambda: random.random() < 0.5,
        list, dict, lambda: [random.choice(NUMBERS)] * random.choice((1, 3, 10**5)),
        lambda: {random.choice(WORDS): random.choice(NUMBERS)}, lambda: nested(random.choice((3, 100, 400))),
    )
    return kinds[random.randrange(len(kinds))]()


def nested(depth: int) -> Any:
    """A list in a list, so deep."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def change_bytes(random: Random, data: bytes) -> tuple[str, bytes]:
    """The data with bytes flipped, cut off, put in or doubled, and what was done, in words."""
    at = random.randrange(len(data) + 1)
    match random.randrange(5):
        case 0:
            return f"cut off at byte {at}", data[:at]
        case 1:
            return f"{(count := random.choice((1, 8, 4096)))} bytes put in at {at}", (
                data[:at] + random.randbytes(count) + data[at:])
        case 2:
            count = random.choice((1, 8, 4096))
            return f"{count} bytes taken out at {at}", data[:at] + data[at + count:]
        case 3:
            return f"all from byte {at} twice", data + data[at:]
    flipped = bytearray(data)
    places = [random.randrange(len(data)) for _ in range(random.choice((1, 4)))] if data else []
    for place in places:
        flipped[place] ^= 1 << random.randrange(8)
    return f"bits flipped in bytes {places}", bytes(flipped)


def change_safetensors(random: Random, data: bytes) -> tuple[str, bytes]:
    """A safetensors file with another header, and what was changed in it, in words."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    if random.randrange(6) == 0:
        length = random.choice(COUNTS) % 2**64
        return f"header length = {length}", struct.pack("<Q", length) + data[8:]
    what = change_document(random, header)
    text = json.dumps(header).encode()
    return what, struct.pack("<Q", len(text)) + text + data[8 + length :]


def _somewhere(random: Random, document: Any) -> tuple[Step, ...]:
    """The way to a value of a document; its beginning is as likely as a place in the longest of its lists."""
    at: tuple[Step, ...] = ()
    while isinstance(document, dict | list) and document and len(at) < 9 and not (at and random.randrange(3) == 0):
        step = random.choice([*document] if isinstance(document, dict) else range(len(document)))
        at, document = (*at, step), document[step]
    return at


def _inside(document: Any, at: Sequence[Step]) -> Any:
    for step in at:
        document = document[step]
    return document


def _spelled(at: Sequence[Step]) -> str:
    return ".".join(map(str, at))[:80]


def _shown(value: Any) -> str:
    return json.dumps(value)[:60]
