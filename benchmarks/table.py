"""What the benchmarks share: peers measured in turns, Markdown tables, and a JSON file with every raw figure."""

import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy", "fsspec")
Figures = Mapping[str, float]
Raw = dict[str, list[dict[str, float]]]


def in_turns(ways: Mapping[str, Callable[[], Figures]], repeats: int, *, warm: int = 1) -> Raw:
    """Measure each way `repeats` times, A B C A B C, so that a busy machine harms all alike; `warm` rounds are not
    kept. Each way returns its figures by name.
    """
    raw: Raw = {name: [] for name in ways}
    for turn in range(warm + repeats):
        for name, way in ways.items():
            figures = dict(way())
            if turn >= warm:
                raw[name].append(figures)
    return raw


def median(raw: Raw, way: str, figure: str) -> float:
    """The median of one figure."""
    return statistics.median(found[figure] for found in raw[way])


def spread(raw: Raw, way: str, figure: str, scale: float = 1.0, digits: int = 1) -> str:
    """One figure as "median (min to max)", times `scale`."""
    values = [found[figure] * scale for found in raw[way]]
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; the first column is text, the others are aligned to the right."""
    marks = ["---", *(["---:"] * (len(head) - 1))]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (head, marks, *rows))


def machine() -> dict[str, object]:
    """What the figures were measured on, and with which versions."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = {name: found for name in PACKAGES if (found := _version(name))}
    return {
        "system": f"{platform.system()} {platform.release()}", "processor": names[0] if names else platform.machine(),
        "cores": cores, "load": os.getloadavg()[0], "cards": cards(),
        "versions": {"python": platform.python_version(), **versions},
    }


def cards() -> list[str]:
    """What this machine computes on, where torch is imported."""
    if "torch" not in sys.modules:
        return []
    from stages.machine import probe

    return [f"{device.name} {device.label}".strip() for device in probe().devices]


def write(path: str | None, raw: object, **facts: object) -> None:
    """Write the raw figures and what they were measured on to a JSON file, if one was asked for."""
    if path is not None:
        document = {"machine": machine(), **facts, "raw": raw}
        Path(path).write_text(json.dumps(document, indent=1) + "\n")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
