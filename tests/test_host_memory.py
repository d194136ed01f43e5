"""The host never holds two large components at once: the promise that lets a 30 GB host run a 34 GB model."""

import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from runner import Job, Request, make_plan
from runner.engine.memory import Meter
from runner.planning.describe import host_needs
from stages.loading.load import host_bytes_while_loading, load
from stages.loading.pinned_copy import PINNED_BYTES
from stages.models.skeleton import new_skeleton
from stages.models.weights import sources
from tests import tiny

Cards = Callable[..., list[str]]
ROOT = Path(__file__).parent.parent
MIB = 2**20
OVERHEAD = 64 * MIB


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose text encoder (188 MB) and transformer (242 MB) show in the memory of a process."""
    folder = tmp_path_factory.mktemp("large") / "flux"
    return tiny.flux(folder, text=512, text_layers=30, heads=32, doubles=4, singles=6)


def weight(model: Path, component: str) -> int:
    return sum(file.stat().st_size for file in (model / component).glob("*.safetensors"))


def test_peak_of_a_run_is_its_largest_component(large: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "runner", "flux", "--model", str(large), "--prompt", "a red circle", "--size", "64x64",
        "--steps", "1", "--seed", "1", "--device", "cpu", "--json", "--artifacts", str(tmp_path / "store"),
        "--out", str(tmp_path / "picture.png"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    peak = {stage["stage"]: stage["peak"]["cpu"] for stage in json.loads(done.stdout)["stages"]}
    encoder, transformer = weight(large, "text_encoder_2"), weight(large, "transformer")
    # What the process has besides its components: the decode stage, whose VAE weighs next to nothing.
    bare = peak["decode"]
    print({stage: f"{bytes / MIB:.0f} MiB" for stage, bytes in peak.items()}, f"components {encoder} {transformer}")
    assert transformer > 3 * OVERHEAD and encoder > 2 * OVERHEAD
    assert encoder * 0.9 < peak["encode"] - bare < encoder + OVERHEAD
    # Without the layers that the modulation table stands in for, which are a quarter of a transformer.
    assert transformer * 0.6 < peak["denoise"] - bare < transformer + OVERHEAD


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_loading_stays_under_the_plans_figure(large: Path, cards: Cards, sim: ModuleType, dtype: torch.dtype) -> None:
    """A third of the transformer waits in host memory; the simulated card's own memory is the host's, too."""
    devices = cards(165 * MIB * dtype.itemsize // 4 + 35 * MIB)
    request = Request("a red circle", 64, 64, 1, 3.5, 1, 32)
    job = make_plan(Job("flux", [request], model=large, devices=devices, dtype={"": dtype}, allow_offload="cpu",
                        modulation_table=False))
    figures = host_needs(job)
    assert figures["denoise"].held > 20 * MIB and figures["decode"].held == 0
    for stage in job.stages[:2]:
        Meter(["cpu"]).flush()
        before = resident()
        meter = Meter(["cpu", *devices])
        with stage.loaded(job.places_of(stage.name)):
            peak = meter.peak()
        gc.collect()
        print(stage.name, figures[stage.name], {name: bytes // MIB for name, bytes in peak.items()}, before // MIB)
        # Threads read and convert the weights, each with some of its own; another whole component would be 188 MiB.
        assert peak["cpu"] - before - peak[devices[0]] < figures[stage.name].loading + 2 * OVERHEAD


def test_a_denoiser_is_read_once_through_little_host_memory(large: Path, cards: Cards) -> None:
    """The layers that the modulation table stands in for are not read at all."""
    devices = cards(2**30)
    request = Request("a red circle", 64, 64, 1, 3.5, 1, 32)
    job = make_plan(Job("flux", [request], model=large, devices=devices, dtype={"": torch.float32}))
    (component,), place = job.stages[1].components, job.places["denoise", "transformer"]
    layers = {f"{layer}.{kind}" for layer in place.precomputed for kind in ("weight", "bias")}
    found = sources(component, new_skeleton(component))
    stored = {name: source.entry.bytes for name, source in found.items() if source}
    wanted = sum(size for name, size in stored.items() if name not in layers)
    assert wanted == job.weights["denoise", "transformer"].total < sum(stored.values()) - 32 * MIB
    assert host_bytes_while_loading(component, place.placement) == PINNED_BYTES < 32 * MIB
    for _ in range(2):
        # The first time Python's own files are read, too.
        Meter(["cpu"]).flush()
        before, meter, read = resident(), Meter(["cpu", *devices]), read_so_far()
        model = load(component, place)
        read, peak = read_so_far() - read, meter.peak()
        del model
    assert wanted <= read < wanted + MIB
    assert peak["cpu"] - before - peak[devices[0]] < PINNED_BYTES + OVERHEAD


def read_so_far() -> int:
    """Bytes that this process has read from files; pages of mapped ones do not count."""
    return int(Path("/proc/self/io").read_text().split()[1])


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
