"""The Python of docs/python.md runs, from top to bottom, and prints what it promises."""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import stagerun
from runner.media.image import read_card

PAGE = (Path(__file__).parent.parent / "docs" / "python.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
FLUX = 'stagerun.Pipeline("flux", max_memory={0: "14GiB", 1: "14GiB"})'


def test_the_blocks_of_the_page_run(flux: Path, elsewhere: None) -> None:
    """A tiny model stands in for FLUX.1-dev, and makes a small picture."""
    assert FLUX in BLOCKS[0]
    first = BLOCKS[0].replace(FLUX, f'stagerun.Pipeline({str(flux)!r}, devices="cpu")').replace("1024", "64")
    names: dict[str, Any] = {}
    printed = []
    for block in [first.replace("num_inference_steps=28", "num_inference_steps=2"), *BLOCKS[1:]]:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(block, "python.md", "exec"), names)
        printed.append(out.getvalue())
    whole = "".join(printed)
    assert Path("fox.png").is_file() and read_card("fox.png").request.seed == 7
    assert "weights" in printed[1] and "denoise" in printed[1]
    assert "picture 0: step 3, timestep" in whole and "step 4" not in whole and "stopped by" in whole
    assert len(names["rest"].images) == 1 and names["rest"].report.stages[1].ran == 1
    assert [read_card(f"picture-{at}.png").request.seed for at in range(4)] == [7, 8, 9, 10] == names["result"].seeds
    assert len(names["images"]) == 2 and not np.array_equal(names["images"][0], names["result"].images[0])
    assert np.array_equal(Image.open("circle.png"), names["report"].pictures[1].pixels)
    assert printed[-1].count("\n") == 4 and "did you mean num_inference_steps=?" in printed[-1]


@pytest.mark.parametrize("name", sorted(set(re.findall(r"stagerun\.([A-Za-z_]+)", PAGE)) - {"Pipeline"}))
def test_what_the_page_names_is_public(name: str) -> None:
    assert name in stagerun.__all__


def test_the_page_names_every_error_that_a_user_meets() -> None:
    named = set(re.findall(r"^\| `(\w+)`", PAGE, re.MULTILINE))
    assert named | {"StagerunError", "NotPrecomputable"} == {
        name for name in stagerun.__all__ if isinstance(getattr(stagerun, name), type)
        and issubclass(getattr(stagerun, name), BaseException)}
