"""The ladder and the deal, on numbers alone."""

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.planning.ladder import NoStrategyFits, PlacementProblem, choose
from runner.planning.suggestions import least_change
from stages.errors import Fix
from stages.machine import Device, Machine
from stages.models.weights import Weights
from stages.placement.balance import Blocks, partition
from stages.placement.placement import Resident
from stages.placement.sharded import Sharded
from stages.placement.streaming import Streamed

GB = 10**9
# FLUX.1-dev in bfloat16: 19 double and 38 single blocks, with the same operations in each.
DOUBLE, SINGLE, REST = 679_661_568, 283_170_816, 128_756_864
FLUX = Weights(
    "transformer",
    {f"double.{i}": DOUBLE for i in range(19)} | {f"single.{i}": SINGLE for i in range(38)},
    {"embedders": REST},
)
T5 = Weights("text_encoder_2", {f"block.{i}": 380 * 10**6 for i in range(24)}, {"shared": 263 * 10**6})
CLIP = Weights("text_encoder", {"": 246 * 10**6}, {})


def machine(*free: int, host: int = 64 * GB) -> Machine:
    """Simulated cards, which need nothing for a runtime."""
    cards = tuple(Device(f"sim:{index}", size, size, True) for index, size in enumerate(free))
    return Machine(cards, host, host)


