"""How long a picture takes: the arithmetic from a plan's operations and a card's rate, and what is not known."""

import dataclasses
from pathlib import Path

import pytest
import torch

from runner import Job, Request, make_plan
from runner.planning import picture_time as times
from runner.planning.describe import document, lines
from runner.planning.picture_time import picture_time, spoken
from runner.planning.plan import Plan
from runner.planning.work import Work
from stages.machine import Machine, card_elsewhere, elsewhere, host_rate

HALF = ("cuda:0", torch.float16)


def on(machine: Machine, plan: Plan, **work: Work) -> Plan:
    """The plan with other devices, and other work in its stages."""
    return dataclasses.replace(plan, machine=machine, work={**dict.fromkeys(plan.work, Work({})), **work})


def cards(*labels: str) -> Machine:
    return elsewhere([card_elsewhere(index, 2**34, True, label) for index, label in enumerate(labels)])


@pytest.fixture(scope="module")
def plan(flux: Path) -> Plan:
    """Three steps of a tiny FLUX."""
    request = Request("a fox", 64, 48, steps=3, guidance=3.5, seed=0, text_tokens=16)
    return make_plan(Job("flux", [request], model=flux), machine="2x4090")


def test_the_range_is_the_work_at_parts_of_the_rate(plan: Plan) -> None:
    """65 TFLOP/s are a T4's in float16, of which 12 to 50 % are reached; and 71 a 3090's, of which 25 to 70 %."""
    work = Work({HALF: int(130e12), ("cuda:1", torch.bfloat16): int(142e12)})
    found = picture_time(on(cards("T4", "3090"), plan, denoise=work))
    assert found is not None
    assert found.shortest == pytest.approx(2 / 0.5 + 2 / 0.7) and found.longest == pytest.approx(2 / 0.12 + 2 / 0.25)
    assert found.steps == 3 and found.step == pytest.approx(272e12 / 3)
    assert str(found) == (
        "a picture takes 6.9 s to 25 s, estimated, not measured: 3 steps of 90.7 TFLOP, encode and decode, at 12 to "
        "50 % of 65 TFLOP/s in float16 (T4) and 25 to 70 % of 71 TFLOP/s in bfloat16 (3090); loading the weights "
        "comes on top")


def test_what_waits_elsewhere_is_copied_or_read(plan: Plan) -> None:
    """A copy may hide behind the computing or not; a disk is as fast as it was measured, or its time is not told."""
    work = Work({HALF: int(65e12)}, copied=int(126e9), read=int(10e9))
    found = picture_time(on(cards("T4"), plan, denoise=work), disk_rate=1e9)
    assert found is not None and found.unread == 0
    assert found.shortest == pytest.approx(126e9 / 12.6e9 + 10)
    assert found.longest == pytest.approx(1 / 0.12 + 20 + 20)
    unknown = picture_time(on(cards("T4"), plan, denoise=work))
    assert unknown is not None and unknown.shortest == pytest.approx(10)
    assert "loading the weights, and reading 9.3 GiB from the disk meanwhile, come on top" in str(unknown)


@pytest.mark.parametrize(("label", "dtype"), [
    ("hypothetical", torch.float16), ("Radeon", torch.float16), ("T4", torch.bfloat16), ("4090", torch.float64),
])
def test_of_what_is_not_known_no_time_is_told(label: str, dtype: torch.dtype, plan: Plan) -> None:
    other = on(cards(label), plan, denoise=Work({("cuda:0", dtype): 10}))
    assert picture_time(other) is None and document(other)["picture"] is None
    assert not [line for line in lines(other) if "a picture takes" in line]


def test_a_host_is_measured(plan: Plan, flux: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert host_rate(torch.float32, seconds=0.0) > 1e6
    here = make_plan(Job("flux", list(plan.requests), model=flux, devices=["cpu"]))
    monkeypatch.setattr(times, "host_rate", lambda dtype: {torch.float32: 2e9}[dtype])
    slow = dataclasses.replace(here, work={"denoise": Work({("cpu", torch.float32): int(36e12)})})
    found = picture_time(slow)
    assert found is not None and (found.shortest, found.longest) == pytest.approx((18000, 60000))
    text = " ".join(" ".join(lines(slow)).split())
    assert "a picture takes 5.0 h to 17 h, estimated" in text and "(measured on this CPU)" in text
    assert "less to compute: flux2-klein (4 steps)" in text and "dtype='bfloat16' takes half the memory" in text
    moment = " ".join(" ".join(lines(here)).split())
    assert "less to compute" not in moment and "a picture takes less than a second, estimated" in moment


def test_the_work_of_a_plan_is_counted_for_all_of_its_steps_and_where_it_is_done(flux: Path) -> None:
    """Twice the steps are twice the work, and cards that share the blocks share the work."""
    def work(steps: int, **more: object) -> dict[str, Work]:
        request = Request("a fox", 64, 48, steps=steps, guidance=3.5, seed=0, text_tokens=16)
        job = Job("flux", [request], model=flux, modulation_table=False, **more)  # type: ignore[arg-type]
        return dict(make_plan(job, machine="2x4090").work)

    one, two = work(8), work(16)
    assert two["denoise"].total == 2 * one["denoise"].total > 0
    assert two["encode"] == one["encode"] and one["encode"].copied == one["denoise"].read == 0
    dealt = work(8, place=["denoise=sharded"])["denoise"]
    assert {device for device, _ in dealt.flops} == {"cuda:0", "cuda:1"} and min(dealt.flops.values()) > 0
    assert dealt.total == one["denoise"].total


def test_seconds_in_words() -> None:
    assert [spoken(seconds) for seconds in (0.42, 12.3, 89, 91, 2400, 6000, 72_000, 400_000)] == [
        "0.4 s", "12 s", "89 s", "1.5 min", "40 min", "1.7 h", "20 h", "4.6 days"]
