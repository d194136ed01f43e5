"""The host's free memory under the limits of control groups, as files of both of their versions tell them."""

from pathlib import Path

import pytest

from stages import host_memory
from stages.host_memory import cgroup_limits

GIB = 2**30


def group(folder: Path, limit: str, used: int, cached: int, *, version: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    total = "" if version == 2 else "total_"
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(
        f"anon {used - cached}\n{total}inactive_file {cached // 4}\n{total}active_file {cached - cached // 4}\n")


@pytest.mark.parametrize("version", [1, 2])
def test_cached_files_are_free_and_every_group_around_counts(tmp_path: Path, version: int) -> None:
    proc, mount = tmp_path / "cgroup", tmp_path / "fs"
    root = mount if version == 2 else mount / "memory"
    proc.write_text("0::/batch/job\n" if version == 2 else "9:name=systemd:/\n4:memory:/batch/job\n0::/\n")
    # After a download the cache fills the container: 29 of 30 GiB are used, and 27 of those are files.
    group(root / "batch/job", str(30 * GIB), 29 * GIB, 27 * GIB, version=version)
    group(root / "batch", str(64 * GIB), 40 * GIB, 10 * GIB, version=version)
    assert list(cgroup_limits(proc, mount)) == [(30 * GIB, 28 * GIB), (64 * GIB, 34 * GIB)]


@pytest.mark.parametrize("path", ["/", "/docker/0123"])
def test_a_container_sees_its_own_group_at_the_root(tmp_path: Path, path: str) -> None:
    (tmp_path / "cgroup").write_text(f"0::{path}\n")
    group(tmp_path / "fs", str(8 * GIB), 5 * GIB, GIB, version=2)
    assert list(cgroup_limits(tmp_path / "cgroup", tmp_path / "fs")) == [(8 * GIB, 4 * GIB)]
    group(tmp_path / "fs", "max", 5 * GIB, GIB, version=2)
    assert list(cgroup_limits(tmp_path / "cgroup", tmp_path / "fs")) == []
    assert list(cgroup_limits(tmp_path / "none", tmp_path / "fs")) == []


def test_the_machine_has_no_more_than_its_groups_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "cgroup_limits", lambda: iter([(6 * GIB, GIB), (5 * GIB, 2 * GIB)]))
    total, free = host_memory.host_memory()
    assert total == 5 * GIB and 0 < free <= GIB
