"""Plans, runs, stages, pictures, artifacts and placements show themselves: one line, and HTML without scripts."""

import dataclasses
import os
import subprocess
import sys
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from runner import Job, Plan, Request, make_plan
from runner.artifacts import MemoryStore
from runner.engine.memory import Flushed
from runner.engine.run import Picture, Report
from runner.engine.stage_runner import StageReport
from runner.notebook import Charts, Memory
from runner.reports.notebook import HTML, StageMemory, stage_memory
from runner.reports.templates import call, thumbnail
from runner.text import visible
from stages.placement.placement import Resident
from stages.placement.streaming import Streamed
from stages.placement.tensor_parallel import TensorParallel
from stages.placement.tiling import Tiling
from stages.state import State
from tests.records import HOSTILE, record

KEY = 64 * "a"


class Tags(HTMLParser):
    """The tags of HTML, each closed where it was opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, Any]]] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.seen.append((tag, dict(attributes)))
        if tag not in ("img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def checked(text: str) -> Tags:
    """The HTML, harmless: what it says is text, and what it loads is in it."""
    tags = Tags(text)
    assert {tag for tag, _ in tags.seen} <= {"div", "span", "b", "table", "thead", "tbody", "tr", "th", "td", "img",
                                              "code", "details", "summary"}
    for _, attributes in tags.seen:
        assert attributes.keys() <= {"style", "src", "alt", "width", "height"}
        assert attributes.get("src", "data:image/png;").startswith("data:image/png;")
        # No color of its own that would vanish on a light or on a dark page.
        assert "color:" not in attributes.get("style", "").replace("border-color:", "")
    assert "\u202e" not in text and "\x1b" not in text
    return tags


def html(thing: object) -> str:
    """What a notebook shows of a thing."""
    return HTML[type(thing).__module__, type(thing).__name__](thing)


def one_line(text: str) -> str:
    assert text.isascii() and text.isprintable() and len(text) < 250
    return text


@pytest.fixture(scope="module")
def plan(flux: Path) -> Plan:
    return make_plan(Job("flux", [Request(HOSTILE, 64, 48, 2, 3.5, 7, 32)], model=flux, devices=["cpu"]))


def picture(plan: Plan, store: MemoryStore, index: int = 0) -> Picture:
    return Picture(index, plan.requests[0], KEY, store, {})


def kept() -> MemoryStore:
    store = MemoryStore(warn=print)
    store.put(KEY, "decode", State({"pixels": torch.zeros(480, 640, 3, dtype=torch.uint8)}), {})
    return store


def stage(name: str) -> StageReport:
    seconds = {"load": 0.5, "compute": 1.25, "save": 0.0, "flush": 0.25}
    return StageReport(name, 2, 1, seconds, {"cuda:0": 3 * 2**30, "cuda:1": 2**30}, Flushed(2**30, 0))


def test_a_plan_shows_itself(plan: Plan) -> None:
    line = one_line(repr(plan))
    assert line.startswith("Plan(flux, ") and line.endswith(
        "1 picture, encode on cpu, denoise on cpu, decode on cpu)")
    text = checked(html(plan)).text
    assert "activations" in text and "transformer: " in text
    hostile = dataclasses.replace(plan.checkpoint, source="<script>alert(1)</script>")
    assert "<script>" in checked(html(dataclasses.replace(plan, checkpoint=hostile))).text


def test_a_picture_shows_a_thumbnail_over_its_prompt(plan: Plan) -> None:
    shown = picture(plan, kept())
    assert one_line(repr(shown)).startswith("Picture(0, '\"><script>")
    tags = checked(html(shown))
    (shot,) = [attributes for tag, attributes in tags.seen if tag == "img"]
    assert (shot["width"], shot["height"]) == ("256", "192") and "<script>alert(1)</script>" in tags.text
    gone = checked(html(picture(plan, MemoryStore(warn=print))))
    assert "no longer in the store" in gone.text


def test_a_run_shows_its_stages_and_not_all_of_its_pictures(plan: Plan) -> None:
    store = kept()
    job = Job("flux", plan.requests)
    report = Report(job, "r1", tuple(picture(plan, store, index) for index in range(100)), (stage("encode"),), {})
    assert one_line(repr(report)) == "Report(r1, 100 pictures, encode 2.0 s)"
    text = html(report)
    tags = checked(text)
    assert len([tag for tag, _ in tags.seen if tag == "img"]) == 12 and "and 88 more" in tags.text
    assert len(text) < 100_000


def test_a_stage_shows_seconds_peaks_and_the_flush() -> None:
    assert one_line(repr(stage("denoise"))) == (
        "StageReport(denoise, 2 made, 1 re-used, 2.0 s, peak cuda:0 3.0 GiB, peak cuda:1 1.0 GiB)")
    cells = checked(html(stage("denoise"))).text
    assert "peak cuda:1" in cells and "1.25" in cells and "freed" in cells
    cpu_blocks = dataclasses.replace(stage("denoise"), peak={"rank 0 cpu": 2**30})
    assert "freed" not in checked(html(cpu_blocks)).text


@pytest.fixture
def ran() -> MemoryStore:
    """A store with the record of a run on two cards."""
    store = MemoryStore(warn=print)
    asked = record()
    asked["timeline"]["peaks"]["denoise"]["sim:1"] += 3
    store.save_run("r1", asked)
    return store


def test_the_memory_of_a_run_shows_itself_by_stage_and_card(ran: MemoryStore) -> None:
    memory = Memory(ran, "r1")
    assert [(row.stage, row.device) for row in memory.rows] == [
        (stage, card) for stage in ("encode", "denoise", "decode") for card in ("sim:0", "sim:1")]
    row = memory.rows[3]
    assert (row.before, row.peak - row.planned, row.after) == (0, 3, 0) and row.planned == (7 + 4.5 + 1) * 2**20
    assert one_line(repr(memory)).startswith("Memory(r1, encode sim:0 10.2 MiB, ")
    text = checked(memory._repr_html_()).text
    assert "peak less before" in text and "denoisesim:10 B12.5 MiB12.5 MiB12.5 MiB0 B" in text


def test_without_cards_the_memory_is_that_of_the_process() -> None:
    asked = record()
    asked["timeline"] |= {"devices": [], "peaks": {"encode": {"cpu": 460 * 2**20}}}
    asked["plan"]["stages"] = {"encode": {"cpu": {"weights": 3, "activations": 4}}}
    assert stage_memory(asked) == [StageMemory("encode", "cpu", 400 * 2**20, 7, 460 * 2**20, 410 * 2**20)]


def test_the_charts_of_a_run_show_themselves_without_scripts(ran: MemoryStore) -> None:
    charts = Charts(ran, "r1")
    assert one_line(repr(charts)) == "Charts(r1, 3 of them)"
    tags = Tags(charts._repr_html_())
    assert {tag for tag, _ in tags.seen} <= {"style", "div", "svg", "defs", "pattern", "rect", "line", "text", "title",
                                              "polygon", "polyline"}
    assert [tag for tag, _ in tags.seen].count("svg") == 3
    assert not [name for _, attributes in tags.seen for name in attributes if name.startswith(("on", "href", "src"))]


def test_an_artifact_shows_its_tensors() -> None:
    store = MemoryStore(warn=print)
    values = {f"value_{index}": torch.zeros(2, 3) for index in range(30)}
    artifact = store.put(KEY, "denoise", State(values), {})
    assert one_line(repr(artifact)).startswith("Artifact(denoise aaaaaaaaaaaa, ")
    text = checked(html(artifact)).text
    assert "value_0" in text and "2x3" in text and "and 10 more" in text


def test_a_placement_shows_who_holds_what() -> None:
    dealt = Streamed("cuda:0", {"a.0": "cuda:0", "a.1": "cuda:1", "a.2": "cuda:0"}, cpu_blocks=frozenset(["a.2"]))
    assert repr(dealt) == "Streamed(cuda:0:1,cuda:1:1,cuda:0:1 (1 of them streamed))"
    assert checked(html(dealt)).text.endswith("cuda:01 blockcuda:11 blockcpu1 block")
    assert repr(Resident("cuda:0", Tiling(512))) == "Resident(cuda:0 in tiles of 512 pixels)"
    assert checked(html(Resident("<b>"))).text == "<b>"


def test_a_state_shows_the_extremes_of_its_tensors() -> None:
    state = State({"<b>": torch.arange(6.0).reshape(2, 3), "parts": [torch.zeros(0), True], "steps": 4})
    assert repr(state) == "State(<b> float32[2, 3], parts.0 float32[0])"
    assert checked(html(state)).text == "tensortype and shapefrom, to<b>float32[2, 3]0, 5parts.0float32[0]"


def test_a_placement_over_processes_shows_their_cards() -> None:
    assert checked(html(TensorParallel(("cuda:0", "cuda:1"), 7))).text == "cut over cuda:0, cuda:1"


def test_whatever_shows_itself_is_where_a_notebook_looks_for_it() -> None:
    for module, name in HTML:
        assert getattr(import_module(module), name).__module__ == module


def test_a_notebook_shows_things_as_soon_as_the_package_is_there(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from IPython.core.interactiveshell import InteractiveShell\n"
        "shell = InteractiveShell.instance()\n"
        "assert shell.run_cell('from runner import Request').success\n"
        "assert not {'torch', 'diffusers', 'numpy'} & set(sys.modules), 'heavy'\n"
        "assert shell.run_cell('import torch\\nfrom stages.state import State\\n'\n"
        "                      'from stages.placement.placement import Resident\\n'\n"
        "                      'found = State({\"x\": torch.ones(2)}), Resident(\"cuda:0\")').success\n"
        "print(*(shell.display_formatter.format(one)[0]['text/html'] for one in shell.user_ns['found']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          cwd=Path(__file__).parent.parent, env={**os.environ, "IPYTHONDIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert "<table" in done.stdout and "float32[2]" in done.stdout and "<code>cuda:0</code>" in done.stdout


def test_what_is_said_is_text_and_has_an_end() -> None:
    hostile = "<a b='x'>\x00\x1b[2J\ud800\u2066 & b"
    assert visible(hostile) == "<a b='x'>\ufffd\ufffd[2J\ufffd & b"
    assert len(visible("x" * 10_000)) == 2000 and visible("caf\u00e9 \u05d0") == "caf\u00e9 \u05d0"
    shown = call("macros.html.j2", "table", ["one"], [[hostile]], ["color"], "style")
    assert checked(shown).text == f"one{visible(hostile)}" and "&lt;a b=&#39;x&#39;&gt;" in shown


def test_an_image_is_no_larger_than_asked() -> None:
    shot = thumbnail(torch.zeros(1000, 500, 3, dtype=torch.uint8).numpy(), 100)
    tags = checked(call("macros.html.j2", "image", shot, '"><script>'))
    assert tags.seen[0][1] | {"src": ""} == {"width": "50", "height": "100", "alt": '"><script>', "src": ""}
