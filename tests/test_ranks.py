"""Ranks in real processes: the pictures of one process, and an end with a reason when one of them is lost."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from runner import Job, RankLost, RankProcesses, Report, Request, RunPolicy, make_plan, run_all, spawn
from runner.artifacts import open_store
from runner.distributed import heartbeat
from runner.distributed.env import Rank, launched, share
from runner.distributed.heartbeat import Heartbeat
from runner.distributed.rank import own_part
from runner.distributed.results import RankResult, differing
from runner.distributed.watchdog import SILENCE, TIMEOUT, Watchdog
from runner.distributed.worker import threads_for
from runner.engine.keys import artifact_keys
from runner.job import Output
from runner.media.previews import strips
from runner.request import requests_for
from stages.errors import InvalidInput, ModelError
from stages.families import FAMILIES
from stages.machine import Device, Machine
from stages.state import State

ROOT = Path(__file__).parent.parent
# So many that a rank is still at them when it is first heard of, a second later.
MANY = 1000
PROMPTS = ("a dog", "a cat", "a dog", "a fox", "a cow")
ASKED = [Request(prompt, 64, 48, 2, 3.5, 7 + index, 32, index) for index, prompt in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def alone(flux: Path) -> Report:
    """The five pictures by one process."""
    return run_all(make_plan(Job("flux", ASKED, model=flux, devices=["cpu"])))


def same(made: Report, alone: Report) -> list[bool]:
    return [np.array_equal(picture.pixels, alone.pictures[picture.index].pixels) for picture in made.pictures]


def test_one_two_three_and_five_prompts_on_two_ranks_are_the_pictures_of_one_process(
    flux: Path, alone: Report, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    kinds: list[str] = []
    with RankProcesses(2) as crew:
        # What is refused is refused as in one process, and the ranks are there for the next job.
        with pytest.raises(ModelError, match="nowhere"):
            spawn(Job("flux", ASKED, model=tmp_path / "nowhere", store=tmp_path / "store"), ranks=crew)
        for count in (1, 2, 3, 5):
            made = spawn(Job("flux", ASKED[:count], model=flux, devices=["cpu"],
                             store=tmp_path / f"{count}"), ranks=crew, emit=lambda kind, data: kinds.append(kind))
            assert same(made, alone) == [True] * count
            assert [stage.ran + stage.reused for stage in made.stages] == [count] * 3
            workers = {f"rank {rank} cpu" for rank in range(min(count, 2))}
            assert all(stage.peak.keys() == workers for stage in made.stages)
            assert [picture.index for picture in made.pictures] == list(range(count))
        broken = tmp_path / "broken"
        plan = make_plan(Job("flux", ASKED, model=flux, devices=["cpu"]))
        store = open_store(str(broken))
        # Rank 1 finds an embedding that is none.
        said = "^rank 1 failed in denoise: ValueError: Required input .* is missing; what was finished is kept"
        store.put(artifact_keys(plan)["encode"][4], "encode", State({"nothing": torch.zeros(1)}), {})
        with pytest.raises(RankLost, match=said):
            spawn(Job("flux", ASKED, model=flux, devices=["cpu"], store=broken), ranks=crew)
    assert gone(crew) and kinds.count("run") == 4 and {"step", "ranks"} <= {*kinds}
    assert capfd.readouterr().out == ""
    (run,) = store.runs()
    assert len(store.load_run(run)["requests"]) == 5
    finished = run_all(plan.only(range(4)), store=store)
    assert same(finished, alone) == [True] * 4 and finished.stages[1].reused >= 1


def gone(crew: RankProcesses) -> bool:
    return all(member.process.poll() is not None for member in crew.members)


@contextmanager
def when(crew: RankProcesses, rank: int, where: str, act: Callable[[int], None]) -> Iterator[None]:
    """Call `act` with the process of a rank as soon as it says to be at `where`."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.02):
            if where in crew.members[rank].messages.get("beat", {}).get("where", ""):
                return act(crew.members[rank].process.pid)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_on_a_cpu_ranks_take_as_many_threads_as_one_process(tmp_path: Path) -> None:
    """Sums are split by the number of threads, which changes the last bits of what a CPU computes."""
    rank = Rank(1, 2, 1, 2)
    assert threads_for(["cpu"], 6, rank) == 6
    asked = requests_for("a large red circle on the left on a blue background", FAMILIES["demo"], steps=2, count=2,
                         seed=3)
    job = Job("demo", asked, devices=["cpu"])
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        alone = run_all(make_plan(job))
        made = spawn(replace(job, store=str(tmp_path / "store")), ranks=2)
    finally:
        torch.set_num_threads(before)
    assert same(made, alone) == [True, True]


