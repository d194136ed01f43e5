"""The host's memory, as far as the control groups around this process leave it: a container's limit, a batch job's."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

PROC = Path("/proc/self/cgroup")
MOUNT = Path("/sys/fs/cgroup")


def host_memory() -> tuple[int, int]:
    """The host's total and free bytes, no more than the container's limit leaves."""
    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    for limit, left in cgroup_limits():
        total, free = min(total, limit), min(free, left)
    return total, free


@dataclass(frozen=True)
class _Layout:
    """Where a version of control groups keeps what it knows of a group's memory."""

    mount: str
    """The folder of its hierarchy below the mount point."""
    limit: str
    """The file with the most bytes that the group may use."""
    used: str
    """The file with the bytes that it uses."""
    cached: tuple[str, str]
    """The entries of `memory.stat` with the bytes of cached files."""


_LAYOUTS = {
    2: _Layout("", "memory.max", "memory.current", ("active_file", "inactive_file")),
    1: _Layout("memory", "memory.limit_in_bytes", "memory.usage_in_bytes",
               ("total_active_file", "total_inactive_file")),
}


def cgroup_limits(proc: Path = PROC, mount: Path = MOUNT) -> Iterator[tuple[int, int]]:
    """Limit and free bytes of each limited control group that the process is in, from its own outwards."""
    if not proc.is_file():
        return
    for line in proc.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        layout = _LAYOUTS[1 if controllers else 2]
        root, inside = mount / layout.mount, Path(path.lstrip("/"))
        # Inside a container the path may be the host's, of which only the root is to be seen.
        for group in (inside, *inside.parents):
            if (root / group / layout.limit).is_file() and (found := _limit(root / group, layout)):
                yield found


def _limit(folder: Path, layout: _Layout) -> tuple[int, int] | None:
    text = (folder / layout.limit).read_text().strip()
    if text == "max":
        return None
    # What was read of files counts as used and is given up when memory is short: after a download it is all there is.
    facts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    used = int((folder / layout.used).read_text()) - sum(int(facts.get(name, 0)) for name in layout.cached)
    return int(text), min(int(text), max(0, int(text) - used))
