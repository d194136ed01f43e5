"""Placing the stages of a run one after the other: estimate, choose from the ladder, estimate what it gave."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch

from runner.planning.cache import PlanCache, recalled
from runner.planning.ladder import NoStrategyFits, PlacementProblem, Strategy, choose
from runner.planning.place_option import StagePlaces, resolve
from runner.planning.placed import Need, Placed, Tried
from runner.planning.precompute import table_saving
from runner.planning.work import work_of
from runner.text import gib
from stages.errors import DoesNotFit, Fix, InvalidInput
from stages.estimate.dry_run import Estimate, dry_run, one_thread
from stages.estimate.memory_tracker import MixedDevices
from stages.estimate.rehearsal import rehearse
from stages.loading.disk_weights import bytes_read_per_pass
from stages.loading.lora_merge import bytes_to_merge
from stages.machine import Machine
from stages.models.format import choose_dtype
from stages.models.skeleton import skeleton
from stages.models.weights import Weights, weigh
from stages.pipeline.stage import Inputs, Stage
from stages.placement.placement import DISK, Place, Placement, Resident
from stages.placement.sharded import remainder
from stages.placement.tensor_parallel import TensorParallel, bytes_per_device
from stages.state import State

TILES = (1024, 512, 256)
TRIES = 4


@dataclass(frozen=True)
class Placer:
    """What decides where the components of every stage go."""

    machine: Machine
    """The devices, with their limits."""
    inputs: Inputs
    """The largest request, under diffusers' names."""
    dtypes: Mapping[str, torch.dtype]
    """Types by component; "" for all others."""
    asked: Mapping[str, StagePlaces]
    """By stage, the places that were asked for."""
    offload: str | None
    """Whether blocks may wait in host memory ("cpu"), and on the disk ("disk")."""
    lanes: int | None
    """Requests to denoise at a time; None: as many of `requests` as there are cards to keep busy."""
    smaller: Mapping[str, float]
    """Smaller pictures (WxH) with their part of the pixels."""
    table: bool = True
    """Whether there may be a modulation table."""
    requests: int = 1
    """How many there are."""
    counts: frozenset[int] = frozenset()
    """How many steps they take."""

    def place(self, stages: Sequence[Stage], known: PlanCache | None = None) -> Placed:
        """All stages placed; NoStrategyFits for the first that does not fit."""
        done, state, known = Placed(), State(), known or PlanCache()
        with one_thread():
            for stage in stages:
                state = self._place(stage, state, done, known)
        return done

    def _place(self, stage: Stage, state: State, done: Placed, known: PlanCache) -> State:
        types = dict(self._types(stage, done))
        if stage.name == "denoise":
            self._rehearse(stage, state, types, known)
        precomputed = self._precomputed(stage, state, types, done, known)
        weights = {component.name: weigh(component, types[component.name], precomputed.get(component.name, ()))
                   for component in stage.components}
        row = sum(done.savings[name].row for name in precomputed)
        task = StageTask(stage, state, types, weights, precomputed, row, known)
        refused: list[Strategy] = []
        for tile in (None, *self._tiles()) if stage.name == "decode" else (None,):
            try:
                places, estimate, tried = self._fitted(task, tile)
                if stage.name == "denoise" and self._processes(stage) is None:
                    done.lanes, places, estimate, tried = self._with_lanes(task, places, estimate, tried)
                break
            except NoStrategyFits as error:
                refused += error.tried if tile is None else ()
                last = error
        else:
            raise last
        tiles = tried if tile is None else (Strategy(f"tiles of {tile} pixels"),)
        done.places |= {(stage.name, name): place for name, place in places.items()}
        done.weights |= {(stage.name, name): weight for name, weight in weights.items()}
        reads = {component.name: bytes_read_per_pass(component, places[component.name])
                 for component in stage.components}
        done.reads[stage.name] = sum(reads.values())
        done.work[stage.name] = work_of(places, weights, estimate, reads, max(self.counts, default=1))
        done.needs[stage.name] = task.needs(places, estimate)
        done.strategies[stage.name] = (*refused, *tiles)
        return estimate.state

    def _rehearse(self, stage: Stage, state: State, types: Mapping[str, torch.dtype], known: PlanCache) -> None:
        weights = {component.name: weigh(component, types[component.name]) for component in stage.components}
        recalled(known.rehearsals, (types, self.inputs, self.counts), state,
                 lambda: rehearse(stage, types, weights, state, self.inputs, self.counts, known.costs))

    def _precomputed(
        self, stage: Stage, state: State, types: Mapping[str, torch.dtype], done: Placed, known: PlanCache
    ) -> dict[str, frozenset[str]]:
        """By component, the layers that the modulation table stands in for."""
        if stage.name != "denoise":
            return {}
        dtype = types[stage.components[0].name]
        saving = recalled(known.savings, (dtype, self.inputs, self.table), state,
                          lambda: table_saving(stage, dtype, state, self.inputs, self.table))
        done.savings[saving.component] = saving
        return {saving.component: saving.layers}

    def _tiles(self) -> Iterator[int]:
        sides = [side for side in (self.inputs["width"], self.inputs["height"]) if isinstance(side, int)]
        return (tile for tile in TILES if tile < max(sides))

    def _types(self, stage: Stage, done: Placed) -> Iterator[tuple[str, torch.dtype]]:
        for component in stage.components:
            asked = self.dtypes.get(component.name) or self.dtypes.get("")
            choice = choose_dtype(component.class_name, self.machine.devices)
            done.reasons[stage.name, component.name] = "asked for" if asked else choice.reason
            yield component.name, asked or choice.dtype

    def _processes(self, stage: Stage) -> int | None:
        return self.asked.get(stage.name, StagePlaces()).processes

    def _fitted(self, task: "StageTask", tile: int | None) -> tuple[dict[str, Place], Estimate, Tried]:
        """Places that fit with what the estimate at those places took."""
        processes = self._processes(task.stage)
        if processes is not None:
            return self._tensor_parallel(task, processes)
        best = max(self.machine.cards or self.machine.devices, key=lambda device: device.room).name
        at_best = task.places({name: Resident(best, tile) for name in task.types})
        estimate = self.estimate(task, at_best)
        reserve = Counter(dict.fromkeys((device.name for device in self.machine.devices), estimate.peak[best]))
        first = pinned = frozenset(task.first_blocks())
        over: dict[str, int] = {}
        for _ in range(TRIES):
            placements, tried = self._chosen(task, estimate, reserve, pinned)
            places = task.places({name: placement if tile is None else placement.tiled(tile)
                                  for name, placement in placements.items()})
            try:
                estimate = estimate if places == at_best else self.estimate(task, places)
            except MixedDevices:
                # Branches that meet again must do so on one card: only the longest row of blocks is dealt.
                if pinned != first:
                    raise
                pinned = first.union(name for weights in task.weights.values() for name in branches(weights))
                continue
            over = {name: need.total - room for name, need in task.needs(places, estimate).items()
                    if (room := self.machine.room(name)) is not None}
            if max(over.values()) <= 0:
                break
            reserve.update({name: excess for name, excess in over.items() if excess > 0})
        else:
            raise self._outgrown(task.stage, over, tried)
        return places, estimate, tried

    def _outgrown(self, stage: Stage, over: Mapping[str, int], tried: Tried) -> NoStrategyFits:
        """The error of a stage whose last placement is `over` the room of devices by so many bytes."""
        most = max(over, key=lambda name: over[name], default="")
        half = next((size for size, part in self.smaller.items() if part <= 0.5), None)
        # What encode takes does not depend on the size.
        fixes = () if stage.name == "encode" or half is None else (Fix("size", half),)
        advice = "choose a smaller `size`" if fixes else f"it would fit with {gib(over.get(most, 0))} more on {most}"
        return NoStrategyFits(f"{stage.name}: its activations outgrow every reserve -> {advice}", tried, fixes)

    def _with_lanes(
        self, task: "StageTask", places: dict[str, Place], estimate: Estimate, tried: Tried
    ) -> tuple[int, dict[str, Place], Estimate, Tried]:
        """As many lanes as asked for; or as fit without streaming, up to one for each card that the denoiser is on."""
        if self.lanes is not None:
            return self._lanes(task.stage), places, estimate, tried
        for count in range(min(concurrency(places), self.requests), 1, -1):
            try:
                more = replace(self, lanes=count)._fitted(task, None)
            except NoStrategyFits:
                continue
            if concurrency(more[0]) > 1:
                return count, *more
        return 1, places, estimate, tried

    def _chosen(
        self, task: "StageTask", estimate: Estimate, reserve: Mapping[str, int], pinned: frozenset[str]
    ) -> tuple[dict[str, Placement], Tried]:
        stage, weights = task.stage, task.weights
        asked = self.asked.get(stage.name, StagePlaces())

        @cache
        def rest(name: str) -> tuple[str, ...]:
            component = next(component for component in stage.components if component.name == name)
            return remainder(skeleton(component, task.types[name]), weights[name].blocks)

        problem = PlacementProblem(
            stage.name, weights, estimate.work, reserve, rest,
            fixed={name: resolve(where, weights[name], self.machine, rest)
                   for name, where in asked.components.items()},
            lanes=self.lanes or 1 if stage.name == "denoise" else 1, full_lanes=self._lanes(stage),
            split=stage.name != "decode", offload=self.offload, pinned=pinned,
            smaller={} if stage.name == "encode" else self.smaller,
        )
        return choose(problem, self.machine, asked.strategy)

    def _tensor_parallel(self, task: "StageTask", count: int) -> tuple[dict[str, Place], Estimate, Tried]:
        """The denoiser cut over the first `count` cards, or over all for 0, one process each.

        What an estimate on one card takes is the most that a process takes. Raises NoStrategyFits where that does not
        fit.
        """
        if self.lanes not in (None, 1):
            raise InvalidInput(f"{self.lanes} `lanes` and denoise=tensor_parallel contradict each other: its "
                               f"processes work on one picture together -> leave one of them out")
        cards = process_devices(self.machine, count)
        if len(task.types) != 1:
            raise DoesNotFit(f"the denoise has {' and '.join(task.types)}, and one component can be cut over cards -> "
                             f"leave denoise=tensor_parallel out")
        component = task.stage.components[0]
        name = component.name
        if component.loras:
            raise DoesNotFit("denoise=tensor_parallel reads parts of weights, and LoRA is merged into whole ones -> "
                             "leave `place=denoise` or `loras` out", (Fix("place", None, "denoise"),))
        part = bytes_per_device(component, task.types[name], task.precomputed.get(name, frozenset()), len(cards))
        estimate = self.estimate(task, task.places({name: Resident(cards[0])}))
        taken = estimate.peak[cards[0]]
        estimate = replace(estimate, peak={card: taken * times for card, times in Counter(cards).items()})
        places = task.places({name: TensorParallel(cards, part)})
        for card, need in task.needs(places, estimate).items():
            room = self.machine[card].room
            if need.total > room:
                raise NoStrategyFits(f"denoise does not fit: {gib(part)} of weights and {gib(taken)} of activations "
                                     f"in each of {len(cards)} processes; {card} has {gib(room)} -> cut it over more "
                                     f"cards, or choose a smaller `size`")
        return places, estimate, (Strategy("tensor_parallel"),)

    def estimate(self, task: "StageTask", places: Mapping[str, Place]) -> Estimate:
        """What the stage takes at these places."""
        scratch = {device.name: device.scratch for device in self.machine.devices}
        found = recalled(
            task.known.estimates, (task.stage.name, dict(places), self.inputs, scratch), task.state,
            lambda: dry_run(task.stage, places, task.weights, task.state, self.inputs, scratch, task.known.costs),
        )
        # A lane takes the row of its call along to every device that computes.
        peak = {name: (size + task.row * (size > 0)) * self._lanes(task.stage) for name, size in found.peak.items()}
        return replace(found, peak=peak)

    def _lanes(self, stage: Stage) -> int:
        """How many requests are in a stage at a time: no more lanes than requests have activations."""
        return min(self.lanes or 1, self.requests) if stage.name == "denoise" else 1