@pytest.mark.parametrize("threads, each", [(8, 4), (1, 1), (3, 1)])
def test_with_cards_ranks_share_the_threads(
    threads: int, each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = ["cuda:0", "cuda:1"]
    monkeypatch.setattr("stages.machine.device_names", lambda names=(): list(names) or there)
    assert threads_for([], threads, Rank(0, 2, 0, 2)) == each
    assert threads_for(["cpu"], threads, Rank(0, 2, 0, 2)) == threads


def test_a_killed_rank_ends_the_job_and_what_was_finished_is_kept(flux: Path, alone: Report, tmp_path: Path) -> None:
    finished = threading.Event()
    asked = [*ASKED[:2], replace(ASKED[2], steps=MANY)]

    def emit(kind: str, data: Mapping[str, Any]) -> None:
        if kind == "end" and data["stage"] == "decode":
            finished.set()

    def kill(pid: int) -> None:
        os.kill(pid, signal.SIGSTOP)
        assert finished.wait(60)
        os.kill(pid, signal.SIGKILL)

    said = r"^rank 1 was killed by SIGKILL .* last in denoise, picture 1 of 1, step \d+ of 1000; what was finished"
    with RankProcesses(2) as crew:
        with pytest.raises(RankLost, match=said), when(crew, 1, "step", kill):
            spawn(Job("flux", asked, model=flux, devices=["cpu"], store=tmp_path), ranks=crew, emit=emit)
        begin = time.monotonic()
    assert time.monotonic() - begin < 30 and gone(crew)
    kept = run_all(make_plan(Job("flux", asked[:2], model=flux, devices=["cpu"])), store=open_store(str(tmp_path)))
    assert [stage.reused for stage in kept.stages] == [2, 2, 2] and same(kept, alone) == [True, True]


def test_a_stopped_rank_ends_the_job(flux: Path, tmp_path: Path) -> None:
    asked = [replace(ASKED[index], steps=MANY) for index in range(2)]
    stopped: list[float] = []

    def stop(pid: int) -> None:
        os.kill(pid, signal.SIGSTOP)
        stopped.append(time.monotonic())

    said = r"^rank 0 hangs: no sign of life for \d+ s, last in denoise, picture 1 of 1, step \d+ of 1000 "
    with RankProcesses(2, timeout=8.0) as crew, pytest.raises(RankLost, match=said), when(crew, 0, "step", stop):
        spawn(Job("flux", asked, model=flux, devices=["cpu"], store=tmp_path), ranks=crew)
    assert time.monotonic() - stopped[0] < 60 and gone(crew)


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("pass", "rank 0 left early with exit code 0, last before it started"),
        ("import sys; sys.exit('no such thing')", "rank 0 left early with exit code 1; its last words: no such thing"),
        ("import time; time.sleep(60)", "rank 0 did not start within 1 s"),
    ],
)
def test_a_rank_that_never_works_is_named(code: str, says: str) -> None:
    command = sys.executable, "-c", code
    with pytest.raises(RankLost, match=says), RankProcesses(1, timeout=1.0, command=command) as crew:
        crew.run({}, print)
    assert gone(crew)


def test_no_rank_outlives_its_parent(tmp_path: Path) -> None:
    worker = ("import time; from runner.distributed.channel import Pipe\n"
              "from runner.distributed.env import rank_of\n"
              "from runner.distributed.heartbeat import Heartbeat\n"
              "with Heartbeat(Pipe.inherited(rank_of()).beat): time.sleep(60)")
    parent = ("import sys, time; from runner import RankProcesses\n"
              f"crew = RankProcesses(2, command=(sys.executable, '-c', {worker!r})).__enter__()\n"
              "while not all('beat' in m.messages for m in crew.members): crew.listen(Watchdog(range(2)), print)\n"
              "print(*(m.process.pid for m in crew.members), flush=True); time.sleep(60)")
    code = f"from runner.distributed.watchdog import Watchdog\n{parent}"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        pids = [int(word) for word in process.stdout.readline().split()]
        assert len(pids) == 2 and all(alive(pid) for pid in pids)
        process.kill()
    begin = time.monotonic()
    while any(alive(pid) for pid in pids) and time.monotonic() - begin < 20:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and that nobody asked about yet does not."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_pulse_tells_work_from_idleness_and_from_waiting_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "EVERY", 0.2)
    beats: list[Mapping[str, Any]] = []
    with Heartbeat(beats.append) as pulse:
        pulse("stage", {"stage": "denoise"})
        pulse("item", {"index": 1, "of": 4})
        pulse("step", {"step": 3, "steps": 28})
        time.sleep(1.0)
        idle = beats[-1]
        end = time.monotonic() + 0.6
        while time.monotonic() < end:
            sum(range(1000))
        busy = beats[-1]
        with pulse.waiting():
            time.sleep(1.0)
        waiting = beats[-1]
    assert idle["where"] == "in denoise, picture 2 of 4, step 3 of 28"
    assert idle["idle"] > 0.6 > 0.5 > busy["idle"] and waiting["idle"] < 0.5
    assert [beat["beat"] for beat in beats] == list(range(1, len(beats) + 1))


