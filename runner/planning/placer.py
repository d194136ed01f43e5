"""Placing the stages of a run one after the other: dry_run, choose the ladder, dry_run what it gave."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import torch

from runner.planning.cache import PlanCache, recalled
from runner.planning.cutting import cut
from runner.planning.ladder import LADDER, Ask, NoStrategyFits, Strategy, choose
from runner.planning.parallel import processes
from runner.planning.place_option import PlaceRequest, granted
from runner.planning.precompute import Saving, saving
from stages.errors import Fix
from stages.estimate.dry_run import Estimate, dry_run, one_thread
from stages.estimate.memory_tracker import MixedDevices
from stages.loading.disk_weights import bytes_read_per_pass
from stages.machine import Machine
from stages.models.format import choose_dtype
from stages.models.skeleton import skeleton
from stages.models.weights import Weights, weigh
from stages.pipeline.stage import Inputs, Stage
from stages.placement.placement import DISK, Place, Placement, Resident
from stages.placement.sharded import remainder
from stages.state import State

TILES = (1024, 512, 256)
TRIES = 4


@dataclass(frozen=True)
class Need:
    """Bytes on a device during a stage."""

    weights: int
    activations: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.activations


@dataclass
class Placed:
    """The stages placed so far."""

    places: dict[str, Place] = field(default_factory=dict)
    weights: dict[str, Weights] = field(default_factory=dict)
    needs: dict[str, dict[str, Need]] = field(default_factory=dict)
    rungs: dict[str, tuple[Strategy, ...]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    savings: dict[str, Saving] = field(default_factory=dict)
    lanes: int = 1
    reads: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Placer:
    """What decides where the components of every stage go.

    `lanes` requests are denoised at once; without it as many of the `requests` as there are cards to keep busy.
    """

    machine: Machine
    inputs: Inputs
    dtypes: Mapping[str, torch.dtype]
    wishes: Mapping[str, PlaceRequest]
    offload: str | None
    lanes: int | None
    smaller: Mapping[str, float]
    table: bool = True
    requests: int = 1

    def place(self, stages: Sequence[Stage], known: PlanCache | None = None) -> Placed:
        """All stages placed; NoStrategyFits for the first that does not fit. What is `known` is not asked again."""
        done, state, known = Placed(), State(), known or PlanCache()
        with one_thread():
            for stage in stages:
                state = self._place(stage, state, done, known)
        return done

    def _place(self, stage: Stage, state: State, done: Placed, known: PlanCache) -> State:
        types = dict(self._types(stage, done))
        precomputed = self._folded(stage, state, types, done, known)
        weights = {component.name: weigh(component, types[component.name], precomputed.get(component.name, ()))
                   for component in stage.components}
        row = sum(done.savings[name].row for name in precomputed)
        task = Task(stage, state, types, weights, precomputed, row, known)
        refused: list[Strategy] = []
        for tile in (None, *self._tiles()) if stage.name == "decode" else (None,):
            try:
                places, found, rungs = self._fitted(task, tile)
                if stage.name == "denoise" and rungs[-1].name in LADDER:
                    done.lanes, places, found, rungs = self._laned(task, places, found, rungs)
                break
            except NoStrategyFits as error:
                refused += error.rungs if tile is None else ()
                last = error
        else:
            raise last
        done.places |= places
        done.weights |= weights
        done.reads[stage.name] = sum(
            bytes_read_per_pass(component, places[component.name]) for component in stage.components)
        done.needs[stage.name] = task.needs(places, found)
        tiles = rungs if tile is None else (Strategy(f"tiles of {tile} pixels"),)
        done.rungs[stage.name] = (*refused, *tiles)
        return found.state

    def _folded(
        self, stage: Stage, state: State, types: Mapping[str, torch.dtype], done: Placed, known: PlanCache
    ) -> dict[str, frozenset[str]]:
        """By component, the layers that the modulation table stands in for."""
        if stage.name != "denoise":
            return {}
        dtype = types[stage.components[0].name]
        found = recalled(known.savings, (dtype, self.inputs, self.table), state,
                         lambda: saving(stage, dtype, state, self.inputs, self.table))
        done.savings[found.component] = found
        return {found.component: found.layers}

    def _tiles(self) -> Iterator[int]:
        sides = [side for side in (self.inputs["width"], self.inputs["height"]) if isinstance(side, int)]
        return (tile for tile in TILES if tile < max(sides))

    def _types(self, stage: Stage, done: Placed) -> Iterator[tuple[str, torch.dtype]]:
        for component in stage.components:
            asked = self.dtypes.get(component.name) or self.dtypes.get("")
            choice = choose_dtype(component.class_name, self.machine.devices)
            done.reasons[component.name] = "asked for" if asked else choice.reason
            yield component.name, asked or choice.dtype

    def _fitted(self, task: "Task", tile: int | None) -> tuple[dict[str, Place], Estimate, tuple[Strategy, ...]]:
        """Places that fit with what the rehearsal at those places took."""
        count = processes(self.wishes.get(task.stage.name, PlaceRequest()).rung)
        if count is not None:
            return cut(self, task, count)
        best = max(self.machine.cards or self.machine.devices, key=lambda device: device.room).name
        at_best = task.places({name: Resident(best, tile) for name in task.types})
        found = self.rehearsed(task, at_best)
        reserve = Counter(dict.fromkeys((device.name for device in self.machine.devices), found.peak[best]))
        pinned = frozenset[str]()
        for _ in range(TRIES):
            placements, rungs = self._climbed(task, found, reserve, pinned)
            places = task.places({name: placement.tiled(tile) for name, placement in placements.items()})
            try:
                found = found if places == at_best else self.rehearsed(task, places)
            except MixedDevices:
                # Branches that meet again must do so on one card: only the longest row of blocks is dealt.
                if pinned:
                    raise
                pinned = frozenset(name for weights in task.weights.values() for name in branches(weights))
                continue
            over = {name: need.total - room for name, need in task.needs(places, found).items()
                    if (room := self.machine.room(name)) is not None}
            if max(over.values()) <= 0:
                break
            reserve.update({name: excess for name, excess in over.items() if excess > 0})
        else:
            half = next((size for size, part in self.smaller.items() if part <= 0.5), None)
            raise NoStrategyFits(f"{task.stage.name}: its activations outgrow every reserve -> choose a smaller "
                                 f"`size`", rungs, (Fix("size", half),) if half else ())
        return places, found, rungs

    def _laned(
        self, task: "Task", places: dict[str, Place], found: Estimate, rungs: tuple[Strategy, ...]
    ) -> tuple[int, dict[str, Place], Estimate, tuple[Strategy, ...]]:
        """As many lanes as asked for; or as fit without streaming, up to one for each card that the denoiser is on."""
        if self.lanes is not None:
            return self.lanes, places, found, rungs
        for count in range(min(busy(places), self.requests), 1, -1):
            try:
                more = replace(self, lanes=count)._fitted(task, None)
            except NoStrategyFits:
                continue
            if busy(more[0]) > 1:
                return count, *more
        return 1, places, found, rungs

    def _climbed(
        self, task: "Task", found: Estimate, reserve: Mapping[str, int], pinned: frozenset[str]
    ) -> tuple[dict[str, Placement], tuple[Strategy, ...]]:
        stage, weights = task.stage, task.weights
        wish = self.wishes.get(stage.name, PlaceRequest())

        @cache
        def rest(name: str) -> tuple[str, ...]:
            component = next(component for component in stage.components if component.name == name)
            return remainder(skeleton(component, task.types[name]), weights[name].blocks)

        ask = Ask(
            stage.name, weights, found.work, reserve, rest,
            fixed={name: granted(value, weights[name], self.machine, rest) for name, value in wish.places.items()},
            lanes=self._lanes(stage), split=stage.name != "decode", offload=self.offload, pinned=pinned,
            smaller={} if stage.name == "encode" else self.smaller,
        )
        return choose(ask, self.machine, wish.rung)

    def rehearsed(self, task: "Task", places: Mapping[str, Place]) -> Estimate:
        """What the stage takes at these places."""
        scratch = {device.name: device.scratch for device in self.machine.devices}
        found = recalled(
            task.known.rehearsals, (task.stage.name, dict(places), self.inputs, scratch), task.state,
            lambda: dry_run(task.stage, places, task.weights, task.state, self.inputs, scratch, task.known.costs),
        )
        # A lane takes the row of its call along to every device that computes.
        peak = {name: (size + task.row * (size > 0)) * self._lanes(task.stage) for name, size in found.peak.items()}
        return replace(found, peak=peak)

    def _lanes(self, stage: Stage) -> int:
        return self.lanes or 1 if stage.name == "denoise" else 1


def busy(places: Mapping[str, Place]) -> int:
    """How many cards take turns: those that blocks are dealt over. One where blocks are streamed to them."""
    (placement, *others) = (place.placement for place in places.values())
    return 1 if others else placement.concurrency


@dataclass(frozen=True)
class Task:
    """A stage to be placed: the state that it starts from, the types and weights of its components.

    The modulation table stands in for the layers in `precomputed`; a call of the denoiser reads `row` bytes of it.
    """

    stage: Stage
    state: State
    types: Mapping[str, torch.dtype]
    weights: Mapping[str, Weights]
    precomputed: Mapping[str, frozenset[str]]
    row: int
    known: PlanCache

    def places(self, placements: Mapping[str, Placement]) -> dict[str, Place]:
        """The components at these placements."""
        return {name: Place(placements[name], dtype, self.precomputed.get(name, frozenset()))
                for name, dtype in self.types.items()}

    def needs(self, places: Mapping[str, Place], found: Estimate) -> dict[str, Need]:
        """Bytes on each device at these places, where the rehearsal found `found`."""
        shares = Counter[str]()
        for name, weights in self.weights.items():
            shares.update(places[name].placement.share(weights))
        return {name: Need(shares[name], found.peak.get(name, 0)) for name in sorted({*shares, *found.peak}, key=rank)}


def rank(device: str) -> tuple[bool, int, str]:
    """Where a device stands in tables: cards by their numbers, then what is not a card."""
    return device in ("cpu", DISK), len(device), device


def branches(weights: Weights) -> list[str]:
    """The blocks outside the row, such as `layers`, that has most bytes."""
    rows = Counter[str]()
    for name, size in weights.blocks.items():
        rows[name.rpartition(".")[0]] += size
    heaviest = rows.most_common(1)[0][0]
    return [name for name in weights.blocks if name.rpartition(".")[0] != heaviest]
