"""JSON read strictly: what the format allows is not all that we accept. No torch."""

import json


def strict_json(text: str | bytes | bytearray, *, infinity: bool = False) -> object:
    """The JSON value in `text`; ValueError for duplicate keys and NaN as well, and without `infinity` for those."""
    # Left to guess, json takes UTF-16 and UTF-32 as well.
    text = text if isinstance(text, str) else text.decode("utf-8")
    return json.loads(text, object_pairs_hook=_unique, parse_constant=_infinity if infinity else _no_constant)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice")
    return found


def _infinity(text: str) -> float:
    return float(text) if text.endswith("Infinity") else _no_constant(text)


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")
