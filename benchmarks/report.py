"""The README's picture of a report: a real run of the demo checkpoint on two simulated cards, seen in a browser.

python -m benchmarks.report [FOLDER]
"""

import gc
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image
from playwright.sync_api import sync_playwright

from benchmarks.pictures import PROMPTS
from runner import Job, Request, RunPolicy, make_plan, run_all
from runner.artifacts import open_store
from runner.reports.page import page
from tests import sim

# Neither card could hold the transformer.
LIMITS = (14_500_000, 14_500_000)
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
TITLES = ("Where every block lay", "Memory over time", "Where the time went", "Denoising, step by step")


def reported(folder: Path) -> Path:
    """The report of a run that makes two pictures, in two lanes."""
    # As the command line does: what stays need not be looked at by every flush.
    gc.freeze()
    sim.configure(LIMITS)
    torch.set_num_threads(1)
    requests = [Request(prompt, 128, 128, 16, None, seed, 20, seed) for seed, prompt in enumerate(PROMPTS[:7:6])]
    plan = make_plan(Job("demo", requests, dtype={"": torch.float32}, lanes=2, run="demo-on-two-cards"))
    store = open_store(str(folder / "store"), warn=print)
    report = run_all(plan, RunPolicy(preview=2, sample_memory=True), store=store)
    path = folder / "report.html"
    path.write_text(page(report.run, store.load_run(report.run), store))
    return path


def shot(path: Path, out: Path) -> None:
    """A picture of the page's charts."""
    browser = next(found for name in BROWSERS if (found := shutil.which(name)))
    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        window = chromium.new_page(viewport={"width": 1010, "height": 900}, device_scale_factor=1.25)
        window.goto(path.as_uri())
        parts = [window.locator("section", has=window.get_by_role("heading", name=title)) for title in TITLES]
        boxes = [box for part in parts if (box := part.bounding_box()) is not None]
        top, bottom = boxes[0]["y"], boxes[-1]["y"] + boxes[-1]["height"]
        window.screenshot(path=str(out), full_page=True,
                          clip={"x": 0, "y": top + 2, "width": 1010, "height": bottom - top + 8})
        chromium.close()
    Image.open(out).convert("RGB").quantize(200, dither=Image.Dither.NONE).save(out, optimize=True)


def main() -> None:
    """Write FOLDER/report.png, in docs/ unless said otherwise."""
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "docs")
    with tempfile.TemporaryDirectory() as folder:
        shot(reported(Path(folder)), out / "report.png")


if __name__ == "__main__":
    main()
