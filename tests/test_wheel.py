"""What is installed: the packages with their types, the demo checkpoint byte for byte, and nothing of a checkout."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from runner.demo import CHECKPOINT, LATENT_RGB

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of this checkout, built from a copy: a build leaves files beside its sources."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("runner", "stages", "stagerun", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    code = "import setuptools.build_meta; print(setuptools.build_meta.build_wheel('dist'))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert told.returncode == 0, told.stderr
    return zipfile.ZipFile(folder / "dist" / told.stdout.splitlines()[-1])


def test_the_packages_and_their_types_are_in_it_and_no_tools(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"runner", "stages", "stagerun"}
    assert {"runner/py.typed", "stages/py.typed", "stagerun/py.typed"} <= set(names)
    sources = {path.relative_to(ROOT).as_posix() for package in ("runner", "stages", "stagerun")
               for path in (ROOT / package).rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources


def test_the_demo_is_in_it_whole(wheel: zipfile.ZipFile) -> None:
    files = [path for path in CHECKPOINT.rglob("*") if path.is_file()] + [LATENT_RGB]
    assert len(files) > 10
    for path in files:
        assert wheel.read(path.relative_to(ROOT).as_posix()) == path.read_bytes(), path


def test_the_shapes_are_in_it_and_take_little(wheel: zipfile.ZipFile) -> None:
    there = {name: wheel.getinfo(name).compress_size for name in wheel.namelist() if name.endswith(".json.xz")}
    kept = {path.relative_to(ROOT).as_posix() for path in (ROOT / "stages" / "models" / "shipped").iterdir()}
    assert there.keys() == kept and len(kept) == 8 and sum(there.values()) < 100_000