@dataclass(frozen=True)
class StageTask:
    """A stage to be placed."""

    stage: Stage
    """The stage."""
    state: State
    """What it starts from: shapes, and numbers that mean nothing."""
    types: Mapping[str, torch.dtype]
    """The types of its components."""
    weights: Mapping[str, Weights]
    """What its components weigh."""
    precomputed: Mapping[str, frozenset[str]]
    """By component, the layers that the modulation table stands in for."""
    row: int
    """Bytes of the table that a call of the denoiser reads."""
    known: PlanCache
    """What other plans found out."""

    def first_blocks(self) -> Iterator[str]:
        """The blocks with the first weight of a component: where that is, a pipeline puts what it gives the model."""
        for component in self.stage.components:
            first = next(name for name, _ in skeleton(component, self.types[component.name]).named_parameters())
            yield from (block for block in self.weights[component.name].blocks if first.startswith(f"{block}."))

    def places(self, placements: Mapping[str, Placement]) -> dict[str, Place]:
        """The components at these placements."""
        return {name: Place(placements[name], dtype, self.precomputed.get(name, frozenset()))
                for name, dtype in self.types.items()}

    def needs(self, places: Mapping[str, Place], estimate: Estimate) -> dict[str, Need]:
        """Bytes on each device at these places."""
        shares = Counter[str]()
        for name, weights in self.weights.items():
            shares.update(places[name].placement.share(weights))
        devices = sorted({*shares, *estimate.peak}, key=device_order)
        merging = Counter[str]()
        for component in self.stage.components:
            if component.loras:
                held = places[component.name].placement.share(self.weights[component.name])
                merging |= Counter(dict.fromkeys(held, bytes_to_merge(component)))
        # Nothing computes while weights are loaded.
        return {name: Need(shares[name], max(estimate.peak.get(name, 0), merging[name])) for name in devices}


