"""Ray: the pictures of one process, also when a worker is killed; and which worker has which cards."""

import json
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from runner import Job, RunPolicy, make_plan, run_all, run_on_ray
from runner.artifacts import Store, open_store
from runner.commands.cli import answer
from runner.commands.options import RunOptions
from runner.commands.parse import check_engine
from runner.distributed.ray.actor import Denoise, cards_of, on_own_cards
from runner.distributed.ray.cluster import group_rows
from runner.distributed.ray.pools import Pool, groups, pools
from runner.engine.keys import artifact_keys
from runner.media.previews import strips
from runner.notebook import Memory
from runner.request import Request, requests_for
from stages.errors import DoesNotFit, Fix, InvalidInput, StageOutOfMemory, from_json
from stages.families import FAMILIES
from stages.placement.sharded import Sharded
from tests import sparse
from tests.test_readme import BY_RAY, answered

PROMPTS = ("a fox", "a dog", "a fox", "a cow", "a cat")


def of_this_process(pid: int) -> bool:
    """Whether a process descends from this one."""
    while pid > 1 and pid != os.getpid():
        stat = Path(f"/proc/{pid}/stat")
        pid = int(stat.read_text().rpartition(")")[2].split()[1]) if stat.exists() else 0
    return pid == os.getpid()


def workers(name: str) -> list[int]:
    """The Ray workers of a stage that this process started."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = entry.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if text.startswith(f"ray::MapWorker(Map({name}))") and of_this_process(int(entry.parent.name)):
            found.append(int(entry.parent.name))
    return found


def heard_from_elsewhere() -> list[tuple[str, str]]:
    """What the processes that this one started listen to, besides this machine's own address."""
    lines = [(process.name(), line.laddr.ip) for process in psutil.Process().children(recursive=True)
             for line in process.net_connections("inet") if line.status == psutil.CONN_LISTEN]
    assert len(lines) >= 3
    return [line for line in lines if not line[1].removeprefix("::ffff:").startswith("127.")]


@contextmanager
def killing(name: str, store: Store, before: str, last: str) -> Iterator[list[int]]:
    """Kill the worker of a stage once it made the artifact `before`; until then it waits for the lock of `last`."""
    killed: list[int] = []
    over, held = threading.Event(), threading.Event()

    def look() -> None:
        with store.working(last):
            held.set()
            while not over.wait(0.02):
                if store.find(before) is not None and (found := workers(name)):
                    os.kill(found[0], signal.SIGKILL)
                    killed.append(found[0])
                    return

    thread = threading.Thread(target=look)
    thread.start()
    assert held.wait(60)
    try:
        yield killed
    finally:
        over.set()
        thread.join()


