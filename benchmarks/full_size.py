"""A FLUX.1-dev checkpoint of random numbers: the real configs, names and sizes, 34 GB in bfloat16."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

GB = 10**9
# Bytes of everything but T5's layers, of one of those, and what the disk keeps besides.
REST, LAYER, LEFT = 24_600_000_000, 386_000_000, 2 * GB
LAYERS = 24
WRITERS = 4
CHUNK = 256 * 2**20
DONE = "filled.json"


def build(folder: Path, device: str) -> dict[str, Any]:
    """Make the checkpoint in `folder`, unless it is there already; its bytes and T5's layers.

    Where the disk is small T5 gets fewer layers than its 24; ValueError where even one of them does not fit.
    """
    done = folder / DONE
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # What an unfinished one takes is written over.
        taken = sum(file.stat().st_blocks * 512 for file in weights(folder))
        layers = text_layers(shutil.disk_usage(folder).free + taken)
        from tests.sparse import flux_dev

        flux_dev(folder, text_layers=layers)
        size = fill(folder, device)
        done.write_text(json.dumps({"bytes": size, "text_layers": layers}))
    facts: dict[str, Any] = json.loads(done.read_text())
    return facts


def text_layers(free: int) -> int:
    """How many of T5's layers fit on a disk with so many bytes free; ValueError for none."""
    layers = min(LAYERS, (free - LEFT - REST) // LAYER)
    if layers < 1:
        raise ValueError(f"the disk has {free / GB:.1f} GB free, and with one of T5's layers the checkpoint takes "
                         f"{(REST + LAYER) / GB:.1f} GB and leaves {LEFT / GB:.0f} -> --folder on another disk")
    return layers


def weights(folder: Path) -> list[Path]:
    """The files of weights, largest first."""
    return sorted(folder.rglob("*.safetensors"), key=lambda path: -path.stat().st_size)


def fill(folder: Path, device: str, chunk: int = CHUNK) -> int:
    """Write random numbers over the data of every file of weights, made on `device`; the bytes written."""
    with ThreadPoolExecutor(WRITERS) as pool:
        return sum(pool.map(lambda numbered: overwrite(numbered[1], device, numbered[0], chunk),
                            enumerate(weights(folder))))


def overwrite(path: Path, device: str, seed: int, chunk: int = CHUNK) -> int:
    """Write random numbers over the data of a safetensors file, in the order of the file; the bytes written."""
    import torch

    kinds = {"BF16": torch.bfloat16, "F32": torch.float32}
    numbers = torch.Generator(device).manual_seed(seed)
    written = 0
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = {name: entry for name, entry in json.loads(file.read(length)).items() if name != "__metadata__"}
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"][0]):
            begin, end = entry["data_offsets"]
            kind = kinds[entry["dtype"]]
            file.seek(8 + length + begin)
            for at in range(begin, end, chunk):
                count = (min(end, at + chunk) - at) // kind.itemsize
                written += file.write(content(name, entry["shape"], count, numbers, kind, device))
    return written


def content(
    name: str, shape: list[int], count: int, numbers: "torch.Generator", kind: "torch.dtype", device: str
) -> memoryview:
    """`count` numbers of a tensor: around 1 where they scale what a norm made, around 0 elsewhere."""
    import torch

    made = torch.randn(count, generator=numbers, dtype=kind, device=device) * 0.02
    if len(shape) == 1 and name.endswith("weight"):
        made += 1
    return made.cpu().view(torch.uint8).numpy().data