def concurrency(places: Mapping[str, Place]) -> int:
    """How many requests in flight keep the devices of a stage busy."""
    (placement, *others) = (place.placement for place in places.values())
    return 1 if others else placement.concurrency


def process_devices(machine: Machine, count: int) -> tuple[str, ...]:
    """The devices of `count` processes: the first cards, or all for 0; on a host without cards, that several times.

    Raises InvalidInput where it is fewer than two, or than there are cards.
    """
    cards = tuple(card.name for card in machine.cards)
    if not cards and count > 1:
        return (machine.devices[0].name,) * count
    found = cards[:count] if count else cards
    if len(found) < max(2, count):
        there = f"{len(cards)} cards ({', '.join(cards)})" if len(cards) > 1 else cards[0] if cards else "no card"
        raise InvalidInput(f"denoise=tensor_parallel needs {max(2, count)} cards, and there is {there} -> leave it "
                           f"out; on a CPU, `ranks=2` says how many processes")
    return found


def device_order(device: str) -> tuple[bool, int, str]:
    """Where a device stands in tables: cards by their numbers, then what is not a card."""
    return device in ("cpu", DISK), len(device), device


def branches(weights: Weights) -> list[str]:
    """The blocks outside the row, such as `layers`, that has most bytes."""
    rows = Counter[str]()
    for name, size in weights.blocks.items():
        rows[name.rpartition(".")[0]] += size
    heaviest = rows.most_common(1)[0][0]
    return [name for name in weights.blocks if name.rpartition(".")[0] != heaviest]
