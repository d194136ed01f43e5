"""Runs the notebooks with the demo and stores what their cells show: python -m tools.notebooks

What differs from machine to machine, or from run to run, is stored as `*`: seconds, measured bytes, what is free on a
device, and the names of runs. Charts over time are left out. Pictures and planned figures are stored as they came.
"""

import base64
import io
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Ranks are to make the pictures of one process with more than one thread, too; elsewhere one is quicker.
THREADS = {"05_distributed": "2"}

HIDDEN = "*"
# The columns of tables whose figures were measured.
MEASURED = re.compile(r"free then|before|after|freed|left|(load|compute|save|flush) s|peak( .*)?")
_HIDING = (
    (re.compile(r"\b\d{8}-\d{6}-[0-9a-f]{6}\b"), HIDDEN),
    # What was going on when a run was stopped.
    (re.compile(r"\bpicture [\d,]+/[\d,]+, [^<\n]* left\b|\b\d+ of \d+ pictures done\b"), HIDDEN),
    (re.compile(r"\b\d+(\.\d+)? s\b"), f"{HIDDEN} s"),
    # What a verdict says is free on the fullest device.
    (re.compile(r"(\bpeak [\d.]+(?: [KMG]iB)? of) [\d.]+ ([KMG]iB)"), rf"\1 {HIDDEN} \2"),
    (re.compile(r"\b((?:peak|encode|denoise|decode) (?:rank \d )?[\w:]+|measured|freed) -?[\d,.]+ ([KMG]i)?B\b"),
     rf"\1 {HIDDEN}"),
)
# The core of Ray tells, with the time and its process, that it tells no more than it is asked to.
_RAY = re.compile(r"\[.*logging\.cc.*\]? Set ray log level .*\n")
_TABLE, _ROW = re.compile(r"<table.*?</table>", re.DOTALL), re.compile(r"<tr\b.*?</tr>", re.DOTALL)
_CELL = re.compile(r"(<t[hd]\b[^>]*>)(.*?)(</t[hd]>)", re.DOTALL)
_SHOT = re.compile(r"data:image/png;base64,([A-Za-z0-9+/=]+)")
_FIGURE = re.compile(r"\d+\.\d+(?:e[+-]?\d+)?|\d+(?=%)")
# Of 255, on average: another CPU rounds otherwise, and another picture differs by much more.
NEAR = 6.0


def execute(notebook: NotebookNode, folder: Path, name: str) -> None:
    """Run the cells of the notebook of this name, in a kernel of its own that works in `folder`."""
    # The sockets of a kernel have a short path: ports of its choice may be taken by the next kernel.
    with tempfile.TemporaryDirectory(prefix="nb") as sockets:
        kernel = AsyncKernelManager(kernel_name="python3", transport="ipc", ip=f"{sockets}/k")
        # Patient with a busy machine, also where it would be by itself: at the start, and for what a cell shows.
        client = NotebookClient(notebook, km=kernel, timeout=250, startup_timeout=250, iopub_timeout=60,
                                shutdown_kernel="immediate", record_timing=False,
                                resources={"metadata": {"path": str(folder)}})
        # A history of its own: kernels share that of the user, and its lock. Kernels of MKL that give equal sums.
        own = {"PYTHONPATH": str(ROOT), "IPYTHONDIR": str(folder / "ipython"), "HF_HUB_OFFLINE": "1",
               "XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": THREADS.get(name, "1"),
               "MKL_CBWR": "AVX2,STRICT"}
        client.execute(cleanup_kc=True, env=os.environ | own)
        assert not kernel.has_kernel


def clean(notebook: NotebookNode) -> None:
    """Take out of a notebook that was run what would be another the next time."""
    for name in notebook.metadata.language_info.keys() - {"name"}:
        del notebook.metadata.language_info[name]
    for cell in notebook.cells:
        cell.metadata.clear()
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs
                            if output.output_type != "stream" or _RAY.sub("", output.text).strip()]
        for output in cell.get("outputs", ()):
            if output.output_type == "stream":
                output.text = hidden(_RAY.sub("", output.text))
            elif "data" in output:
                output.metadata.clear()
                _clean(output.data)


