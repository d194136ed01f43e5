"""The names that users import, as a ratchet: none comes, goes or is renamed by accident.

To change one on purpose, change the set here in the same commit, and the README and docs/ where they show it. Whoever
used a name that is gone has to change their code, so take one away or rename it only together with a new version.
"""

import ast
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import runner

ROOT = Path(__file__).parent.parent
PUBLIC = {
    "runner": frozenset({
        "Job", "Picture", "Plan", "RankLost", "RankProcesses", "Report", "Request", "RunPolicy", "StagerunError",
        "gather", "make_plan", "run_all", "run_on_ray", "run_stage", "spawn", "split_between_ranks",
    }),
    "runner.artifacts": frozenset({
        "Artifact", "FolderStore", "ForwardingStore", "MemoryStore", "Store", "key_of", "open_store",
    }),
    "runner.notebook": frozenset({"Charts", "Live", "Memory"}),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_change_only_on_purpose(name: str) -> None:
    module = import_module(name)
    added, gone = set(module.__all__) - PUBLIC[name], PUBLIC[name] - set(module.__all__)
    assert not added and not gone, f"{name}: {added=}, {gone=}; if that is meant, say so in {Path(__file__).name}"
    assert all(hasattr(module, public) for public in module.__all__)


def test_lazy_names_are_those_that_type_checkers_see() -> None:
    """Three lists say them: the imports for type checkers, `__all__`, and where to find each."""
    tree = ast.parse((ROOT / "runner" / "__init__.py").read_text())
    typed = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in typed.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == runner._HOMES and seen.keys() == set(runner.__all__)


def test_names_are_listed_before_anything_heavy_is_imported() -> None:
    code = "import sys, runner; print(*dir(runner)); print({'torch', 'importlib.metadata'} & set(sys.modules))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    names, heavy = told.splitlines()
    assert {*PUBLIC["runner"], "__version__"} <= set(names.split()) and heavy == "set()"


def test_the_version_is_said_once() -> None:
    """In pyproject.toml; where this fails after it was raised, install the checkout again."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert runner.__version__ == project["version"]


def test_unknown_names_are_refused_as_by_any_module() -> None:
    with pytest.raises(AttributeError, match="module 'runner' has no attribute 'make_plans'"):
        _ = runner.make_plans
