"""What the control groups around a process leave it of the host's memory: a container's limit, a batch job's."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc/self/cgroup")
MOUNT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class _Files:
    """Where a version of control groups keeps the limit, the use, and in `memory.stat` the bytes of cached files."""

    mount: str
    limit: str
    used: str
    cached: tuple[str, str]


_FILES = {
    2: _Files("", "memory.max", "memory.current", ("active_file", "inactive_file")),
    1: _Files("memory", "memory.limit_in_bytes", "memory.usage_in_bytes",
              ("total_active_file", "total_inactive_file")),
}


def limits(proc: Path = PROC, mount: Path = MOUNT) -> Iterator[tuple[int, int]]:
    """Limit and free bytes of each limited control group that the process is in, from its own outwards."""
    if not proc.is_file():
        return
    for line in proc.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        files = _FILES[1 if controllers else 2]
        root, inside = mount / files.mount, Path(path.lstrip("/"))
        # Inside a container the path may be the host's, of which only the root is to be seen.
        for group in (inside, *inside.parents):
            if (root / group / files.limit).is_file() and (found := _limit(root / group, files)):
                yield found


def _limit(folder: Path, files: _Files) -> tuple[int, int] | None:
    text = (folder / files.limit).read_text().strip()
    if text == "max":
        return None
    # What was read of files counts as used and is given up when memory is short: after a download it is all there is.
    facts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    used = int((folder / files.used).read_text()) - sum(int(facts.get(name, 0)) for name in files.cached)
    return int(text), min(int(text), max(0, int(text) - used))
