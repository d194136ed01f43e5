"""A command line once more, with some of its options changed: to be pasted into a shell."""

import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence


def again(words: Sequence[str], changes: Mapping[str, str], flags: Collection[str]) -> str:
    """The shell line of `words` with the `changes`: option to value, "" to leave it out; `flags` take no value.

    "--place denoise" stands for the wishes of --place for that stage.
    """
    dropped = {name: stage for name, _, stage in (change.partition(" ") for change in changes)}
    kept = [pair for pair in _pairs(words, flags) if not _is_dropped(pair, dropped)]
    added = [word for name, value in changes.items() if value for word in (name, value)]
    # What stands behind "--" is no option.
    at = next((at for at, pair in enumerate(kept) if pair == ("--",)), len(kept))
    line = ["python", "-m", "runner", *(word for pair in kept[:at] for word in pair), *added,
            *(word for pair in kept[at:] for word in pair)]
    return " ".join(map(quoted, line))


def quoted(word: str) -> str:
    """A word as shells read it; what would move the cursor or turn the reading direction is spelled out."""
    if word.isprintable():
        return shlex.quote(word)
    spelled = (f"\\{c}" if c in "\\'" else c if c.isprintable() else f"\\U{ord(c):08x}" for c in word)
    return f"$'{''.join(spelled)}'"


def _pairs(words: Sequence[str], flags: Collection[str]) -> Iterator[tuple[str, ...]]:
    """The words, each option together with its value."""
    rest = iter(words)
    for word in rest:
        if word == "--":
            yield (word,)
            yield from ((other,) for other in rest)
        elif word.startswith("--") and "=" not in word and word not in flags:
            yield word, *(value for value in (next(rest, None),) if value is not None)
        else:
            yield (word,)


def _is_dropped(pair: tuple[str, ...], dropped: Mapping[str, str]) -> bool:
    name, sign, value = pair[0].partition("=")
    stage = dropped.get(name)
    if stage is None or (len(pair) == 1 and not sign):
        return False
    return not stage or (value if sign else pair[1]).startswith((f"{stage}=", f"{stage}."))