def _clean(data: NotebookNode) -> None:
    for kind, value in [*data.items()]:
        if kind not in ("image/png", "text/html", "text/plain") or (kind == "text/html" and "<svg" in value):
            del data[kind]
        elif kind != "image/png":
            data[kind] = hidden(value)


def hidden(text: str) -> str:
    """Text or HTML with a `*` for each figure that differs from machine to machine."""
    shots = _SHOT.findall(text)
    text = _TABLE.sub(_table, _SHOT.sub("data:image/png;base64,", text))
    for figure, instead in _HIDING:
        text = figure.sub(instead, text)
    found = iter(shots)
    return re.sub("data:image/png;base64,", lambda at: at[0] + next(found), text)


def _table(table: re.Match[str]) -> str:
    rows = [_CELL.findall(row) for row in _ROW.findall(table[0])]
    measured = [bool(MEASURED.fullmatch(text)) for _, text, _ in rows[0]] if rows else []
    numbers: Iterator[int] = iter(range(len(rows)))

    def row(found: re.Match[str]) -> str:
        if next(numbers) == 0:
            return found[0]
        hides = iter(measured)
        return _CELL.sub(lambda cell: f"{cell[1]}{HIDDEN if next(hides) and cell[2] else cell[2]}{cell[3]}", found[0])

    return _ROW.sub(row, table[0])


def differences(stored: NotebookNode, fresh: NotebookNode) -> list[str]:
    """What of a stored notebook is not what came now: in words, a line for each output.

    Pictures may differ as those of two CPUs do, and figures with a point, or in percent, by a twentieth.
    """
    found = []
    if [cell.source for cell in stored.cells] != [cell.source for cell in fresh.cells]:
        return ["the cells are others"]
    for cell, now in zip(stored.cells, fresh.cells, strict=True):
        if cell.cell_type != "code":
            continue
        if cell.execution_count != now.execution_count:
            found.append(f"{cell.id} has number {cell.execution_count}, not {now.execution_count}")
        if len(cell.outputs) != len(now.outputs):
            found.append(f"{cell.id} shows {len(cell.outputs)} things, not {len(now.outputs)}")
            continue
        found += [f"{cell.id} shows {one!r:.4000}\nand now {other!r:.4000}"
                  for one, other in zip(map(_parts, cell.outputs), map(_parts, now.outputs), strict=True)
                  if not _alike(one, other)]
    return found


def _parts(output: NotebookNode) -> dict[str, Any]:
    """What an output says, its figures, and its pictures as pixels."""
    data = {kind: "".join(value) for kind, value in output.get("data", {}).items()}
    words = [output.output_type, output.get("name", ""), "".join(output.get("text", ""))]
    words += [f"{kind} {value}" for kind, value in sorted(data.items()) if kind != "image/png"]
    said = _SHOT.sub("", "\n".join(words))
    shots = [shot for value in data.values() for shot in _SHOT.findall(value)]
    shots += [data["image/png"]] if "image/png" in data else []
    return {"said": _FIGURE.sub("#", said), "figures": [float(one) for one in _FIGURE.findall(said)],
            "pictures": [np.asarray(Image.open(io.BytesIO(base64.b64decode(shot))), int) for shot in shots]}


def _alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return bool(
        one["said"] == other["said"] and np.allclose(one["figures"], other["figures"], rtol=0.05, atol=0.02)
        and [shot.shape for shot in one["pictures"]] == [shot.shape for shot in other["pictures"]]
        and all(np.abs(a - b).mean() <= NEAR for a, b in zip(one["pictures"], other["pictures"], strict=True)))


def main() -> None:
    """Run every notebook and store what its cells show."""
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, 4)  # type: ignore[no-untyped-call]
        with tempfile.TemporaryDirectory() as folder:
            execute(notebook, Path(folder), path.stem)
        clean(notebook)
        nbformat.write(notebook, path)  # type: ignore[no-untyped-call]
        print(path.name)


if __name__ == "__main__":
    main()
