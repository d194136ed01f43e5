"""The shape of the house: who may import whom, and what a command line costs before it knows what to do."""

import ast
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for package in ("stages", "runner", "stagerun")
                 for path in (ROOT / package).rglob("*.py"))
TOOLS = sorted((ROOT / "tools").rglob("*.py"))


# From the top to the bottom: a layer imports those below it, and nothing above.
LAYERS = (
    {"commands"}, {"pipeline"}, {"distributed"}, {"engine"}, {"planning"}, {"media"}, {"artifacts"},
    {"job", "job_defaults", "job_fields", "events", "inputs", "machine_option", "placement_options", "request",
     "sizes", "startup", "terminal", "text", "demo"},
)
LONGEST = 350


def imported(path: Path) -> set[str]:
    """Every module that a file imports, also inside functions; not those that only type checkers see."""
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports relatively"
            within = [f"{node.module}.{alias.name}" for alias in node.names]
            names.update(name if name in MODULES else str(node.module) for name in within)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return names


def module_of(path: Path) -> str:
    """The name under which a file is imported."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in SOURCES}


def layer_of(module: str) -> int:
    """The layer of a module of `runner`, from 0 at the top; `stages` is below all of them."""
    if module.startswith("stages"):
        return len(LAYERS)
    part = module.split(".")[1]
    return next(number for number, layer in enumerate(LAYERS) if part in layer)


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_a_layer_imports_nothing_above_it(path: Path) -> None:
    """commands > pipeline > distributed > engine > planning > media > artifacts > job > stages, wherever it is."""
    module = module_of(path)
    # These show what all the layers made, and nothing but commands, pipelines and notebooks imports them.
    shows = ("runner.reports", "runner.notebook", "runner.__main__", "stagerun")
    if module == "runner" or module.startswith(shows):
        return
    above = {name for name in imported(path) if name in MODULES and name not in ("runner", "stages")
             and not (module.startswith(("runner.commands", "runner.pipeline")) and name.startswith("runner.reports"))
             and (name.startswith(("runner.reports", "runner.notebook")) or layer_of(name) < layer_of(module))}
    assert not above


def test_the_package_of_public_names_is_imported_by_nothing() -> None:
    for path in SOURCES:
        inside = module_of(path).startswith("stagerun")
        assert inside or not [name for name in imported(path) if name.split(".")[0] == "stagerun"], path


def test_nothing_imports_in_circles() -> None:
    """Not even inside functions."""
    graph = {module: imported(path) & MODULES.keys() - {module} for module, path in MODULES.items()
             if path.name != "__init__.py"}
    left = dict(graph)
    # Whoever imports nothing that is left cannot be in a circle.
    while free := [module for module, names in left.items() if not names & left.keys()]:
        for module in free:
            del left[module]
    assert not left, sorted(left)


def test_a_file_is_read_in_one_sitting() -> None:
    assert not {module_of(path): count for path in SOURCES if (count := path.read_text().count("\n")) > LONGEST}


def test_every_field_says_what_it_is() -> None:
    """A line under each field of a dataclass; options of the command line say it by their help."""
    silent = []
    for path in SOURCES + TOOLS:
        classes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)]
        for node in classes:
            if not any("dataclass" in ast.unparse(each) for each in node.decorator_list):
                continue
            for field, following in zip(node.body, [*node.body[1:], None], strict=True):
                told = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                if isinstance(field, ast.AnnAssign) and not told and "typer." not in ast.unparse(field.annotation):
                    silent.append(f"{module_of(path)}.{node.name}.{ast.unparse(field.target)}")
    assert not silent


def test_placements_are_asked_and_not_taken_apart() -> None:
    """What depends on a placement is a method of it, so that a new one is one file."""
    kinds = {"Resident", "Sharded", "Streamed", "TensorParallel"}
    for path in SOURCES:
        if path.parent.name != "placement":
            calls = [node for node in ast.walk(ast.parse(path.read_text()))
                     if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance"]
            assert not [call for call in calls if any(kind in ast.unparse(call.args[1]) for kind in kinds)], path


def test_classes_are_built_and_not_operated_on() -> None:
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        assigned = [ast.unparse(target) for node in ast.walk(tree) if isinstance(node, ast.Assign)
                    for target in node.targets]
        assert not [name for name in assigned if name.endswith(".__class__")], path
        methods = [node.name for body in ast.walk(tree) if isinstance(body, ast.ClassDef) for node in body.body
                   if isinstance(node, ast.FunctionDef)]
        assert "__getattr__" not in methods, path


def test_what_is_installed_needs_no_checkout() -> None:
    for path in SOURCES:
        assert not {name for name in imported(path) if name.split(".")[0] in ("tools", "tests", "benchmarks")}, path


def test_the_demo_is_data_alone() -> None:
    for path in (ROOT / "runner" / "demo").rglob("*.py"):
        assert imported(path) <= {"json", "pathlib"}, path


def test_a_model_on_disk_knows_nothing_of_where_it_will_be() -> None:
    known = ("stages.models", "stages.errors", "stages.families", "stages.machine", "stages.strict_json",
             "stages.wording", "stages.out_of_memory")
    for path in (ROOT / "stages" / "models").glob("*.py"):
        assert not [name for name in imported(path) if name.startswith("stages") and not name.startswith(known)], path


def test_reports_are_read_by_commands_pipelines_and_notebooks_alone() -> None:
    for path in SOURCES:
        if path.parts[len(ROOT.parts) + 1] not in ("__init__.py", "commands", "notebook.py", "pipeline", "reports"):
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
    # Seconds of the processor, as the machine may be busy with other work.
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "runner", "--help"], capture_output=True, cwd=ROOT, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_the_page_on_architecture_names_files_that_are_there() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"`([a-z_/]+\.py)`", page))
    assert len(named) > 40 and not [name for name in named if not (ROOT / name).is_file()]
    trip = page[page.index("## One picture's way") : page.index("## Where is")]
    stops = re.findall(r"^([0-9]+)\. `", trip, re.MULTILINE)
    assert [int(stop) for stop in stops] == list(range(1, len(stops) + 1)) and 10 < len(stops) <= 20


def test_the_map_of_contributing_has_every_folder() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for package in ("stages", "runner"):
        folders = {path.name for path in (ROOT / package).iterdir() if (path / "__init__.py").is_file()}
        table = text[text.index(f"| in `{package}/` |") :].split("\n\n")[0]
        assert set(re.findall(r"`([a-z]+)/`", table)) - {package} == folders
