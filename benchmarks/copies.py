"""Bytes that cross between the host and a card, as torch's profiler sees them."""

import json
import tempfile
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

WAYS = {"Memcpy HtoD": "to card", "Memcpy DtoH": "to host"}


def counter() -> Callable[[Callable[[], object]], dict[str, int]] | None:
    """What tells the bytes that some work copies; None where the profiler does not see a card's copies."""
    from torch.profiler import ProfilerActivity, supported_activities

    watch = [kind for kind in (ProfilerActivity.CUDA, ProfilerActivity.XPU) if kind in supported_activities()]
    return partial(watched, watch=watch) if watch else None


def watched(work: Callable[[], object], watch: Collection[Any]) -> dict[str, int]:
    """The bytes that `work` copies each way, under the profiler."""
    import torch
    from torch.profiler import profile

    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        with profile(activities=watch) as seen:
            work()
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
        seen.export_chrome_trace(str(trace))
        return copied(json.loads(trace.read_text(errors="replace"), strict=False))


def copied(trace: Mapping[str, Any]) -> dict[str, int]:
    """Bytes each way in a Chrome trace of the profiler's."""
    found: dict[str, int] = {}
    for event in trace["traceEvents"]:
        # "Memcpy HtoD (Pageable -> Device)"
        way = next((way for start, way in WAYS.items() if str(event.get("name", "")).startswith(start)), None)
        if way is not None and event.get("ph") == "X":
            found[way] = found.get(way, 0) + int(event["args"]["bytes"])
    return found


def extended(one: Mapping[str, int], two: Mapping[str, int], steps: int) -> dict[str, dict[str, int]]:
    """Bytes each way "per step" and "per image" of so many steps, on the line through images of one and two steps."""
    step = {way: two.get(way, 0) - one.get(way, 0) for way in WAYS.values()}
    return {"per step": step, "per image": {way: one.get(way, 0) + step[way] * (steps - 1) for way in step}}
