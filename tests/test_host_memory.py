"""The host never holds two large components at once: the promise that lets a 30 GB host run a 34 GB model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny

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
