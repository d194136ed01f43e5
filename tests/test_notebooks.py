"""The notebooks run from top to bottom, with the demo and with FLUX on two cards, and show what is stored in them."""

import ast
import copy
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nbformat
import pytest
from IPython.core.displaypub import CapturingDisplayPublisher
from IPython.core.interactiveshell import InteractiveShell
from nbformat import NotebookNode

import stagerun
from runner import Job, Request, make_plan
from stages.families import FAMILIES
from stages.machine import Device, Machine
from tests import sparse, tiny
from tools.notebooks import HIDDEN, NOTEBOOKS, clean, differences, execute, hidden

Cards = Callable[..., list[str]]

# What must hold after the last cell, on any machine and with any model.
CHECKS = {
    "01_first_picture": """
        assert [stage.reused for stage in fewer.report.stages] == [1, 0, 0] and fewer.images[0].getbbox()
        assert [stage.reused for stage in again.report.stages] == [1, 1, 1]
        assert again.images[0].tobytes() == result.images[0].tobytes()
    """,
    "02_stage_by_stage": """
        assert change.any() and pictures[1].tobytes() == others[1].tobytes()
        assert not torch.equal(mixed[0]["latents"], latents[0]["latents"]) and torch.equal(
            mixed[1]["latents"], latents[1]["latents"])
    """,
    "03_where_memory_goes": """
        assert same == [True, True] and plan.savings["transformer"].layers
        assert sum(need.weights for need in plan.needs["denoise"].values()) < 0.8 * sum(
            need.weights for need in whole_plan.needs["denoise"].values())
        assert [row.stage for row in without_table.rows][:: len(plan.devices)] == ["encode", "denoise", "decode"]
    """,
    "04_many_prompts": """
        assert pipe.store.load_run(run)["status"] == "interrupted"
        assert resumed and all(0 < step < STEPS for step in resumed.values())
        assert report.stages[0].reused == 4 and report.stages[1].reused < 4 and differences == [0, 0, 0, 0]
        assert plan.lanes == 2 and report.stages[1].lanes == 2
    """,
    "05_distributed": """
        import torch
        assert torch.get_num_threads() > 1 and differences == differences_from(by_ray) == 3 * [0]
        assert again.stages[1].reused == 1 and not any(map(lives, pids))
        assert len(set(pids)) == 2 and os.getpid() not in pids
    """,
}


ROOT = Path(__file__).parent.parent


