"""The names that users import, as a ratchet: none comes, goes or is renamed by accident.

To change one on purpose, change the set here in the same commit, and the README and docs/ where they show it. Whoever
used a name that is gone has to change their code, so take one away or rename it only together with a new version.
"""

import ast
import pydoc
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import runner
import stagerun
from stages.errors import KINDS

ROOT = Path(__file__).parent.parent
PUBLIC = {
    "runner": frozenset({
        "Job", "Picture", "Plan", "RankLost", "RankProcesses", "Report", "Request", "RunPolicy", "StagerunError",
        "gather", "make_plan", "run_all", "run_on_ray", "run_stage", "spawn", "split_between_ranks",
    }),
    "runner.artifacts": frozenset({
        "Artifact", "FolderStore", "ForwardingStore", "MemoryStore", "Store", "Where", "key_of", "open_store",
    }),
    "runner.notebook": frozenset({"Charts", "Live", "Memory"}),
    "stagerun": frozenset({
        "Artifact", "BadResult", "Charts", "DoesNotFit", "FAMILIES", "Family", "Fix", "FolderStore", "Interrupted",
        "InvalidInput", "Job", "Live", "Memory", "MemoryStore", "ModelError", "NotPrecomputable", "Output", "Picture",
        "Pipeline", "Plan", "RankLost", "RankProcesses", "Report", "Request", "Result", "RunPolicy",
        "StageOutOfMemory", "StagerunError", "State", "States", "Store", "StoreError", "gather", "log_in", "make_plan",
        "open_store", "run_all", "run_on_ray", "run_stage", "spawn", "split_between_ranks",
    }),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_change_only_on_purpose(name: str) -> None:
    module = import_module(name)
    added, gone = set(module.__all__) - PUBLIC[name], PUBLIC[name] - set(module.__all__)
    assert not added and not gone, f"{name}: {added=}, {gone=}; if that is meant, say so in {Path(__file__).name}"
    assert all(hasattr(module, public) for public in module.__all__)


@pytest.mark.parametrize("package", [runner, stagerun], ids=["runner", "stagerun"])
def test_lazy_names_are_those_that_type_checkers_see(package: ModuleType) -> None:
    """Three lists say them: the imports for type checkers, `__all__`, and where to find each."""
    tree = ast.parse((ROOT / package.__name__ / "__init__.py").read_text())
    typed = next(node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
    seen = {alias.name: node.module for node in typed.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    homes = package._HOMES
    if package is stagerun:
        homes = {name: home for home, names in homes.items() for name in names}
    assert seen == homes and seen.keys() == set(package.__all__)


@pytest.mark.parametrize("package", ["runner", "stagerun"])
def test_names_are_listed_before_anything_heavy_is_imported(package: str) -> None:
    code = (f"import sys, {package} as package; print(*dir(package));"
            "print({'torch', 'importlib.metadata'} & set(sys.modules))")
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    names, heavy = told.splitlines()
    assert {*PUBLIC[package], "__version__"} <= set(names.split()) and heavy == "set()"


def test_the_public_package_has_every_public_name_and_every_error() -> None:
    """Whoever imports stagerun needs no other import."""
    assert PUBLIC["runner"] | PUBLIC["runner.notebook"] | KINDS.keys() <= PUBLIC["stagerun"]
    for name in PUBLIC["runner"]:
        assert getattr(stagerun, name) is getattr(runner, name)


def test_help_shows_what_each_name_is() -> None:
    text = pydoc.plain(pydoc.render_doc(stagerun))
    assert 'pipe = stagerun.Pipeline("flux"' in text and "class Pipeline" in text and "num_inference_steps" in text
    shown = pydoc.plain(pydoc.render_doc(stagerun.Pipeline))
    assert "max_memory" in shown and "the scheduler's timestep" in shown


def test_python_m_stagerun_is_the_command() -> None:
    code = "import runpy, sys; sys.argv[1:] = ['--help']; runpy.run_module('{}', run_name='__main__', alter_sys=False)"
    one, other = (subprocess.run([sys.executable, "-c", code.format(name)], capture_output=True, text=True, cwd=ROOT)
                  for name in ("stagerun", "runner"))
    assert one.stdout == other.stdout and "flux" in one.stdout and one.returncode == other.returncode == 0


def test_the_version_is_said_once() -> None:
    """In pyproject.toml; where this fails after it was raised, install the checkout again."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert runner.__version__ == stagerun.__version__ == project["version"]


def test_unknown_names_are_refused_as_by_any_module() -> None:
    for package in (runner, stagerun):
        with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'make_plans'"):
            _ = package.make_plans
