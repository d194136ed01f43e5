"""The shape of the house: who may import whom, and what a command line costs before it knows what to do."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for package in ("stages", "runner") for path in (ROOT / package).rglob("*.py"))
TOOLS = sorted((ROOT / "tools").rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Every module that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("path", sorted((ROOT / "stages").rglob("*.py")), ids=lambda path: path.name)
def test_stages_know_nothing_of_runs(path: Path) -> None:
    assert not {name for name in imported(path) if name.split(".")[0] == "runner"}


def test_what_is_installed_needs_no_checkout() -> None:
    for path in SOURCES:
        assert not {name for name in imported(path) if name.split(".")[0] in ("tools", "tests", "benchmarks")}, path


def test_the_demo_is_data_alone() -> None:
    for path in (ROOT / "runner" / "demo").rglob("*.py"):
        assert imported(path) <= {"json", "pathlib"}, path


def test_a_model_on_disk_knows_nothing_of_where_it_will_be() -> None:
    known = ("stages.models", "stages.errors", "stages.families", "stages.machine", "stages.strict_json")
    for path in (ROOT / "stages" / "models").glob("*.py"):
        assert not [name for name in imported(path) if name.startswith("stages") and not name.startswith(known)], path


def test_reports_are_read_by_commands_and_notebooks_alone() -> None:
    for path in SOURCES:
        if path.parts[len(ROOT.parts) + 1] not in ("__init__.py", "commands", "notebook.py", "reports"):
            assert not [name for name in imported(path) if name.startswith("runner.reports")], path


def test_modular_diffusers_stands_behind_one_seam() -> None:
    seam = {"split.py", "build.py", "stage.py", "step_hook.py", "denoise.py"}
    assert {path.name for path in SOURCES if any("modular_pipelines" in name for name in imported(path))} <= seam


def test_no_pickle_and_no_evaluation() -> None:
    for path in SOURCES + TOOLS:
        assert not imported(path) & {"pickle", "cPickle", "dill", "marshal", "shelve", "yaml"}, path
        calls = {node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}
        named = {call.id for call in calls if isinstance(call, ast.Name)}
        assert not named & {"eval", "exec", "compile"}, path
        loads = [node for node in ast.walk(ast.parse(path.read_text()))
                 if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"]
        # The training of the demo reads its own optimizer state, and nothing but tensors of it.
        assert not loads or path in TOOLS, path
        assert all("weights_only=True" in ast.unparse(load) for load in loads), path


def test_only_machine_asks_for_cuda() -> None:
    for path in SOURCES:
        if path.name != "machine.py":
            assert not [name for name in ast.walk(ast.parse(path.read_text()))
                        if isinstance(name, ast.Attribute) and ast.unparse(name).startswith("torch.cuda")], path


def test_help_answers_before_torch_is_imported() -> None:
    """`python -m runner --help` in under half a second, with neither torch nor diffusers."""
    code = (
        "import sys; sys.argv = ['runner', '--help']\n"
        "import runpy\n"
        "try: runpy.run_module('runner', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print('HEAVY', sorted({'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert "HEAVY []" in shown and "flux" in shown
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "runner", "--help"], capture_output=True, cwd=ROOT, check=True)
        times.append(time.perf_counter() - start)
        if times[-1] < 0.5:
            break
    assert times[-1] < 0.5, times
