"""The report of a run is one page that needs nothing else, runs nothing, and can be read at every width."""

import re
import shutil
from collections.abc import Iterator
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from runner.artifacts import FolderStore, MemoryStore
from runner.commands.cli import answer
from runner.job import Job
from runner.reports.page import page
from runner.request import requests_for
from stages.families import FAMILIES
from stages.state import State
from tests.records import HOSTILE, record
from tests.test_repeat import bash_words

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
OVERLAPS = """() => {
  const shown = [...document.querySelectorAll('svg text')].filter(one => one.getClientRects().length);
  const boxes = shown.map(one => [one.textContent, one.getBoundingClientRect()]);
  const found = [];
  for (let i = 0; i < boxes.length; i++) for (let j = i + 1; j < boxes.length; j++) {
    const [a, b] = [boxes[i][1], boxes[j][1]];
    const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    if (wide > 1 && high > 3) found.push(boxes[i][0] + ' | ' + boxes[j][0]);
  }
  const out = boxes.filter(([, box]) => box.left < 0 || box.right > innerWidth + 1).map(([text]) => text);
  return [found, out, document.documentElement.scrollWidth, boxes.length];
}"""

CUT = """() => {
  const inside = [...document.querySelectorAll('.scroll')].filter(one => one.scrollWidth > one.clientWidth + 1);
  const shown = [...document.querySelectorAll('main *')].filter(one => one.getClientRects().length);
  const outside = shown.filter(one => one.getBoundingClientRect().right > innerWidth + 1);
  const cells = shown.filter(one => one.tagName == 'TD').map(one => getComputedStyle(one, '::before').content);
  return [[...inside, ...outside].map(one => one.outerHTML.slice(0, 200)), cells];
}"""


