"""The documentation as a site: every page and every public name is in it, and it is built without a warning."""

import os
import re
import subprocess
import sys
from html import unescape
from importlib import import_module
from pathlib import Path

import pytest

from runner.job import Job
from tests.test_public_names import PUBLIC

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def test_the_reference_has_every_public_name() -> None:
    text = (DOCS / "api.md").read_text()
    said = re.findall(r"^\.\. auto(?:class|function|exception):: ([\w.]+)$", text, re.MULTILINE)
    for path in said:
        module, _, name = path.rpartition(".")
        assert getattr(import_module(module), name).__module__ == module, f"{path} is of another module"
    # Errors are told by their module.
    told = {path.rpartition(".")[2] for path in said} | set(vars(import_module("stages.errors")))
    # A table, and what a store may be given as: both are told in words.
    assert not {name for names in PUBLIC.values() for name in names} - told - {"FAMILIES", "Where"}


def test_the_first_page_leads_to_every_page() -> None:
    index = (DOCS / "index.md").read_text()
    entries = index[index.index("```{toctree}") :].splitlines()
    named = {line for line in entries if re.fullmatch(r"[\w-]+", line)}
    assert "*" in entries and named <= {page.stem for page in DOCS.glob("*.md")}


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    for name in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(name, reason=f"{name} is not installed: pip install -e '.[docs]'")
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", str(tmp_path / "trees"), "docs",
         str(tmp_path / "site")], cwd=ROOT, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    front = (tmp_path / "site" / "index.html").read_text()
    for page in DOCS.glob("*.md"):
        assert page.stem == "index" or f'href="{page.stem}.html"' in front, page
    reference = unescape(re.sub("<[^>]+>", "", (tmp_path / "site" / "api.html").read_text()))
    for words in ("A checkpoint other than the family", "Plan and run", "The pictures.", *Job.__dataclass_fields__):
        assert words in reference, words