def code(notebook: NotebookNode) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def check(path: Path) -> str:
    return "\n".join(line.strip() for line in CHECKS[path.stem].splitlines()).replace("(\n", "(")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_runs_in_order_with_the_demo_and_shows_what_is_stored(
    path: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Where what is stored is old, `python -m tools.notebooks` runs all of them and stores what they show."""
    if path.stem == "05_distributed":
        request.getfixturevalue("ray_alone")
    notebook = nbformat.read(path, 4)
    stored = copy.deepcopy(notebook)
    notebook.cells.append(nbformat.v4.new_code_cell(check(path)))
    execute(notebook, tmp_path, path.stem)
    del notebook.cells[-1]
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("<table" in output.get("data", {}).get("text/html", "") for output in shown)
    assert not [output for output in shown if output.output_type == "error"]
    clean(notebook)
    assert not differences(stored, notebook), "run python -m tools.notebooks"


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
    install, switch, *cells = code(nbformat.read(path, 4))
    assert switch.count("FLUX = False") == 1
    small = f"MODEL, SIDE, STEPS = {str(model)!r}, 64, 2"
    for cell in (install, switch.replace("FLUX = False", "FLUX = True"), small, *cells, check(path)):
        shell.run_cell(cell).raise_error()
    assert shell.user_ns["pipe"].family.name == "flux" and shell.user_ns["plan"].devices == tuple(devices)


def test_flux_as_the_notebooks_ask_for_it_fits_a_service_with_two_t4(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    switched(monkeypatch, tmp_path)
    asked: dict[str, Any] = {}
    for path in NOTEBOOKS:
        exec(code(nbformat.read(path, 4))[1].replace("FLUX = False", "FLUX = True"), asked)
        assert (asked["MODEL"], asked["SIDE"]) == ("flux", 1024)
    model = sparse.flux_dev(tmp_path / "flux")
    requests = [Request("a fox", asked["SIDE"], asked["SIDE"], 4, 3.5, seed, 512, seed) for seed in range(2)]
    # A T4 has 14.7 GiB and no bfloat16; the service has 30 GiB of host memory.
    card = Device("cuda:0", int(14.7 * 2**30), int(14.6 * 2**30), bfloat16=False)
    two = Machine((card, replace(card, name="cuda:1")), 30 * 2**30, 28 * 2**30, here=False)
    # What takes most: two lanes and no table; and a rank with a card of its own.
    job = make_plan(Job("flux", requests, model=model, modulation_table=False, lanes=2), machine=two)
    assert {device for need in job.needs.values() for device in need} == {"cuda:0", "cuda:1"}
    alone = replace(two, devices=(card,), host_free=14 * 2**30)
    assert "cpu" in make_plan(Job("flux", requests, model=model, allow_offload="cpu"), machine=alone).needs["denoise"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_stored_is_small_and_says_nothing_of_the_machine(path: Path) -> None:
    assert path.stat().st_size < 400_000
    notebook = nbformat.read(path, 4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert len(outputs) > 5 and not [output for output in outputs if output.get("name") == "stderr"]
    kinds = {kind for output in outputs for kind in output.get("data", ())}
    assert {"text/html", "text/plain"} <= kinds <= {"image/png", "text/html", "text/plain"}
    told = re.sub(r"[A-Za-z0-9+/=\\]{200,}", "", path.read_text())
    assert not re.search(r"/tmp|/home|/root|/work|\d{4}-?\d\d-?\d\d|\d s\b|peak cpu \d|0x[0-9a-f]{6}", told)
    again = copy.deepcopy(notebook)
    clean(again)
    assert again == notebook


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_badges_open_the_notebook_itself(path: Path) -> None:
    first = nbformat.read(path, 4).cells[0].source
    there = f"github.com/stagerun/stagerun/blob/main/notebooks/{path.name}"
    colab = f"](https://colab.research.google.com/{there.replace('.com', '', 1)})"
    assert colab in first and f"](https://kaggle.com/kernels/welcome?src=https://{there})" in first


def test_nothing_of_the_package_is_imported_but_stagerun() -> None:
    for path in NOTEBOOKS:
        assert not re.search(r"\b(from|import) (runner|stages|stagerun\.)", "\n".join(code(nbformat.read(path, 4))))
        names = [node.attr for cell in code(nbformat.read(path, 4)) for node in ast.walk(ast.parse(cell))
                 if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "stagerun"]
        assert names and set(names) <= set(stagerun.__all__), path


def installed(cell: str, folder: Path, *missing: str) -> tuple[list[str], list[str]]:
    """What an install cell asks of pip, and puts at the head of the path, in a folder where modules are `missing`."""
    (folder / "pip").mkdir(exist_ok=True)
    (folder / "pip" / "__init__.py").touch()
    asked = folder / "asked"
    asked.write_text("")
    (folder / "pip" / "__main__.py").write_text(
        f"import sys\nopen({str(asked)!r}, 'w').write('\\n'.join(sys.argv[1:]))")
    script = (f"import importlib.util, sys\nfound = importlib.util.find_spec\n"
              f"importlib.util.find_spec = lambda name: None if name in {missing!r} else found(name)\n"
              f"{cell}\nprint(sys.path[0])")
    (folder / "here").mkdir(exist_ok=True)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=folder / "here",
                          env=os.environ | {"PYTHONPATH": os.pathsep.join((str(folder), str(ROOT)))})
    assert done.returncode == 0, done.stderr
    return asked.read_text().splitlines(), done.stdout.split()


def test_the_install_cell_installs_only_where_stagerun_is_missing_and_keeps_torch(tmp_path: Path) -> None:
    cells = {path.stem: code(nbformat.read(path, 4))[0] for path in NOTEBOOKS}
    assert len({cell.replace("[ray]", "") for cell in cells.values()}) == 1 and "60 MB" in cells["01_first_picture"]
    cell, source = cells["01_first_picture"], "git+https://github.com/stagerun/stagerun"
    assert installed(cell, tmp_path) == ([], [])
    assert installed(cell, tmp_path, "stagerun") == (
        ["install", "-q", f"torch=={version('torch')}", f"stagerun @ {source}"], [])
    assert installed(cells["05_distributed"], tmp_path, "stagerun", "torch")[0] == [
        "install", "-q", f"stagerun[ray] @ {source}"]
    (tmp_path / "stagerun").mkdir()
    assert installed(cell, tmp_path, "stagerun") == ([], [str(tmp_path)])


def test_figures_of_a_machine_are_hidden_and_those_of_the_model_are_not() -> None:
    table = ("<table><tr><th>stage</th><th>plan</th><th>peak</th></tr>"
             "<tr><td>encode</td><td>9.6 MiB</td><td>4 B</td></tr></table>")
    assert hidden(table) == table.replace("4 B", HIDDEN)
    told = "run 20260101-101112-abcdef: 3 steps\nencode: 2 pictures in 1.25 s, peak rank 0 cpu 1.2 GiB\n14.2 MiB of it"
    assert hidden(told) == "run *: 3 steps\nencode: 2 pictures in * s, peak rank 0 cpu *\n14.2 MiB of it"
    assert hidden("denoise: picture 1/4, step 3/6, 8.0 steps/s, 0:03 left") == "denoise: *"


def test_another_picture_another_word_and_another_number_are_found() -> None:
    stored = nbformat.read(NOTEBOOKS[1], 4)
    shows = {output.output_type: (cell, output) for cell in stored.cells for output in cell.get("outputs", ())
             if output.output_type == "stream" or "image/png" in output.get("data", {})}
    (words, said), (shot, seen) = shows["stream"], shows["execute_result"]
    assert differences(stored, stored) == []
    for cell, output, change in (
        (words, said, {"text": said.text.replace("differ", "agree")}), (words, said, {"text": "99% of the pixels"}),
        (shot, seen, {"data": seen.data | {"image/png": next(
            output.data["image/png"] for other in stored.cells for output in other.get("outputs", ())
            if "image/png" in output.get("data", {}))}}),
    ):
        kept = dict(output)
        fresh = copy.deepcopy(stored)
        at = fresh.cells[stored.cells.index(cell)].outputs[cell.outputs.index(output)]
        at.update(NotebookNode(kept | change))
        (found,) = differences(stored, fresh)
        assert found.startswith(cell.id)