@pytest.mark.usefixtures("ray_alone")
def test_ray_makes_the_pictures_of_one_process_and_a_killed_worker_loses_nothing(
    flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    asked = [replace(requests_for(prompt, FAMILIES["flux"], size=(64, 48), steps=2, seed=1 + at)[0], index=at)
             for at, prompt in enumerate(PROMPTS)]
    local = run_all(make_plan(Job("flux", asked, model=flux, devices=["cpu"])))
    (line,) = BY_RAY
    more = ("--model", str(flux), "--size", "64x48", "--device", "cpu", "--steps", "2", "--artifacts", "store")
    store = open_store(str(tmp_path / "store"))
    keys = local.keys["denoise"]
    with killing("Denoise", store, keys[0], keys[3]) as killed:
        printed = answered(line, tmp_path, *more)
    assert len(killed) == 1 and not Path(f"/proc/{killed[0]}").exists()
    assert len(printed) == len(PROMPTS) == len(set(printed))
    for path, picture in zip(sorted(printed), local.pictures, strict=True):
        assert np.array_equal(Image.open(tmp_path / path), picture.pixels)
    assert all(store.find(key) is not None for keys in local.keys.values() for key in keys)
    (run,) = store.runs()
    assert store.load_run(run)["status"] == "done"
    # One process finds all of it there.
    again = run_all(make_plan(Job("flux", asked, model=flux, devices=["cpu"])), store=store)
    assert [stage.ran for stage in again.stages] == [0, 0, 0]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_alone")
def test_ray_shows_previews_and_records_memory(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    open_to_others: list[Any] = []

    def emit(kind: str, data: Mapping[str, Any]) -> None:
        if kind == "preview":
            assert data["pixels"]().shape == (16, 16, 3)
            open_to_others.append(heard_from_elsewhere())
            told.append((data["request"], data["step"]))

    asked = [replace(requests_for("a red circle", FAMILIES["demo"], size=(64, 64), steps=2, seed=at)[0], index=at)
             for at in range(2)]
    made = run_on_ray(Job("demo", asked, store=tmp_path / "store", devices=["cpu"],
                          policy=RunPolicy(preview=1, sample_memory=True)), emit=emit)
    assert sorted(told) == [(0, 1), (0, 2), (1, 1), (1, 2)]
    # Only where an address is given does Ray listen to other machines.
    assert open_to_others == [[]] * 4
    store = open_store(str(tmp_path / "store"))
    record = store.load_run(made.run)
    assert [sorted(step for step, _ in strip) for strip in strips(record, store).values()] == [[1, 2], [1, 2]]
    rows = Memory(store, made.run).rows
    assert [row.stage for row in rows] == ["encode", "denoise", "decode"] and all(row.peak > 0 for row in rows)


@pytest.mark.parametrize(
    ("cards", "there", "sizes", "together"),
    [
        ({"encode": 0, "denoise": 0, "decode": 0}, 0, (1, 1, 1), True),
        ({"encode": 1, "denoise": 2, "decode": 1}, 4, (1, 1, 1), True),
        ({"encode": 1, "denoise": 2, "decode": 1}, 9, (1, 3, 1), True),
        ({"encode": 1, "denoise": 1, "decode": 1}, 1000, (1, 50, 1), True),
        ({"encode": 1, "denoise": 2, "decode": 1}, 3, (3, 1, 3), False),
    ],
)
def test_every_card_has_a_worker_and_the_denoise_has_most(
    cards: dict[str, int], there: int, sizes: tuple[int, ...], together: bool
) -> None:
    found = pools(cards, there, 50)
    assert tuple(pool.size for pool in found.by_stage.values()) == sizes and found.together is together
    used = [pool.size * pool.cards for pool in found.by_stage.values()]
    assert (sum(used) if together else max(used)) <= there
    assert all(isinstance(pool, Pool) and pool.cores <= 0.25 for pool in found.by_stage.values())


def test_too_few_cards_are_refused() -> None:
    with pytest.raises(DoesNotFit, match="denoise takes 2 cards, and the cluster has 1 ->"):
        pools({"encode": 1, "denoise": 2}, 1, 4)


@pytest.mark.parametrize(("requests", "size"), [(1, 1), (5, 1), (5, 2), (50, 3), (3, 8)])
def test_groups_are_all_requests_once_and_enough_for_all_workers(requests: int, size: int) -> None:
    found = groups(requests, size)
    assert [at for group in found for at in group] == list(range(requests))
    assert min(size, requests) <= len(found) and max(map(len, found)) <= 4
    rows = group_rows(found, {"encode": [0], "denoise": [], "decode": []})
    assert len(rows) == 1 and '"encode": [0]' in rows[0]["group"]


def test_a_worker_numbers_its_own_cards_and_decides_as_the_plan_does(tmp_path: Path) -> None:
    model = sparse.flux_dev(tmp_path / "flux")
    place = ["encode=1", "denoise=sharded", "decode=1"]
    plan = make_plan(Job("flux", [Request("a fox", 256, 256, 2, 3.5, 1, 32)], model=model,
                         place=place), machine="3x12GB")
    for stage in plan.stages:
        cards = cards_of(plan, stage.name)
        mine = on_own_cards(plan, stage.name)
        names = [f"cuda:{at}" for at in range(len(cards))]
        assert list(mine.devices) == sorted(names) and cards_of(mine, stage.name) == names
        for component in stage.components:
            part = stage.name, component.name
            weights = plan.weights[part]
            ours, theirs = mine.places[part].placement, plan.places[part].placement
            assert sorted(ours.share(weights).values()) == sorted(theirs.share(weights).values())
    assert isinstance(mine.places["denoise", "transformer"].placement, Sharded)
    assert artifact_keys(mine) == artifact_keys(plan)


def test_what_goes_wrong_in_a_worker_is_told_by_kind(tmp_path: Path) -> None:
    """An error of a stage arrives whole: with its kind, its fixes and the stage."""
    said = StageOutOfMemory("denoise ran out of memory", (Fix("lanes", 1),), ((Fix("size", "32x32"),),),
                            stage="denoise")
    worker = Denoise.__new__(Denoise)
    worker._error = said.to_json()
    (row,) = group_rows([range(1)], {"denoise": [0]})
    error = from_json(json.loads(worker(row)["group"])["error"])
    assert isinstance(error, StageOutOfMemory) and str(error) == "denoise ran out of memory"
    assert (error.stage, error.fixes, error.alternatives) == ("denoise", said.fixes, said.alternatives)


def test_options_that_contradict_ray_are_refused() -> None:
    check_engine(RunOptions(engine="ray"), launched=False)
    with pytest.raises(InvalidInput, match="a launcher started this one"):
        check_engine(RunOptions(engine="ray"), launched=True)
    wrongs: tuple[tuple[dict[str, Any], str], ...] = (
        ({"ranks": "2"}, "--ranks has no meaning"), ({"gpus": "0"}, "--gpus has no meaning"),
        ({"artifacts": "memory"}, "a store that all"),
        ({"place": ["denoise=tensor_parallel"]}, "contradict each other"),
    )
    for wrong, says in wrongs:
        with pytest.raises(InvalidInput, match=says):
            check_engine(RunOptions(engine="ray", **wrong), launched=False)
        check_engine(RunOptions(**wrong), launched=False)


def test_what_ray_does_not_do_is_refused_in_python_too() -> None:
    asked = requests_for("a fox", FAMILIES["demo"])
    for more, says in (({"store": "memory"}, "a store that all"),
                       ({"place": ["denoise=tensor_parallel"]}, "contradict")):
        with pytest.raises(InvalidInput, match=says):
            run_on_ray(Job("demo", asked, **more))


def test_batch_is_the_command_of_the_family_that_it_names(capsys: pytest.CaptureFixture[str]) -> None:
    for words, says in ((("flucks",), "there is no family 'flucks' -> did you mean flux? choose from flux, "),
                        (("--engine", "ray", "--ranks", "2"), "--ranks has no meaning with --engine ray"),
                        (("flux-schnell", "--guidance", "3"), "flux-schnell takes no guidance")):
        assert answer(["batch", "--prompt", "x", *words]) == 2
        assert says in capsys.readouterr().err
