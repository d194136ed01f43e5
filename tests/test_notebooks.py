"""The notebooks run from top to bottom, with the demo and with FLUX on two cards; they have no outputs in them."""

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
from IPython.core.displaypub import CapturingDisplayPublisher
from IPython.core.interactiveshell import InteractiveShell
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode

from stages.families import FAMILIES
from tests import tiny

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
        assert same == [True, True] and job.savings["transformer"].layers
        assert sum(need.weights for need in job.needs["denoise"].values()) < 0.8 * sum(
            need.weights for need in whole.needs["denoise"].values())
        assert [row.stage for row in without_table.rows][:: len(job.devices)] == ["encode", "denoise", "decode"]
    """,
    "04_many_prompts": """
        assert finished < 4 and store.load_run(run)["status"] == "interrupted"
        assert rejoined and all(0 < step < STEPS for step in rejoined.values())
        assert report.stages[0].reused == 4 and report.stages[1].reused == finished and differences == [0, 0, 0, 0]
        assert job.lanes == 2 and report.stages[1].lanes == 2
    """,
    "05_distributed": """
        assert differences == [0, 0, 0] and again.stages[1].reused == 1 and not any(map(lives, pids))
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
def test_every_cell_runs_in_order_with_the_demo(path: Path, tmp_path: Path, sockets: str) -> None:
    notebook = nbformat.read(path, 4)
    notebook.cells.append(nbformat.v4.new_code_cell(check(path)))
    kernel = AsyncKernelManager(kernel_name="python3", transport="ipc", ip=sockets)
    client = NotebookClient(notebook, km=kernel, timeout=250, shutdown_kernel="immediate",
                            resources={"metadata": {"path": str(tmp_path)}})
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


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLUX whose transformer neither card of the test has room for."""
    return tiny.flux(tmp_path_factory.mktemp("models") / "flux", doubles=6, singles=12, heads=7)


# All but that with ranks: they are other processes, and those have no simulated cards.
@pytest.mark.parametrize("path", NOTEBOOKS[:4], ids=lambda path: path.stem)
def test_every_cell_runs_with_flux_on_two_cards(
    path: Path, model: Path, tmp_path: Path, cards: Cards, shell: InteractiveShell, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = cards(12_000_000, 12_000_000)
    # The attention among 512 tokens would take more than the weights of so small a model.
    monkeypatch.setitem(FAMILIES, "flux", replace(FAMILIES["flux"], text_tokens=32))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "of no use here")
    switch, *cells = code(nbformat.read(path, 4))
    assert switch.count("FLUX = False") == 1
    small = f"MODEL, SIZE, STEPS = {str(model)!r}, (64, 48), 2"
    for cell in (switch.replace("FLUX = False", "FLUX = True"), small, *cells, check(path)):
        shell.run_cell(cell).raise_error()
    assert shell.user_ns["FAMILY"] == "flux" and shell.user_ns["job"].devices == tuple(devices)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_outputs_are_committed(path: Path) -> None:
    cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    assert cells and all(cell.outputs == [] and cell.execution_count is None for cell in cells)