def test_who_waits_for_a_card_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wait for a card keeps a processor busy, so a card that hangs would never be noticed by that."""
    now = [0.0]
    monkeypatch.setattr("runner.distributed.heartbeat.time", SimpleNamespace(monotonic=lambda: now[0]))
    pulse = Heartbeat(lambda beat: None)
    patience = [pulse.patience]
    for passed, kind, data in (
        (0, "stage", {"stage": "encode"}), (1, "load", {"component": "text_encoder", "device": "cpu"}),
        (1, "loaded", {}), (1, "end", {"stage": "encode"}), (0, "stage", {"stage": "denoise"}),
        (1, "load", {"component": "transformer", "device": "cuda:1"}), (50, "loaded", {}),
        (0, "item", {"index": 0, "of": 2}), (9, "step", {"step": 1, "steps": 3}), (4, "step", {"step": 2, "steps": 3}),
        (0, "item", {"index": 1, "of": 2}), (12, "step", {"step": 1, "steps": 3}), (1, "end", {"stage": "denoise"}),
    ):
        now[0] += passed
        pulse(kind, data)
        patience.append(pulse.patience)
    assert patience == [0, 0, 0, 0, 0, 0, 0, 600, 600, 180, 180, 180, 240, 0]


def test_a_rank_that_only_waits_for_its_card_is_lost_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "EVERY", 0.2)
    beats: list[Mapping[str, Any]] = []
    with Heartbeat(beats.append) as pulse:
        for kind, data in (("stage", {"stage": "denoise"}), ("loaded", {})):
            pulse(kind, data)
        pulse("load", {"component": "transformer", "device": "sim:0"})
        pulse("loaded", {})
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            sum(range(1000))
    assert beats[-1]["idle"] > 0.6
    now = [0.0]
    watch = Watchdog(range(1, 3), clock=lambda: now[0])
    watch.see(1, {"beat": 1, "where": "in denoise, picture 1 of 4", "idle": 700.0, "patience": 900.0})
    watch.see(2, {"beat": 1, "where": "in denoise, picture 1 of 4", "idle": 130.0, "patience": 100.0})
    assert watch.lost() == (2, "rank 2 hangs in denoise, picture 1 of 4: it neither computed nor read for 130 s")


def test_a_watch_names_who_is_lost() -> None:
    now = [0.0]
    watch = Watchdog(range(1, 4), clock=lambda: now[0])
    beat = {"beat": 1, "where": "in encode", "idle": 0.0}
    now[0] = TIMEOUT - 1
    for rank in (1, 2):
        watch.see(rank, beat)
    assert watch.lost() is None
    now[0] += 2
    assert watch.lost() == (3, "rank 3 did not start within 120 s")
    watch.end(3)
    now[0] += SILENCE - 2
    watch.see(1, {**beat, "beat": 2, "idle": TIMEOUT + 1})
    watch.see(2, beat)
    assert watch.lost() == (1, "rank 1 hangs in encode: it neither computed nor read for 121 s")
    watch.end(1)
    assert watch.lost() is None and watch.silent(SILENCE - 1) == [2]
    now[0] += 2
    lost = watch.lost()
    assert lost is not None and lost[0] == 2 and "no sign of life for 22 s, last in encode" in lost[1]
    watch.end(2)
    assert watch.lost() is None


@pytest.mark.parametrize(("count", "parts"), [(0, 2), (1, 2), (3, 2), (5, 2), (7, 3), (2, 8), (64, 5)])
def test_shares_are_all_of_it_once_and_even(count: int, parts: int) -> None:
    shares = [share(count, part, parts) for part in range(parts)]
    assert [index for one in shares for index in one] == list(range(count))
    assert {len(one) for one in shares} <= {count // parts, count // parts + 1}


def test_cards_and_memory_are_dealt_by_local_rank() -> None:
    cards = tuple(Device(f"cuda:{index}", 16, 15, True) for index in range(5))
    machine = Machine(cards, 100, 90)
    dealt = [own_part(machine, Rank(4 + local, 8, local, 2)) for local in range(2)]
    assert [[card.name for card in mine.devices] for mine in dealt] == [["cuda:0", "cuda:1", "cuda:2"],
                                                                        ["cuda:3", "cuda:4"]]
    assert {mine.host_free for mine in dealt} == {45}
    host = Machine((Device("cpu", 100, 90, False),), 100, 90)
    assert own_part(host, Rank(1, 3, 1, 3)).devices[0].free == 30
    with pytest.raises(ValueError, match=r"6 ranks on this host, and 5 cards for them: cuda:0, .* -> start 5 ranks"):
        own_part(machine, Rank(0, 6, 0, 6))


def test_a_rank_is_what_a_launcher_says() -> None:
    said = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    assert launched(said) == Rank(3, 4, 1, 2)
    assert launched({"RANK": "1", "WORLD_SIZE": "2"}) == Rank(1, 2, 1, 2)
    assert launched({}) is None and launched({"RANK": "0", "WORLD_SIZE": "1"}) is None
    for wrong in ({"RANK": "4"}, {"LOCAL_RANK": "2"}, {"LOCAL_WORLD_SIZE": "x"}, {"WORLD_SIZE": "-2"}):
        with pytest.raises(ValueError, match=r"RANK=.* -> start ranks with torchrun"):
            launched({**said, **wrong})


def test_ranks_whose_cards_differ_are_named() -> None:
    sizes = ((512, 512), (512, 512), (1024, 512))
    job = Job("flux", [Request("x", *size, steps=1, guidance=None, seed=1, text_tokens=8) for size in sizes])

    def one(rank: int, dtype: str, tile: int = 0) -> RankResult:
        return RankResult(rank, (rank,), (rank,), {"dtype": {"transformer": dtype}}, {rank: tile} if tile else {})

    idle = RankResult(1, ())
    assert differing(job, [one(0, "bfloat16"), idle, one(2, "bfloat16")]) is None
    told = differing(job, [one(0, "bfloat16"), idle, one(2, "float16")])
    assert told is not None and "rank 2 with {'transformer': 'float16'}" in told
    # A picture of another size says nothing of what this one would have been.
    assert differing(job, [one(0, "bfloat16"), one(2, "bfloat16", 256)]) is None
    assert differing(job, [one(0, "bfloat16"), one(1, "bfloat16", 256)]) == (
        "rank 0 decoded pictures of 512x512 whole, rank 1 in tiles of 256 pixels: one process would have made other "
        "pictures of these (`tile=256` makes ranks alike)")
    assert RankResult.from_json(one(1, "bfloat16", 256).to_json()) == one(1, "bfloat16", 256)


def test_one_rank_is_enough(tmp_path: Path) -> None:
    job = Job("demo", requests_for("a red circle", FAMILIES["demo"], size=(64, 64), steps=1, seed=1),
              store=tmp_path / "store", devices=["cpu"])
    assert len(spawn(job, 1).pictures) == 1
    with pytest.raises(InvalidInput, match="ranks must be a whole number from 1 to 64"):
        spawn(job, 1.5)  # type: ignore[arg-type]


def test_ranks_show_previews_and_their_record_has_those_of_all(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []

    def emit(kind: str, data: Mapping[str, Any]) -> None:
        if kind == "preview":
            assert data["pixels"]().shape == (16, 16, 3)
            told.append((data["request"], data["step"]))

    asked = [replace(requests_for("a red circle", FAMILIES["demo"], size=(64, 64), steps=2, seed=at)[0], index=at)
             for at in range(3)]
    paths = tuple(str(tmp_path / f"{at}.png") for at in range(3))
    job = Job("demo", asked, store=tmp_path / "store", devices=["cpu"], output=Output(paths),
              policy=RunPolicy(preview=1))
    made = spawn(job, 2, emit=emit)
    assert sorted(told) == [(at, step) for at in range(3) for step in (1, 2)]
    store = open_store(str(tmp_path / "store"))
    record = store.load_run(made.run)
    kept = {at: [step for step, _ in strip] for at, strip in strips(record, store).items()}
    assert kept == {at: [1, 2] for at in range(3)}
    for path, picture in zip(paths, made.pictures, strict=True):
        with Image.open(path) as image:
            assert np.array_equal(np.asarray(image), picture.pixels)
    # The record has the job of all of it, which one process finds done.
    again = run_all(make_plan(Job.from_json(record["job"])), store=store)
    assert [stage.ran for stage in again.stages] == [0, 0, 0]
