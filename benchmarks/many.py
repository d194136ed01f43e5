"""Whether many pictures take the memory of few: python -m benchmarks.many [--prompts N] [--after N] [--limit MiB].

A file of distinct prompts goes through the command line in a process of its own, whose memory is read whenever it
begins a picture in a stage: what is its own, not the pages of mapped files, which come and go. From picture `--after`
on it may grow by `--limit` MiB in each stage. Linux only.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path
from typing import IO

from benchmarks.table import Raw, markdown, write
from tools.demo.scenes import COLORS, SHAPES

STAGES = ("encode", "denoise", "decode")
PLACES = ("on the left", "on the right", "at the top", "at the bottom", "in the center")
SIZES = ("large", "small")


def prompts(count: int) -> list[str]:
    """As many different prompts of the demo's kind, the last word a number where the words run out."""
    scenes = [f"a {size} {color} {shape} {place}" for size, color, shape, place in
              product(SIZES, COLORS, SHAPES, PLACES)]
    return [scene if turn == 0 else f"{scene} {turn}" for turn, scene in islice(
        ((turn, scene) for turn in range(count) for scene in scenes), count)]


def memory(pid: int) -> int:
    """Bytes of a process that are its own, in memory or swapped out."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon:", "VmSwap:")))


def followed(log: Path, child: "subprocess.Popen[str]") -> Iterator[dict[str, object]]:
    """The events that a process writes to its log, as they come, until it ends."""
    while not log.exists() and child.poll() is None:
        time.sleep(0.05)
    with open(log) as file:
        while True:
            ended, line = child.poll() is not None, file.readline()
            if line.endswith("\n"):
                yield json.loads(line)
            elif ended:
                return
            else:
                file.seek(file.tell() - len(line))
                time.sleep(0.01)


def measured(words: list[str], folder: Path) -> tuple[Raw, list[str], float]:
    """Memory by stage and picture, what was said while it ran, and the seconds that it took."""
    begin = time.perf_counter()
    log = folder / "log"
    child = subprocess.Popen([sys.executable, "-m", "runner", *words, "--log", str(log)], stderr=subprocess.PIPE,
                             stdout=subprocess.DEVNULL, text=True)
    assert child.stderr is not None
    told: list[str] = []
    listener = threading.Thread(target=_listen, args=(child.stderr, told))
    listener.start()
    raw: Raw = {stage: [] for stage in STAGES}
    for event in followed(log, child):
        if event["kind"] == "item" and child.poll() is None:
            raw[str(event["stage"])].append({"index": float(str(event["index"])), "bytes": memory(child.pid)})
    listener.join()
    if child.wait():
        sys.exit(f"the run ended with {child.returncode}: {told[-1:]}")
    return raw, told, time.perf_counter() - begin


def _listen(stream: IO[str], told: list[str]) -> None:
    for line in stream:
        told.append(line.rstrip())


def growth(samples: list[dict[str, float]], after: int) -> float:
    """Bytes that the picture with most of them has more than picture `after`."""
    rest = [sample["bytes"] for sample in samples if sample["index"] >= after]
    return max(rest) - rest[0]


def main() -> None:
    """Print the table; exit code 1 where memory grew."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--after", type=int, default=50)
    parser.add_argument("--limit", type=float, default=8.0, help="MiB")
    parser.add_argument("--steps", default="1")
    parser.add_argument("--size", default="64x64")
    parser.add_argument("--json")
    said = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "prompts.txt").write_text("\n".join(prompts(said.prompts)))
        raw, told, seconds = measured(
            ["flux", "--model", said.model, "--prompt-file", str(folder / "prompts.txt"), "--seed", "1", "--steps",
             said.steps, "--size", said.size, "--device", "cpu", "--artifacts", str(folder / "store"), "--out",
             f"{folder}/pictures/"], folder)
        made = len(list((folder / "pictures").iterdir()))
    grown = {stage: growth(samples, said.after) for stage, samples in raw.items()}
    rows = [[stage, len(raw[stage]), *(f"{part / 2**20:.1f}" for part in (
        raw[stage][0]["bytes"], next(s["bytes"] for s in raw[stage] if s["index"] >= said.after), grown[stage]))]
            for stage in STAGES]
    head = ["stage", "pictures", "MiB, first", f"MiB, number {said.after}", "MiB more at most, behind it"]
    print(markdown(head, rows))
    print(f"\n{made:,} pictures in {seconds:.0f} s. The last lines while each stage ran:\n")
    for stage in STAGES:
        print(f"    {next((line for line in reversed(told) if line.startswith(f'{stage}: picture')), '-')}")
    write(said.json, raw, seconds=seconds, told=told)
    if made != said.prompts or max(grown.values()) > said.limit * 2**20:
        sys.exit(f"{made:,} of {said.prompts:,} pictures, and memory grew by {max(grown.values()) / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
