"""What a run's record keeps of its events: bounded, complete at the borders, and right about peaks."""

import threading
import time
from typing import Any

import pytest

from runner.engine.recorder import BORDERS, MOST_SAMPLES, MOST_SPANS, Recorder, Sample, Span, joined, thinned
from runner.events import silent


def told(recorder: Recorder, requests: int, steps: int) -> None:
    """The events of a denoise stage."""
    recorder("stage", {"stage": "denoise", "requests": requests, "reused": 0})
    recorder("load", {"stage": "denoise", "component": "transformer", "bytes": 1, "device": "cpu"})
    recorder("loaded", {"stage": "denoise", "seconds": 0.1})
    for index in range(requests):
        recorder("item", {"stage": "denoise", "index": index, "of": requests})
        for step in range(steps):
            recorder("step", {"stage": "denoise", "step": step + 1, "steps": steps})
        recorder("part", {"part": "compute", "seconds": 0.5})
        recorder("part", {"part": "save", "seconds": 0.25})
    recorder("flush", {"stage": "denoise", "freed": 7, "left": 0, "leftovers": []})
    recorder("end", {"stage": "denoise", "seconds": {}, "peak": {"cpu": 9}})


def test_every_event_goes_on_and_what_matters_is_kept() -> None:
    heard: list[str] = []
    now = iter(range(1000))
    recorder = Recorder(lambda kind, data: heard.append(kind), ["cpu"], clock=lambda: float(next(now)))
    told(recorder, 1, 2)
    recorder("warning", {"text": "low on luck"})
    found: dict[str, Any] = recorder.document()
    assert heard == ["stage", "load", "loaded", "item", "step", "step", "part", "part", "flush", "end", "warning"]
    assert found["warnings"] == ["low on luck"]
    timeline = found["timeline"]
    assert [sample[2] for sample in timeline["samples"]] == heard[:-1]
    assert all(sample[1] == "denoise" and sample[3] == [] and sample[4] > 2**20 for sample in timeline["samples"])
    assert [(span["part"], span["busy"]) for span in timeline["spans"]] == [
        ("load", 0.1), ("compute", 0.5), ("save", 0.25)]
    assert timeline["flushes"][0]["freed"] == 7 and timeline["peaks"] == {"denoise": {"cpu": 9}}


def test_a_run_of_ten_thousand_pictures_has_a_record_no_larger_than_that_of_few() -> None:
    recorder = Recorder(silent, ["cpu"])
    told(recorder, 10_000, 2)
    timeline = recorder.document()["timeline"]
    assert len(timeline["samples"]) <= MOST_SAMPLES and len(timeline["spans"]) <= MOST_SPANS
    kinds = [sample[2] for sample in timeline["samples"]]
    assert [kind for kind in kinds if kind in BORDERS] == ["stage", "load", "loaded", "flush", "end"]
    compute = [span for span in timeline["spans"] if span["part"] == "compute"]
    assert sum(span["count"] for span in compute) == 10_000
    assert sum(span["busy"] for span in compute) == pytest.approx(5000)
    times = [sample[0] for sample in timeline["samples"]]
    assert times == sorted(times)


def test_thinning_keeps_borders_and_the_higher_of_two() -> None:
    used = [("stage", 0), ("step", 3), ("step", 9), ("tick", 4), ("flush", 0), ("step", 1)]
    samples = [Sample(float(at), "denoise", what, (size, 1), 5) for at, (what, size) in enumerate(used)]
    assert [(sample.what, sample.used[0]) for sample in thinned(samples)] == [
        ("stage", 0), ("step", 9), ("tick", 4), ("flush", 0), ("step", 1)]


def test_joined_spans_keep_their_rows_and_their_work() -> None:
    spans = [Span("denoise", part, lane, float(at), at + 0.5, 0.5)
             for at in range(4) for part, lane in (("compute", 0), ("compute", 1), ("save", 0))]
    found = joined(spans)
    assert [(s.part, s.lane, s.begin, s.end, s.busy, s.count) for s in found] == [
        (part, lane, begin, begin + 1.5, 1.0, 2)
        for begin in (0.0, 2.0) for part, lane in (("compute", 0), ("compute", 1), ("save", 0))]


def test_lanes_are_told_apart_by_their_threads() -> None:
    recorder = Recorder(silent, ["cpu"])
    recorder("stage", {"stage": "denoise", "requests": 2, "reused": 0})
    both = threading.Barrier(2)

    def lane() -> None:
        both.wait()
        recorder("part", {"part": "compute", "seconds": 0.1})
        both.wait()

    threads = [threading.Thread(target=lane) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(span["lane"] for span in recorder.document()["timeline"]["spans"]) == [0, 1]


def test_ten_samples_a_second_are_taken_on_demand_and_only_inside_of_the_with_statement() -> None:
    with Recorder(silent, ["cpu"], often=True) as recorder:
        deadline = time.monotonic() + 20
        while len(recorder.document()["timeline"]["samples"]) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
    found = recorder.document()["timeline"]["samples"]
    assert len(found) >= 3 and {sample[2] for sample in found} == {"tick"}
    time.sleep(0.3)
    assert len(recorder.document()["timeline"]["samples"]) == len(found)
    with Recorder(silent, ["cpu"]) as quiet:
        time.sleep(0.25)
    assert quiet.document()["timeline"]["samples"] == []
