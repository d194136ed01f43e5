"""The tables of benchmarks.gpu, of whatever is known so far."""

import statistics
import time
from collections.abc import Mapping
from typing import Any

from benchmarks.table import markdown

Facts = dict[str, Any]


def times(found: Mapping[str, Facts], asked: int) -> list[list[object]]:
    """A row per way: seconds of its parts."""
    rows: list[list[object]] = []
    for name, known in found.items():
        steps = known.get("steps", [])
        parts = [shown(known.get(part)) for part in ("encode", "denoise", "decode")]
        rows.append([name, shown(step_seconds(known), 3), shown(steps[0] if steps else None, 3), *parts,
                     image(known, asked), shown(known.get("load")), remark(known, asked)])
    return rows


def image(known: Facts, asked: int) -> str:
    """Seconds of an image without loading; with a "~" where some of its steps were not made, and are added."""
    seconds, step, made = known.get("image"), step_seconds(known), len(known.get("steps", []))
    if seconds is None or made == asked:
        return shown(seconds)
    return "-" if step is None else f"~{seconds + step * (asked - made):.1f}"


def remark(known: Facts, asked: int) -> str:
    """How a way ended, and what there is to say of it."""
    made = len(known.get("steps", []))
    parts = [known["status"] if known["status"] != "made" else "", known.get("why", ""), *known.get("changes", ())]
    if 0 < made < asked:
        parts.append(f"{made} of {asked} steps")
    if "placed" in known:
        parts.append(f"transformer: {known['placed']['transformer']}{', with the table' if known['table'] else ''}")
    return "; ".join(part for part in parts if part).replace("|", "/")


def costs(found: Mapping[str, Facts], floors: Facts) -> list[list[object]]:
    """A row per way: peak bytes, bytes copied, and a step over each floor."""
    rates = floors.get("rates")
    rows: list[list[object]] = []
    for name, known in found.items():
        step, copied = step_seconds(known), known.get("copied") or {}
        into = copied.get("per step", {}).get("to card", 0)
        counted = [copied[part][way] / 1e9 if copied else None for part, way in (
            ("per step", "to card"), ("per image", "to card"), ("per image", "to host"))]
        over = None if step is None or rates is None else step * rates["operations"] / floors["operations"]
        # Below a megabyte a step it is no weights that cross.
        behind = None if step is None or rates is None or into < 10**6 else step * rates["bytes"] / into
        peak = known.get("peak")
        rows.append([name, shown(None if peak is None else peak / 2**30, 2), *(shown(part, 2) for part in counted),
                     shown(over, 2), shown(behind, 2)])
    return rows


def shown(value: float | None, digits: int = 1) -> str:
    """A number, or a "-" where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def tables(found: Mapping[str, Facts], floors: Facts, steps: int) -> str:
    """Both tables, with what they were measured on."""
    text = [f"{floors.get('card', 'an unknown card')}, {time.strftime('%Y-%m-%d')}, {steps} steps.", "", markdown(
        ["way", "s per step", "first step", "encode s", "denoise s", "decode s", "image s", "load s", "remark"],
        times(found, steps)), "", markdown(
        ["way", "peak GiB", "GB to the card per step", "per image", "GB to the host per image",
         "step over matmul floor", "over copy floor"], costs(found, floors))]
    if "rates" in floors:
        rates, work = floors["rates"], floors["operations"]
        text += ["", f"Floors of a step: {work / 1e12:.4g} TFLOP at {rates['operations'] / 1e12:.4g} TFLOP/s, "
                 f"{work / rates['operations']:.3g} s; bytes at {rates['bytes'] / 1e9:.3g} GB/s from pinned memory."]
    if (layers := floors.get("checkpoint", {}).get("text_layers", 24)) != 24:
        text += ["", f"The disk was too small for the whole checkpoint: T5 has {layers} of its 24 layers."]
    return "\n".join(text)

def step_seconds(known: Mapping[str, Any]) -> float | None:
    """The median of all steps but the first; None where there was no second one."""
    steps = known.get("steps", [])[1:]
    return statistics.median(steps) if steps else None
