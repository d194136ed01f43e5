"""Fixes of errors as options of the command line."""

from collections.abc import Mapping

from stages.errors import Fix, Fixes


def options_of(fixes: Fixes) -> dict[str, str]:
    """Fixes as options of the command line: "" leaves an option out."""
    return {f"--{fix.field.replace('_', '-')}{f' {fix.component}' if fix.component else ''}":
            "" if fix.value is None else str(fix.value) for fix in fixes}


def fixes_of(options: Mapping[str, str]) -> Fixes:
    """The other way round."""
    parts = ((name.partition(" "), value) for name, value in options.items())
    return tuple(Fix(option.removeprefix("--").replace("-", "_"), value or None, component)
                 for (option, _, component), value in parts)