class Tags(HTMLParser):
    """Every tag with its attributes, and all text that is not style."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text += data


def store() -> MemoryStore:
    """A store with the picture that `record()` names."""
    kept = MemoryStore(warn=print)
    pixels = torch.arange(96 * 128 * 3, dtype=torch.int32).remainder(251).to(torch.uint8).reshape(96, 128, 3)
    kept.put(64 * "3", "decode", State({"pixels": pixels}), {})
    return kept


def read(text: str) -> Tags:
    tags = Tags()
    tags.feed(text)
    return tags


def test_a_page_loads_nothing_and_runs_nothing_whatever_the_prompt_says() -> None:
    asked = record()
    asked["error"] = asked["plan"]["components"]["transformer"]["placement"] = asked["versions"]["torch"] = HOSTILE
    # What should be numbers and names of ours may be anything in a record that was made by hand.
    asked["requests"][0] |= dict.fromkeys(("width", "height", "steps", "guidance", "seed", "negative_prompt"), HOSTILE)
    asked |= {"status": HOSTILE, "changes": [HOSTILE], "failures": [{"index": 0, "text": HOSTILE}]}
    asked["layout"]["denoise"]["sim:0"][HOSTILE] = {HOSTILE: 2**20}
    text = page(HOSTILE, asked, store())
    found = read(text)
    assert not {tag for tag, _ in found.tags} & {"script", "iframe", "object", "link", "form", "base", "embed"}
    for tag, attributes in found.tags:
        assert not [name for name in attributes if name.startswith("on")]
        assert tag == "img" or not {"src", "href", "xlink:href"} & attributes.keys()
        assert (attributes.get("src") or "data:image/png;base64,").startswith("data:image/png;base64,")
    (policy,) = [attributes["content"] for tag, attributes in found.tags
                 if attributes.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None and policy.startswith("default-src 'none'") and "script" not in policy
    assert "<script>alert(1)</script>" in found.text and "\u202e" not in text


def test_a_page_tells_of_everything_in_the_record() -> None:
    text = read(page("r1", record("a red circle"), store())).text
    for words in ("a red circle - flux", "run r1, 1 picture, some/<model>, family flux, 10.0 s", "careful <b>now</b>",
                  "Where every block lay", "Memory over time", "Where the time went", "Plan against measurement",
                  "denoise not resident: 23.0 MiB on one device", "torch 2.13.0, diffusers 0.42.1"):
        assert words in text, words
    assert "12.0 MiB" in text and "0.0 %" in text and "-0.0" not in text


def test_a_page_is_named_by_what_was_drawn_and_says_how_to_draw_it_again() -> None:
    asked = record("a red circle")
    asked["requests"] = [asked["requests"][0] | {"prompt": prompt} for prompt in ("a fox", "a dog", "a fox")]
    text = page("r1", asked, store())
    assert "<title>a fox and 1 more - flux</title>" in text and "Do it again" not in text
    drawn = requests_for(HOSTILE + 3000 * " long", FAMILIES["flux"], seed=3)
    asked["job"] = Job("flux", drawn, run="r1", store="/a store").to_json()
    text = page("r1", asked, store())
    (command,) = re.findall('<pre class="command">(.*?)</pre>', text, re.DOTALL)
    words = bash_words(unescape(command))
    assert words[:5] == ["python", "-m", "runner", "flux", "--prompt"] and words[5] == drawn[0].prompt
    assert words[words.index("--artifacts") + 1] == "/a store" and "<script>" not in text


def test_every_cell_knows_its_column_for_windows_that_are_too_narrow_for_rows() -> None:
    text = page("r1", record("a red circle"), store())
    tables = re.findall('<div class="scroll">(.*?)</div>', text, re.DOTALL)
    assert len(tables) == 3
    for each in tables:
        heads = re.findall('<th class="[a-z]*">(.*?)</th>', each)
        for row in re.findall("<tr>(<td.*?)</tr>", each, re.DOTALL):
            assert re.findall('data-label="(.*?)"', row) == heads
    narrow = text[text.index("@media (max-width: 679px)") :]
    assert ".stagerun .scroll td {\n    display: flex" in narrow and "content: attr(data-label)" in narrow


def test_a_page_does_without_what_is_gone() -> None:
    old = {name: record()[name] for name in ("model", "status", "requests", "stages")}
    text = read(page("r1", {**old, "status": "interrupted"}, MemoryStore(warn=print))).text
    assert "interrupted" in text and "not in the store" in text and "Memory over time" not in text


def test_a_page_of_thousands_stays_small() -> None:
    asked = record("a fox")
    asked["requests"] = asked["requests"] * 10_000
    asked["stages"] = {stage: keys * 10_000 for stage, keys in asked["stages"].items()}
    text = page("r1", asked, store())
    assert len(text) < 3_000_000 and "and 9976 more" in text and "and 9900 more" in text


def test_the_command_writes_a_page_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept, out = FolderStore(tmp_path / "store", warn=print), tmp_path / "page.html"
    kept.save_run("first", record("the first"))
    kept.save_run("second", record("the second"))
    words = ["report", "last", "--artifacts", str(tmp_path / "store"), "--out", str(out)]
    assert answer(words) == 0 and capsys.readouterr().out == f"{out}\n"
    assert "the second" in out.read_text() and "the first" not in out.read_text()
    assert answer(words) == 2 and "--overwrite" in capsys.readouterr().err
    assert answer(["report", "first", *words[2:], "--overwrite"]) == 0 and "the first" in out.read_text()
    capsys.readouterr()
    assert answer(["report", "third", *words[2:]]) == 5 and "the last are: first, second" in capsys.readouterr().err
    assert answer([*words[:4], "--out", str(tmp_path / "page.pdf")]) == 2
    FolderStore(tmp_path / "empty", warn=print)
    assert answer(["report", "last", "--artifacts", str(tmp_path / "empty")]) == 5
    assert "no run in the store yet" in capsys.readouterr().err


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless browser, where there is one."""
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no browser to look with: none of {', '.join(BROWSERS)} is on the path")
    with sync.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (800, "light"), (680, "light"), (400, "light"),
                                                (1280, "dark")])
def test_a_page_can_be_read_in_a_browser(browser: Any, tmp_path: Path, width: int, scheme: str) -> None:
    path, shot = tmp_path / "page.html", tmp_path / "page.png"
    path.write_text(page("20250131-120000-0f3a2b", record(), store()))
    window, complaints = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme), []
    window.on("console", lambda message: complaints.append(message.text))
    window.on("dialog", lambda dialog: complaints.append(dialog.message))
    window.goto(path.as_uri())
    overlapping, outside, taken, words = window.evaluate(OVERLAPS)
    cut, heads = window.evaluate(CUT)
    window.screenshot(path=str(shot), full_page=True)
    window.close()
    assert (overlapping, outside, complaints) == ([], [], []) and taken <= width and words > 50
    assert cut == [] and (heads.count('"steps"') == 1) == (width == 400)
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert pixels[5, 5].tolist() == ([255, 255, 255] if scheme == "light" else [15, 19, 24])
    # The transformer's blocks weigh twice the second text encoder's, and take as much more of the page.
    green, orange = ([44, 125, 89], [184, 92, 18]) if scheme == "light" else ([52, 140, 102], [197, 106, 32])
    areas = [int((np.abs(pixels - color).max(axis=2) <= 3).sum()) for color in (green, orange)]
    assert areas[1] > 1000 and 1.5 < areas[0] / areas[1] < 3.5
