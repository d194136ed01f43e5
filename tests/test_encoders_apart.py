"""Text encoders at different places: one whole on the card, of another some blocks wait on the host."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from runner import Job, Plan, Request, make_plan, run_all
from stages.errors import DoesNotFit
from stages.placement.placement import Resident
from stages.placement.streaming import Streamed
from tests import tiny

ASKED = [Request("a red circle", 64, 48, 2, 3.5, 7, 32)]


def planned(model: Path, device: str, limit: int) -> Plan | None:
    """The plan where T5 is whole on the card and CLIP is not; None where the limit leads to another."""
    try:
        plan = make_plan(Job("flux", ASKED, model=model, devices=[device], dtype="float32", max_memory=limit,
                             allow_offload="cpu"))
    except DoesNotFit:
        return None
    clip, t5 = (plan.places["encode", name].placement for name in ("text_encoder", "text_encoder_2"))
    return plan if isinstance(clip, Streamed) and isinstance(t5, Resident) else None


def test_ids_go_to_each_encoder_where_the_other_waits_on_the_host(
    tmp_path: Path, cards: Callable[..., list[str]]
) -> None:
    model = tiny.flux(tmp_path / "flux", text=64, text_layers=8)
    whole = run_all(make_plan(Job("flux", ASKED, model=model, devices=["cpu"], dtype="float32")))
    (device,) = cards(200 * 10**6)
    need = make_plan(Job("flux", ASKED, model=model, devices=[device], dtype="float32")).needs["encode"][device]
    plan = next((plan for less in range(10_000, 200_000, 20_000)
                 if (plan := planned(model, device, need.total - less)) is not None), None)
    assert plan is not None, "no limit leads to the mix that this test is about"
    assert np.array_equal(run_all(plan).pictures[0].pixels, whole.pictures[0].pixels)
