"""Loading a denoiser beside reading its bytes: python -m benchmarks.load [--model FOLDER] [--device NAME].

Without a model, a FLUX transformer of 1.1 GB in bfloat16 is made of random numbers; without a device, it is loaded to
a simulated card, where every byte is copied as it would be to a real one. For the cold figures the files are dropped
from the page cache; for the prefetched ones they are then read ahead, as a run does while the stage before computes.
Each load begins as a stage does, with what was let go before given back to the system, and its time ends when all is
there: letting go of it does not count.
"""

import argparse
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.table import Figures, Raw, in_turns, markdown, median, spread, write
from runner import Job, Request, make_plan
from runner.engine.memory import Meter
from stages.loading.pinned_copy import READERS, PendingTensor, copy_to_devices
from stages.loading.readahead import reading_ahead
from stages.models.safetensors_header import read_header
from stages.models.weights import StoredTensor

PIECE = 8 * 2**20
HEAD = ["", "cold s", "cold / dd", "hot s", "hot / into memory", "prefetched s", "prefetched / into memory"]
# Holds in its block what it loaded on the way in.
Load = Callable[[], AbstractContextManager[object]]


def dropped(files: Sequence[Path]) -> None:
    """Have the system forget what it knows of the files."""
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def dd(files: Sequence[Path]) -> Iterator[None]:
    """The bytes as the system's tool reads them, 8 MiB at a time, always into the same memory."""
    for file in files:
        subprocess.run(["dd", f"if={file}", "of=/dev/null", f"bs={PIECE}"], check=True, capture_output=True)
    yield


@contextmanager
def into_memory(files: Sequence[Path], threads: int = 1) -> Iterator[list[torch.Tensor]]:
    """The bytes read into as much memory of their own, as every loader has to, each thread its part of a file."""
    whole = [torch.empty(file.stat().st_size, dtype=torch.uint8) for file in files]
    with ThreadPoolExecutor(threads) as pool:
        for file, memory in zip(files, whole, strict=True):
            share = -(-len(memory) // threads)
            list(pool.map(partial(filled, file), range(0, len(memory), share), memory.split(share)))
    yield whole


def filled(file: Path, start: int, memory: torch.Tensor) -> None:
    """Read the file's bytes from `start` on into all of the memory."""
    left = memory.numpy().data
    with file.open("rb", buffering=0) as opened:
        opened.seek(start)
        while count := opened.readinto(left[:PIECE]):
            left = left[count:]


@contextmanager
def to_card(files: Sequence[Path], device: str) -> Iterator[list[PendingTensor]]:
    """The bytes of every tensor sent to a card as ours sends them, with no model made."""
    sent = [PendingTensor(StoredTensor(file, name, entry), torch.uint8,
                          torch.empty(entry.bytes, dtype=torch.uint8, device=device))
            for file in files for name, entry in read_header(file).items()]
    copy_to_devices(sent)
    yield sent


@contextmanager
def stock(folder: Path, dtype: torch.dtype, device: str) -> Iterator[Any]:
    """The denoiser by the library alone, straight to the device."""
    from diffusers import AutoModel

    yield AutoModel.from_pretrained(str(folder), torch_dtype=dtype, device_map={"": device})


def measured(files: Sequence[Path], load: Load, patience: float, meter: Meter) -> Figures:
    """Seconds to load cold, then hot, then cold but read ahead of while something else went on."""
    found: dict[str, float] = {}
    dropped(files)
    found["cold"] = seconds(load, meter)
    found["hot"] = seconds(load, meter)
    dropped(files)
    with reading_ahead(files):
        time.sleep(patience)
    found["prefetched"] = seconds(load, meter)
    return found


def seconds(load: Load, meter: Meter) -> float:
    """How long it takes until all is loaded."""
    meter.flush()
    with ExitStack() as stack:
        begin = time.perf_counter()
        stack.enter_context(load())
        return time.perf_counter() - begin


def shown(raw: Raw) -> str:
    """The Markdown table."""
    rows = []
    for way in raw:
        cold, hot, ahead = (median(raw, way, figure) for figure in ("cold", "hot", "prefetched"))
        rows.append([way, spread(raw, way, "cold", 1.0, 2), f"{cold / median(raw, 'dd', 'cold'):.2f}",
                     spread(raw, way, "hot", 1.0, 2), f"{hot / median(raw, 'into memory', 'hot'):.2f}",
                     spread(raw, way, "prefetched", 1.0, 2),
                     f"{ahead / median(raw, 'into memory', 'prefetched'):.2f}"])
    return markdown(HEAD, rows)


def main() -> None:
    """Load every way in turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--device")
    parser.add_argument("--heads", type=int, default=64, help="width of the model that is made, in heads of 16")
    parser.add_argument("--patience", type=float, default=5.0, help="seconds that the stage before computes")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="file for the raw figures")
    said = parser.parse_args()
    if said.device is None:
        from tests import sim

        sim.configure([16_000_000_000])
    with tempfile.TemporaryDirectory(dir=".") as made:
        model, device, dtype = said.model or halved(Path(made), said.heads), said.device or "sim:0", torch.bfloat16
        request = Request("a red circle", 64, 64, 1, 3.5, 1, 32)
        plan = make_plan(Job("flux", [request], model=model, devices=[device], dtype={"": dtype},
                             modulation_table=False))
        files = plan.checkpoint.components["transformer"].files
        loads: dict[str, Load] = {
            "dd": partial(dd, files), "into memory": partial(into_memory, files),
            f"into memory, {READERS} threads": partial(into_memory, files, READERS),
            "from_pretrained": partial(stock, model / "transformer", dtype, device),
            "ours": partial(plan.stages[1].loaded, {"transformer": plan.places["denoise", "transformer"]}),
        }
        if device != "cpu":
            loads["ours, without a model"] = partial(to_card, files, device)
        size = sum(file.stat().st_size for file in files)
        raw = in_turns({way: partial(measured, files, load, said.patience, Meter([device]))
                        for way, load in loads.items()}, said.repeats)
    print(f"{shown(raw)}\n\n{size / 1e9:.2f} GB to {device}, in {READERS} threads if it is a card; a stage of "
          f"{said.patience:.0f} s before.")
    write(said.json, raw, bytes=size, device=device, patience=said.patience)


def halved(folder: Path, heads: int) -> Path:
    """A FLUX of random numbers with its transformer in bfloat16."""
    from diffusers import AutoModel

    from tests.tiny import flux

    model = flux(folder / "flux", doubles=8, singles=16, heads=heads)
    whole = AutoModel.from_pretrained(str(model / "transformer"), torch_dtype=torch.bfloat16)
    whole.save_pretrained(model / "transformer")
    return model


if __name__ == "__main__":
    main()
