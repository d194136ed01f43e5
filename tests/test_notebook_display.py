"""What a cell shows while a run goes on, and what a failed or interrupted cell leaves: nothing."""

import gc
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from IPython.core.displaypub import CapturingDisplayPublisher
from IPython.core.interactiveshell import InteractiveShell
from torch import nn

from stages.errors import InvalidInput
from tests.test_display import checked
from tests.test_events import RUN


@pytest.fixture
def shell() -> Iterator[InteractiveShell]:
    """A shell as a notebook has one, which keeps what cells display."""
    shell = InteractiveShell.instance()
    shell.display_pub = CapturingDisplayPublisher(parent=shell, shell=shell)
    yield shell
    shell.reset()
    InteractiveShell.clear_instance()


def test_a_cell_shows_one_thing_that_is_replaced(shell: InteractiveShell) -> None:
    from runner.notebook import Live

    live = Live()
    for kind, data in RUN:
        live(kind, data)
    live("preview", {"step": 2, "steps": 4, "pixels": lambda: np.zeros((8, 16, 3), np.uint8)})
    shown = shell.display_pub.outputs
    assert not shown[0]["update"] and all(output["update"] for output in shown[1:]) and len(shown) < len(RUN)
    assert len({output["transient"]["display_id"] for output in shown}) == 1
    tags = checked(shown[-1]["data"]["text/html"])
    (shot,) = [attributes for tag, attributes in tags.seen if tag == "img"]
    assert (shot["width"], shot["alt"]) == ("256", "after step 2")
    assert "denoise: 2 pictures in 10.0 s, peak cuda:0 23.0 GiB" in tags.text
    live("end", {"stage": "denoise", "seconds": {"load": 4.2}, "peak": {}})
    assert "img" not in [tag for tag, _ in checked(shown[-1]["data"]["text/html"]).seen]
    assert shown[-1]["data"]["text/plain"].splitlines()[0] == "run r1: 2 pictures, some/model, first seed 7"


def test_without_ipython_live_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from runner.notebook import Live

    monkeypatch.setitem(sys.modules, "IPython.display", None)
    with pytest.raises(InvalidInput, match=r"IPython is not installed -> pip install 'stagerun\[notebook\]', or "):
        Live()


CELL = """
from operator import attrgetter
from runner import Job, Request, make_plan, run_all

plan = make_plan(Job("flux", [Request("a red circle", 64, 48, 3, 3.5, 7, 32)], model=model, devices=["cpu"]))
for stage in plan.stages:
    if stage.name == "{stage}":
        stage.prepare = lambda pipe: attrgetter("{part}")(pipe).register_forward_hook(fail)
"""


@pytest.mark.parametrize(
    ("stage", "part", "kind"),
    [("encode", "text_encoder_2", KeyboardInterrupt), ("decode", "vae.decoder", ZeroDivisionError),
     ("denoise", "transformer.x_embedder", ZeroDivisionError), ("denoise", "transformer.proj_out", KeyboardInterrupt)],
)
def test_a_cell_that_fails_gives_its_memory_back(
    shell: InteractiveShell, flux: Path, stage: str, part: str, kind: type[BaseException]
) -> None:
    held: list[weakref.ref[Any]] = []

    def fail(module: nn.Module, *call: Any) -> None:
        # Skeletons, which have no bytes, are gone through before.
        if any(weights.is_meta for weights in module.parameters()):
            return
        held.extend(weakref.ref(each) for each in (*module.modules(), *module.parameters()))
        raise kind("in the middle")

    shell.push({"model": flux, "fail": fail})
    assert shell.run_cell(CELL.format(stage=stage, part=part)).success
    error = shell.run_cell("run_all(plan)", store_history=True).error_in_exec
    assert isinstance(error, kind) and len(held) > 1
    gc.collect()
    # The shell keeps the error, and what it shows says where it was, but nobody keeps the model.
    assert [each() for each in held if each() is not None] == []
    assert any("in the middle" in str(each) or "fail" in str(each) for each in (error, *error.__notes__))
