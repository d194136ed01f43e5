"""Words of messages that depend on what they are said of."""


def counted(count: int, noun: str) -> str:
    """Such as `1 seed`, `2 seeds`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def with_article(word: str) -> str:
    """The name of a type or a class as it stands in a sentence: `an int`, `a list`."""
    return f"{'an' if word.startswith(tuple('aeioAEIO')) else 'a'} {word}"


def kind_of(value: object) -> str:
    """What a value is that should be another: `an int`, `a list`, or `None`."""
    return "None" if value is None else with_article(type(value).__name__)
