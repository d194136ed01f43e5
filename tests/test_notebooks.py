"""The notebooks run from top to bottom, with the demo and with FLUX on two cards; they have no outputs in them."""

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import pytest
from IPython.core.displaypub import CapturingDisplayPublisher
from IPython.core.interactiveshell import InteractiveShell
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode

from runner import Job, Request, make_plan
from stages.families import FAMILIES
from stages.machine import Device, Machine
from tests import sparse, tiny

Cards = Callable[..., list[str]]

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# What must hold after the last cell, on any machine and with any model.
CHECKS = {
    "01_first_picture": """
        assert [stage.reused for stage in fewer.stages] == [1, 0, 0] and fewer.pictures[0].pixels.any()
        assert [stage.reused for stage in again.stages] == [1, 1, 1]
        assert not (again.pictures[0].pixels - report.pictures[0].pixels).any()
    """,
    "02_stage_by_stage": """
        assert change.any() and not (pictures[1].values["pixels"] - other[1].values["pixels"]).any()
        assert not torch.equal(mixed[0].values["latents"], latents) and torch.equal(*(
            each.values["latents"] for each in (mixed[1], heart)))
    """,
    "03_where_memory_goes": """
        assert same == [True, True] and plan.savings["transformer"].layers
        assert sum(need.weights for need in plan.needs["denoise"].values()) < 0.8 * sum(
            need.weights for need in whole.needs["denoise"].values())
        assert [row.stage for row in without_table.rows][:: len(plan.devices)] == ["encode", "denoise", "decode"]
    """,
    "04_many_prompts": """
        assert finished < 4 and store.load_run(run)["status"] == "interrupted"
        assert resumed and all(0 < step < STEPS for step in resumed.values())
        assert report.stages[0].reused == 4 and report.stages[1].reused == finished and differences == [0, 0, 0, 0]
        assert plan.lanes == 2 and report.stages[1].lanes == 2
    """,
    "05_distributed": """
        assert differences == 6 * [0] and again.stages[1].reused == 1 and not any(map(lives, pids))
        assert len(set(pids)) == 2 and os.getpid() not in pids
    """,
}


def code(notebook: NotebookNode) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def check(path: Path) -> str:
    return "\n".join(line.strip() for line in CHECKS[path.stem].splitlines()).replace("(\n", "(")


@pytest.fixture
def sockets() -> Iterator[str]:
    """A short path for the sockets of a kernel: ports of their own choice may be taken by the next kernel."""
    with tempfile.TemporaryDirectory(prefix="nb") as folder:
        yield f"{folder}/k"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_runs_in_order_with_the_demo(
    path: Path, tmp_path: Path, sockets: str, request: pytest.FixtureRequest
) -> None:
    if path.stem == "05_distributed":
        request.getfixturevalue("ray_alone")
    notebook = nbformat.read(path, 4)
    notebook.cells.append(nbformat.v4.new_code_cell(check(path)))
    kernel = AsyncKernelManager(kernel_name="python3", transport="ipc", ip=sockets)
    # Patient with a busy machine, also where it would be by itself: at the start, and for what a cell shows.
    client = NotebookClient(notebook, km=kernel, timeout=250, startup_timeout=250, iopub_timeout=60,
                            shutdown_kernel="immediate", resources={"metadata": {"path": str(tmp_path)}})
    # A history of its own: kernels share that of the user, and its lock.
    own = {"PYTHONPATH": str(ROOT), "IPYTHONDIR": str(tmp_path / "ipython")}
    client.execute(cleanup_kc=True, env=os.environ | own)
    assert not kernel.has_kernel
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("<table" in output.get("data", {}).get("text/html", "") for output in shown)
    assert not [output for output in shown if output.output_type == "error"]


@pytest.fixture
def shell() -> Iterator[InteractiveShell]:
    """A shell as a notebook has one, in this process."""
    shell = InteractiveShell.instance()
    shell.display_pub = CapturingDisplayPublisher(parent=shell, shell=shell)
    yield shell
    shell.reset()
    InteractiveShell.clear_instance()


def switched(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Have the environment that the cell which switches the model asks for, until the test is over."""
    for name, value in (("HF_HOME", str(folder)), ("HF_TOKEN", "no token"), ("TRANSFORMERS_VERBOSITY", "error")):
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLUX whose transformer neither card of the test has room for."""
    return tiny.flux(tmp_path_factory.mktemp("models") / "flux", doubles=6, singles=12, heads=7)


# All but that with ranks: they are other processes, and those have no simulated cards.
@pytest.mark.parametrize("path", [*(pytest.param(path, marks=pytest.mark.slow) for path in NOTEBOOKS[:3]),
                                  NOTEBOOKS[3]], ids=lambda path: path.stem)
def test_every_cell_runs_with_flux_on_two_cards(
    path: Path, model: Path, tmp_path: Path, cards: Cards, shell: InteractiveShell, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = cards(12_000_000, 12_000_000)
    # The attention among 512 tokens would take more than the weights of so small a model.
    monkeypatch.setitem(FAMILIES, "flux", replace(FAMILIES["flux"], text_tokens=32))
    monkeypatch.chdir(tmp_path)
    switched(monkeypatch, tmp_path)
    switch, *cells = code(nbformat.read(path, 4))
    assert switch.count("FLUX = False") == 1
    small = f"MODEL, SIZE, STEPS = {str(model)!r}, (64, 48), 2"
    for cell in (switch.replace("FLUX = False", "FLUX = True"), small, *cells, check(path)):
        shell.run_cell(cell).raise_error()
    assert shell.user_ns["FAMILY"] == "flux" and shell.user_ns["plan"].devices == tuple(devices)


def test_flux_as_the_notebooks_ask_for_it_fits_a_service_with_two_t4(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    switched(monkeypatch, tmp_path)
    asked: dict[str, Any] = {}
    for path in NOTEBOOKS:
        exec(code(nbformat.read(path, 4))[0].replace("FLUX = False", "FLUX = True"), asked)
        assert (asked["FAMILY"], asked["MODEL"], asked["SIZE"]) == ("flux", None, (1024, 1024))
    model = sparse.flux_dev(tmp_path / "flux")
    requests = [Request("a fox", *asked["SIZE"], 4, 3.5, seed, 512, seed) for seed in range(2)]
    # A T4 has 14.7 GiB and no bfloat16; the service has 30 GiB of host memory.
    card = Device("cuda:0", int(14.7 * 2**30), int(14.6 * 2**30), bfloat16=False)
    two = Machine((card, replace(card, name="cuda:1")), 30 * 2**30, 28 * 2**30, here=False)
    # What takes most: two lanes and no table; and a rank with a card of its own.
    job = make_plan(Job("flux", requests, model=model, modulation_table=False, lanes=2), machine=two)
    assert {device for need in job.needs.values() for device in need} == {"cuda:0", "cuda:1"}
    alone = replace(two, devices=(card,), host_free=14 * 2**30)
    assert "cpu" in make_plan(Job("flux", requests, model=model, allow_offload="cpu"), machine=alone).needs["denoise"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_outputs_are_committed(path: Path) -> None:
    cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    assert cells and all(cell.outputs == [] and cell.execution_count is None for cell in cells)
