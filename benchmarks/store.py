"""What handing a state over costs: python -m benchmarks.store [--folder DIR] [--runs N].

Each state of a FLUX.1 request at 1024x1024 is stored and read by the folder store, beside a plain durable copy of
the same bytes (write, fsync, rename, fsync of the folder; then read), that copy with a sha256 of the bytes when they
are written and when they are read, the same with a second small file in a folder of its own, as a manifest is, and
torch.save with torch.load. Then a store is filled with runs, and looked up in.
"""

import argparse
import hashlib
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.table import Figures, Raw, in_turns, markdown, median, spread, write

if TYPE_CHECKING:
    from runner.artifacts import FolderStore
    from stages.state import State

Lookups = Mapping[str, Callable[[], object]]


def states(most: int) -> "dict[str, State]":
    """The states of FLUX.1 in bfloat16, and one of `most` bytes."""
    import torch

    from stages.state import State

    def full(*shape: int) -> torch.Tensor:
        return torch.randn(shape).to(torch.bfloat16)

    return {
        "latents": State({"latents": full(1, 4096, 64)}),
        "embeddings": State({"prompt_embeds": full(1, 512, 4096), "pooled_prompt_embeds": full(1, 768)}),
        f"{most / 1e6:.0f} MB": State({"latents": full(most // 2)}),
    }


def ours(store: "FolderStore", state: "State") -> Figures:
    """Seconds of the store, from a state to a state."""
    key = secrets.token_hex(32)
    begin = time.perf_counter()
    store.put(key, "denoise", state, {})
    written = time.perf_counter()
    assert store.get(key) is not None
    read = time.perf_counter()
    store.drop(key)
    return {"write": written - begin, "read": read - written}


def copied(folder: Path, state: "State", *, hashed: bool = False, told: bool = False) -> Figures:
    """Seconds of a copy that is on the disk when it is done, of as many bytes; and of their sha256 on either side.

    If `told`, a second file says so.
    """
    import torch

    data = b"".join(bytes(tensor.view(-1).view(torch.uint8).numpy()) for tensor in state.tensors().values())
    begin = time.perf_counter()
    digest = hashlib.sha256(data).digest() if hashed else b""
    durable(folder / "copy", data)
    if told:
        durable(folder / "manifests" / "copy", digest)
    written = time.perf_counter()
    assert not told or (folder / "manifests" / "copy").read_bytes() == digest
    found = (folder / "copy").read_bytes()
    assert len(found) == len(data)
    assert not hashed or hashlib.sha256(found).digest() == digest
    return {"write": written - begin, "read": time.perf_counter() - written}


def durable(path: Path, data: bytes) -> None:
    """Write a file so that it is on the disk, under its name."""
    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.rename(part, path)
    handle = os.open(path.parent, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def saved(folder: Path, state: "State") -> Figures:
    """Seconds of torch's own format, which nothing forces to the disk and nothing checks."""
    import torch

    begin = time.perf_counter()
    torch.save(dict(state.values), folder / "saved.pt")
    written = time.perf_counter()
    torch.load(folder / "saved.pt", weights_only=True)
    return {"write": written - begin, "read": time.perf_counter() - written}


def hand_over(folder: Path, state: "State", repeats: int) -> Raw:
    """The ways in turns."""
    from runner.artifacts import FolderStore

    store = FolderStore(folder / "store", warn=print)
    (folder / "manifests").mkdir(exist_ok=True)
    return in_turns({"store": lambda: ours(store, state), "durable copy": lambda: copied(folder, state),
                     "copy and sha256": lambda: copied(folder, state, hashed=True),
                     "copy, sha256 and manifest": lambda: copied(folder, state, hashed=True, told=True),
                     "torch.save": lambda: saved(folder, state)}, repeats)


def look_up(folder: Path, runs: int, repeats: int) -> Raw:
    """A store of so many runs with a manifest each, asked for this and that."""
    from runner.artifacts import FolderStore, key_of
    from runner.artifacts.manifest import Artifact, write_manifest
    from runner.artifacts.store import manifest_path

    store = FolderStore(folder / "many", warn=print)
    keys = [key_of({"run": run}) for run in range(runs)]
    for run, key in enumerate(keys):
        note = Artifact(key, "denoise", key, 1, {}, {})
        # Not durable, as filling the store is not what is measured.
        (store.path / manifest_path(key)).write_bytes(write_manifest(note))
        folder = store.path / "runs" / f"run-{run}"
        folder.mkdir()
        (folder / "run.json").write_bytes(record(run))
    ways: Lookups = {
        "one key that is there": lambda: store.find(keys[-1]), "one key that is not": lambda: store.find("0" * 64),
        "the record of a run": lambda: store.load_run(f"run-{runs - 1}"), "the names of all runs": store.runs,
    }
    return in_turns({name: lambda way=way: timed(way) for name, way in ways.items()}, repeats)


def record(run: int) -> bytes:
    """A record as a store writes it."""
    from runner.artifacts.signed_json import write_document

    return write_document({"sequence": run + 1, "begun": float(run), "record": {"status": "done"}})


def timed(way: Callable[[], object]) -> Figures:
    """Seconds of one call."""
    begin = time.perf_counter()
    way()
    return {"seconds": time.perf_counter() - begin}


def rows(name: str, raw: Raw) -> list[list[object]]:
    """A row per way; the last column is write and read together over the durable copy's."""
    def whole(way: str) -> float:
        return median(raw, way, "write") + median(raw, way, "read")

    return [[name, way, spread(raw, way, "write", 1e3), spread(raw, way, "read", 1e3),
             f"{whole(way) / whole('durable copy'):.2f}"] for way in raw]


def main() -> None:
    """Measure and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", help="where to write; the disk that is measured")
    parser.add_argument("--bytes", type=int, default=64_000_000, help="of the largest state")
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", help="file for the raw figures")
    said = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=said.folder) as folder:
        handed = {name: hand_over(Path(folder), state, said.repeats) for name, state in states(said.bytes).items()}
        asked = look_up(Path(folder), said.runs, said.repeats)
    print(markdown(["state", "way", "write ms", "read ms", "of a durable copy"],
                   [row for name, raw in handed.items() for row in rows(name, raw)]))
    print()
    print(markdown([f"in a store of {said.runs:,} runs", "ms"],
                   [[name, spread(asked, name, "seconds", 1e3, 2)] for name in asked]))
    write(said.json, {"hand-over": handed, "look-up": asked}, bytes=said.bytes, runs=said.runs)


if __name__ == "__main__":
    main()
