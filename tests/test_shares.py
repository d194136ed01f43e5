"""The live line of several ranks: how far all of them are, and not the first one alone."""

import io
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from torch.distributed import HashStore

from runner.distributed.channel import Launcher
from runner.distributed.env import Rank
from runner.distributed.shares import Share, Shares
from runner.events import EVENTS
from runner.reports.progress import Progress, Status


def stage(name: str, requests: int, reused: int = 0) -> tuple[str, dict[str, Any]]:
    return "stage", {"stage": name, "requests": requests, "reused": reused}


def item(index: int, of: int) -> tuple[str, dict[str, Any]]:
    return "item", {"stage": "denoise", "index": index, "of": of, "request": index}


def step(number: int, of: int, index: int) -> tuple[str, dict[str, Any]]:
    return "step", {"stage": "denoise", "step": number, "steps": of, "index": index}


def after(*events: tuple[str, Mapping[str, Any]]) -> tuple[str, float, int]:
    share = Share()
    for kind, data in events:
        share(kind, data)
    found = share.document()
    return found["stage"], found["done"], found["of"]


def test_a_share_is_counted_in_pictures_and_parts_of_them() -> None:
    assert after() == ("", 0, 0)
    assert after(stage("encode", 4, 1)) == ("encode", 1, 4)
    # Three requests with two prompts between them, of which one is done.
    assert after(stage("encode", 4, 1), item(0, 2), item(1, 2)) == ("encode", 2.5, 4)
    assert after(stage("denoise", 2), item(0, 2), step(7, 28, 0)) == ("denoise", 0.25, 2)
    # In two lanes, of which the second is ahead.
    lanes = (stage("denoise", 2), item(0, 2), item(1, 2), step(1, 4, 0), step(3, 4, 1))
    assert after(*lanes) == ("denoise", 1.0, 2)
    # An item that another process made meanwhile has no steps.
    assert after(stage("denoise", 3), item(0, 3), item(1, 3), step(2, 4, 1)) == ("denoise", 1.5, 3)
    assert after(*lanes, ("end", {"stage": "denoise"})) == ("denoise", 2, 2)
    assert after(*lanes, stage("decode", 2)) == ("decode", 0, 2)


def test_all_ranks_are_as_far_as_the_last_of_them() -> None:
    told: list[Mapping[str, Any]] = []
    shares = Shares(3, lambda kind, data: told.append(data) if kind == "ranks" else None)

    def beat(rank: int, name: str, done: float, of: int) -> tuple[str, float]:
        shares.see(rank, {"beat": 1, "share": {"stage": name, "done": done, "of": of}})
        assert told[-1].keys() == EVENTS["ranks"].keys() and told[-1]["ranks"] == 3
        return told[-1]["stage"], told[-1]["done"]

    assert beat(0, "", 0, 0) == ("", 0)
    assert beat(0, "denoise", 1.5, 3) == ("denoise", 1.5)
    assert beat(1, "encode", 0, 3) == ("encode", 3)
    assert beat(1, "denoise", 0.5, 3) == ("denoise", 2)
    # The third has nothing to do.
    assert beat(2, "", 0, 0) == ("denoise", 2)
    assert beat(0, "decode", 1, 3) == ("denoise", 3.5)
    count = len(told)
    shares.see(0, {"beat": 2, "share": {"stage": "decode", "done": 1, "of": 3}})
    # Ranks that work together on each picture have no shares.
    shares.see(1, {"beat": 3, "share": None})
    Shares(1, lambda kind, data: told.append(data)).see(0, {"share": {"stage": "encode", "done": 0, "of": 1}})
    assert len(told) == count


def test_the_live_line_tells_of_all_ranks(capsys: Any) -> None:
    now = 0.0
    status = Status(clock=lambda: now)
    status.see("run", {"run": "r", "requests": 8, "model": "m", "seed": 1})
    status.see("ranks", {"ranks": 2, "stage": "", "done": 0})
    status.see(*stage("denoise", 4))
    status.see("ranks", {"ranks": 2, "stage": "denoise", "done": 0.0})
    status.see("load", {"stage": "denoise", "component": "transformer", "bytes": 2**30, "device": "cuda:0"})
    now = 3.0
    assert status.line() == "denoise: 0 % of 8 pictures on 2 ranks, loading transformer (1.0 GiB) on cuda:0, 3 s"
    status.see(*item(0, 4))
    status.see(*step(1, 28, 0))
    now = 13.0
    status.see("ranks", {"ranks": 2, "stage": "denoise", "done": 3.999})
    assert status.line() == "denoise: 49 % of 8 pictures on 2 ranks, 3.25 s/picture, 0:13 left"
    # The first rank is ahead of the others: what it does is no news.
    status.see(*stage("decode", 4))
    assert status.line().startswith("denoise: 49 % of 8 pictures")
    assert all(len(line) <= 80 for line in [status.line()])


def test_what_a_stage_leaves_says_whose_it_is() -> None:
    def told(*events: tuple[str, Mapping[str, Any]]) -> str:
        stream = io.StringIO()
        with Progress(stream) as progress:
            for kind, data in (*events, stage("encode", 2), ("end", {"stage": "encode", "seconds": {"load": 1.5}})):
                progress(kind, data)
        return stream.getvalue()

    assert told() == "encode: 2 pictures in 1.5 s\n"
    assert told(("ranks", {"ranks": 4, "stage": "", "done": 0})) == "rank 0 of 4, encode: 2 pictures in 1.5 s\n"


def test_the_first_rank_of_a_launcher_hears_of_all_shares(monkeypatch: Any) -> None:
    store = HashStore()
    # The package has a function of this name as well.
    module = import_module("torch.distributed.rendezvous")
    monkeypatch.setattr(module, "rendezvous", lambda *_, **__: iter([(store, 0, 2)]))
    first, second = (Launcher(Rank(rank, 2, rank, 2), print) for rank in (0, 1))
    told: list[tuple[str, Mapping[str, Any]]] = []
    first.follow(lambda kind, data: told.append((kind, data)))
    second.beat({"beat": 1, "where": "", "idle": 0, "share": {"stage": "denoise", "done": 0.5, "of": 2}})
    first.beat({"beat": 1, "where": "", "idle": 0, "share": {"stage": "denoise", "done": 1.5, "of": 2}})
    assert told[-1] == ("ranks", {"ranks": 2, "stage": "denoise", "done": 2.0})