def problem(*weights: Weights, reserve: int = GB // 2, **more: Any) -> PlacementProblem:
    work = {w.component: dict.fromkeys(w.blocks, 1000) for w in weights}
    held = {f"sim:{index}": reserve for index in range(8)}
    return PlacementProblem("denoise", {w.component: w for w in weights}, work, held, lambda name: ("rest",), **more)


def per_card(placement: object, weights: Weights) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes and number of blocks by card."""
    assert isinstance(placement, Sharded)
    blocks = list(placement.devices.values())
    return placement.share(weights), {card: blocks.count(card) for card in dict.fromkeys(blocks)}


def test_the_whole_model_goes_to_the_card_with_most_room() -> None:
    placements, strategies = choose(problem(FLUX), machine(16 * GB, 30 * GB, 24 * GB))
    assert placements == {"transformer": Resident("sim:1")}
    assert [strategy.name for strategy in strategies] == ["resident"]


def test_encoders_go_to_different_cards_when_they_do_not_fit_together() -> None:
    placements, strategies = choose(problem(CLIP, T5), machine(10 * GB, 1 * GB))
    assert placements == {"text_encoder_2": Resident("sim:0"), "text_encoder": Resident("sim:1")}
    assert strategies[0].refused.startswith("9.0 GiB of weights on one device; sim:0 has 8.8 GiB for them")
    assert strategies[-1].name == "spread"


def test_two_equal_cards_share_bytes_and_work_of_flux() -> None:
    """The sandwich: dealt by bytes alone, one card would do 70 % of the work."""
    (placement,) = choose(problem(FLUX), machine(16 * GB, 16 * GB))[0].values()
    size, blocks = per_card(placement, FLUX)
    assert sorted(blocks.values()) == [28, 29]
    assert max(size.values()) - min(size.values()) < 0.02 * sum(size.values())
    assert placement.device_map["rest"] == placement.device_map["double.0"] == placement.device_map["single.37"]


def test_unequal_cards_are_filled_instead_of_spilling() -> None:
    """accelerate puts 4.29 GB on the CPU here while card 0 has 4 GB of room."""
    (placement,) = choose(problem(FLUX, reserve=0), machine(16 * GB, 8 * GB))[0].values()
    size, _ = per_card(placement, FLUX)
    assert size["sim:0"] <= 16 * GB and size["sim:1"] <= 8 * GB and sum(size.values()) == FLUX.total


def test_no_more_cards_than_needed_unless_there_are_requests_for_them() -> None:
    four = machine(*[12 * GB] * 4)
    assert len(per_card(choose(problem(FLUX), four)[0]["transformer"], FLUX)[0]) == 3
    size, blocks = per_card(choose(problem(FLUX, lanes=4), four)[0]["transformer"], FLUX)
    assert len(size) == 4 and max(blocks.values()) <= 16


def test_a_component_without_blocks_is_never_split() -> None:
    whole = Weights("transformer", {"": 20 * GB}, {})
    with pytest.raises(NoStrategyFits, match="transformer cannot be split"):
        choose(problem(whole), machine(16 * GB, 16 * GB))


def test_every_refused_strategy_shows_its_arithmetic_and_the_least_change() -> None:
    two = machine(8 * GB, 8 * GB)
    with pytest.raises(NoStrategyFits) as refused:
        choose(problem(FLUX), two)
    text = str(refused.value)
    assert "resident: 22.2 GiB of weights on one device; sim:0 has 7.0 GiB for them (7.5 GiB free" in text
    assert "sim:0, sim:1 have 7.0 GiB + 7.0 GiB = 14.0 GiB for them" in text
    assert "streamed: what does not fit would wait in host memory, which nobody allowed" in text
    words, fixes = least_change(problem(FLUX), two)
    assert fixes == (Fix("allow_offload", "cpu"),) and "GiB would wait in host memory" in words


def test_the_change_that_an_error_names_makes_it_fit() -> None:
    two = machine(8 * GB, 8 * GB)
    (placement,) = choose(problem(FLUX, offload="cpu"), two)[0].values()
    size, _ = per_card(placement, FLUX)
    # What waits is as little as can be: one block less would not leave room for the one that passes.
    assert 8 * GB < size["cpu"] < FLUX.total - 2 * (7.5 * GB - DOUBLE) + 2 * DOUBLE
    assert all(size[card] + DOUBLE <= 7.5 * GB for card in ("sim:0", "sim:1"))


def test_streamed_blocks_stand_between_the_others() -> None:
    (placement,) = choose(problem(FLUX, offload="cpu"), machine(16 * GB))[0].values()
    assert isinstance(placement, Streamed)
    waits = [name in placement.cpu_blocks for name in FLUX.blocks]
    longest = max(len(list(run)) for waiting, run in itertools.groupby(waits) if waiting)
    assert 20 <= sum(waits) <= 30 and longest == 1


def test_streaming_needs_the_host_memory_too() -> None:
    """4 GB are 3.7 GiB, of which a quarter is left to the process."""
    two = machine(8 * GB, 8 * GB, host=4 * GB)
    with pytest.raises(NoStrategyFits, match=r"would wait in host memory, which has 3\.5 GiB for it"):
        choose(problem(FLUX, offload="cpu"), two)
    words, fixes = least_change(problem(FLUX, offload="cpu"), two)
    assert "3.2 GiB would wait in host memory and be copied to the card and 6.3 GiB would be read from the" in words
    assert fixes == (Fix("allow_offload", "disk"),)


def test_what_the_host_cannot_hold_stays_on_the_disk_and_no_more() -> None:
    two = machine(8 * GB, 8 * GB, host=4 * GB)
    (placement,) = choose(problem(FLUX, offload="disk"), two)[0].values()
    assert isinstance(placement, Streamed) and not placement.cpu_blocks & placement.disk_blocks
    share = placement.share(FLUX)
    assert two.host_room - DOUBLE < share["cpu"] <= two.host_room and sum(share.values()) == FLUX.total
    assert placement.device_map[min(placement.disk_blocks)] == "meta"
    (roomy,) = choose(problem(FLUX, offload="disk"), machine(8 * GB, 8 * GB))[0].values()
    assert isinstance(roomy, Streamed) and not roomy.disk_blocks
    assert roomy.cpu_blocks == placement.cpu_blocks | placement.disk_blocks


def test_where_only_the_host_computes_blocks_stay_on_the_disk() -> None:
    host = Machine((Device("cpu", 8 * GB, 8 * GB, False),), 8 * GB, 8 * GB)
    with pytest.raises(NoStrategyFits):
        choose(problem(FLUX), host)
    assert least_change(problem(FLUX), host)[1] == (Fix("allow_offload", "disk"),)
    (placement,) = choose(problem(FLUX, offload="disk"), host)[0].values()
    assert isinstance(placement, Streamed) and not placement.cpu_blocks
    assert placement.share(FLUX)["cpu"] + DOUBLE < host.devices[0].room


def test_what_more_memory_is_said_to_do_it_does() -> None:
    assert least_change(problem(FLUX, split=False), machine(16 * GB, host=GB)) == (
        "it would fit with 7.8 GiB more on sim:0", ())
    choose(problem(FLUX), machine(16 * GB + int(7.8 * 2**30)))


def test_a_limit_that_is_the_only_hindrance_is_named() -> None:
    first = machine(30 * GB).devices[0]
    tight = Machine((Device("sim:0", first.total, first.free, True, limit=10 * GB),), GB, GB)
    with pytest.raises(NoStrategyFits, match=r"limited to 9\.3 GiB"):
        choose(problem(FLUX), tight)
    assert least_change(problem(FLUX), tight) == ("it fits without `max_memory`", (Fix("max_memory"),))


def test_a_strategy_that_is_asked_for_is_the_only_one_tried() -> None:
    placements, _ = choose(problem(FLUX), machine(30 * GB, 16 * GB), only="sharded")
    assert isinstance(placements["transformer"], Sharded)
    large = machine(30 * GB, 1 * GB)
    with pytest.raises(NoStrategyFits):
        choose(problem(FLUX), large, only="spread")
    assert least_change(problem(FLUX), large, "spread")[0] == "it fits without `place=denoise`"


def test_what_is_placed_by_hand_leaves_its_room_to_nobody() -> None:
    fixed = {"text_encoder_2": Resident("sim:1")}
    placements, _ = choose(problem(CLIP, T5, fixed=fixed), machine(10 * GB, 10 * GB))
    assert placements == {**fixed, "text_encoder": Resident("sim:0")}
    with pytest.raises(NoStrategyFits, match="as placed: sim:1 lacks"):
        choose(problem(CLIP, T5, fixed=fixed), machine(10 * GB, 8 * GB))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=9),
    st.lists(st.integers(0, 30), min_size=2, max_size=3),
)
def test_a_deal_fits_and_is_found_whenever_there_is_one(blocks: list[tuple[int, int]], rooms: list[int]) -> None:
    hand = Blocks([size for size, _ in blocks], [work for _, work in blocks])
    found = partition(hand, rooms)
    every = [d for d in itertools.product(range(len(rooms)), repeat=len(blocks)) if legal(hand, rooms, d)]
    assert (found is not None) == bool(every)
    if found is not None:
        assert legal(hand, rooms, found)
        if len(rooms) == 2:
            least = min(busiest(hand, deal_) for deal_ in every)
            assert busiest(hand, found) <= least + least // 50


def legal(hand: Blocks, rooms: list[int], cards: tuple[int, ...]) -> bool:
    """Whether every card has room, and one run of blocks; card 0 may have the first and the last."""
    full = [sum(size for size, card in zip(hand.sizes, cards, strict=True) if card == c) for c in range(len(rooms))]
    order = [card for card, _ in itertools.groupby(cards)]
    inner = order[1 if order[0] == 0 else 0 : -1 if order[-1] == 0 and len(order) > 1 else len(order)]
    single = len(set(inner)) == len(inner) and 0 not in inner
    return single and all(size <= room for size, room in zip(full, rooms, strict=True))


def busiest(hand: Blocks, cards: tuple[int, ...]) -> int:
    """The work of the card that has most."""
    return max(sum(w for w, card in zip(hand.work, cards, strict=True) if card == c) for c in set(cards))
