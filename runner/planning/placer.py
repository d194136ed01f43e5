"""Placing the stages of a run one after the other: estimate, choose from the ladder, estimate what it gave."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache

import torch

from runner.planning.cache import PlanCache, recalled
from runner.planning.ladder import NoStrategyFits, PlacementProblem, Strategy, choose
from runner.planning.place_option import StagePlaces, process_devices, resolve
from runner.planning.placed import Placed, Tried, concurrency
from runner.planning.precompute import table_saving
from runner.planning.stage_task import StageTask, branches
from runner.planning.tiles import Size, by_pixels, heaviest, smaller_tiles, tiled, tilings
from runner.planning.work import work_of
from runner.text import gib
from stages.errors import DoesNotFit, Fix, InvalidInput
from stages.estimate.dry_run import Estimate, dry_run, one_thread
from stages.estimate.memory_tracker import MixedDevices
from stages.estimate.rehearsal import rehearse
from stages.loading.disk_weights import bytes_read_per_pass
from stages.machine import Machine
from stages.models.format import choose_dtype
from stages.models.skeleton import skeleton
from stages.models.weights import weigh
from stages.pipeline.stage import Inputs, Stage
from stages.placement.placement import Place, Placement, Resident
from stages.placement.sharded import remainder
from stages.placement.tensor_parallel import TensorParallel, bytes_per_device
from stages.placement.tiling import Tiling
from stages.state import State

TRIES = 8
Fitted = tuple[dict[str, Place], Estimate, Tried]


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
    sizes: tuple[Size, ...] = ()
    """The sizes of all pictures, in pixels."""
    tile: int | None = None
    """Pixels along a side of the tiles to decode in, 0 for none; None: only pictures that do not fit whole."""
    whole: int = 0
    """Pixels up to which a picture is decoded whole although `tile` says tiles."""

    def place(self, stages: Sequence[Stage], known: PlanCache | None = None) -> Placed:
        """All stages placed; NoStrategyFits for the first that does not fit."""
        done, state, known, tasks = Placed(), State(), known or PlanCache(), list[StageTask]()
        with one_thread():
            for stage in stages:
                state = self._place(stage, state, done, known, tasks)
        return done

    def _place(
        self, stage: Stage, state: State, done: Placed, known: PlanCache, tasks: list[StageTask]
    ) -> State:
        types = dict(self._types(stage, done))
        if stage.name == "denoise":
            self._rehearse(stage, state, types, known)
        precomputed = self._precomputed(stage, state, types, done, known)
        weights = {component.name: weigh(component, types[component.name], precomputed.get(component.name, ()))
                   for component in stage.components}
        row = sum(done.savings[name].row for name in precomputed)
        task = StageTask(stage, state, types, weights, precomputed, row, known)
        if stage.name == "decode":
            places, estimate, tried = self._decoder(task, tasks)
        else:
            places, estimate, tried = self._fitted(task)
        if stage.name == "denoise" and self._processes(stage) is None:
            done.lanes, places, estimate, tried = self._with_lanes(task, places, estimate, tried)
        tasks.append(task)
        done.places |= {(stage.name, name): place for name, place in places.items()}
        done.weights |= {(stage.name, name): weight for name, weight in weights.items()}
        reads = {each.name: bytes_read_per_pass(each, places[each.name]) for each in stage.components}
        done.reads[stage.name] = sum(reads.values())
        done.work[stage.name] = work_of(places, weights, estimate, reads, max(self.counts, default=1))
        done.needs[stage.name] = task.needs(places, estimate)
        done.strategies[stage.name] = tried
        return estimate.state

    def _rehearse(self, stage: Stage, state: State, types: Mapping[str, torch.dtype], known: PlanCache) -> None:
        weights = {component.name: weigh(component, types[component.name]) for component in stage.components}
        recalled(known.rehearsals, (types, self.inputs, self.counts, stage.checkpoint.scheduler), state,
                 lambda: rehearse(stage, types, weights, state, self.inputs, self.counts, known.costs))

    def _precomputed(
        self, stage: Stage, state: State, types: Mapping[str, torch.dtype], done: Placed, known: PlanCache
    ) -> dict[str, frozenset[str]]:
        """By component, the layers that the modulation table stands in for."""
        if stage.name != "denoise":
            return {}
        dtype = types[stage.components[0].name]
        saving = recalled(known.savings, (dtype, self.inputs, self.table, stage.checkpoint.scheduler), state,
                          lambda: table_saving(stage, dtype, state, self.inputs, self.table))
        done.savings[saving.component] = saving
        return {saving.component: saving.layers}

    def _types(self, stage: Stage, done: Placed) -> Iterator[tuple[str, torch.dtype]]:
        for component in stage.components:
            asked = self.dtypes.get(component.name) or self.dtypes.get("")
            choice = choose_dtype(component.class_name, self.machine.devices)
            done.reasons[stage.name, component.name] = "asked for" if asked else choice.reason
            yield component.name, asked or choice.dtype

    def _processes(self, stage: Stage) -> int | None:
        return self.asked.get(stage.name, StagePlaces()).processes

    def _decoder(self, task: StageTask, before: Sequence[StageTask]) -> Fitted:
        """The decoder for whole pictures; or where the largest does not fit, in the largest tiles that do.

        `before` are the stages that make what it starts from.
        """
        errors: list[NoStrategyFits] = []
        for tiling in tilings(self.tile, self.whole, self.sizes):
            try:
                places, estimate, tried = self._tiled(task, before, tiling)
            except NoStrategyFits as error:
                errors.append(error)
                continue
            if tiling is None:
                return places, estimate, tried
            if self.tile is None:
                places, estimate = self._fewest_tiled(task, before, places, estimate, tiling)
            refused = errors[0].tried if errors else ()
            return places, estimate, (*refused, Strategy(f"tiles of {tiling.side} pixels"))
        raise errors[-1] if self.tile is None else self._with_tiles(errors[-1], task, before, self.tile)

    def _tiled(self, task: StageTask, before: Sequence[StageTask], tiling: Tiling | None) -> Fitted:
        """The decoder with these tiles, and what it takes at most for any of the sizes."""
        places, estimate, tried = self._fitted(task, tiling)
        peak = Counter(estimate.peak)
        for size in heaviest(self.sizes, tiling) - {(self.inputs["width"], self.inputs["height"])}:
            other = self._of_size(size, task, before, places)
            over = self._over(task, places, other)
            if max(over.values()) > 0:
                raise self._outgrown(task.stage, over, tried)
            peak |= Counter(other.peak)
        return places, replace(estimate, peak=peak), tried

    def _fewest_tiled(
        self, task: StageTask, before: Sequence[StageTask], places: dict[str, Place], estimate: Estimate,
        tiling: Tiling,
    ) -> tuple[dict[str, Place], Estimate]:
        """The places with as many of the pictures decoded whole as fit, in order of their pixels."""
        peak = Counter(estimate.peak)
        counts = by_pixels(size for size in self.sizes if tiling.tile(*size))

        def fits(pixels: int) -> bool:
            whole = tiled(places, replace(tiling, whole=pixels))
            found = [self._of_size(size, task, before, whole) for size in counts[pixels]]
            if max(max(self._over(task, whole, each).values()) for each in found) > 0:
                return False
            for each in found:
                peak.update(Counter(each.peak) - peak)
            return True

        count = bisect_left(list(counts), True, key=lambda pixels: not fits(pixels))
        if not count:
            return places, estimate
        return tiled(places, replace(tiling, whole=list(counts)[count - 1])), replace(estimate, peak=peak)

    def _with_tiles(
        self, error: NoStrategyFits, task: StageTask, before: Sequence[StageTask], tile: int
    ) -> NoStrategyFits:
        """The error of a decoder that does not fit as asked, with the tiles with which it does."""
        for side in (*([tile] if self.whole else []), *smaller_tiles(tile, self.sizes)):
            with suppress(NoStrategyFits):
                self._tiled(task, before, Tiling(side))
                if error.problem is not None:
                    error.problem = replace(error.problem, tile=side)
                    return error
                text = f"decode does not fit with pictures of up to {self.whole:,} pixels whole -> `tile={side}`"
                return NoStrategyFits(text, error.tried, (Fix("tile", side),))
        return error

    def _of_size(
        self, size: Size, task: StageTask, before: Sequence[StageTask], places: Mapping[str, Place]
    ) -> Estimate:
        """What decode takes at these places for a picture of another size."""
        sized = replace(self, inputs={**self.inputs, "width": size[0], "height": size[1]})
        state = State()
        for earlier in before:
            there = earlier.places(dict.fromkeys(earlier.types, Resident(self.machine.devices[0].name)))
            state = sized.estimate(replace(earlier, state=state), there).state
        return sized.estimate(replace(task, state=state), places)

    def _over(self, task: StageTask, places: Mapping[str, Place], estimate: Estimate) -> dict[str, int]:
        """The bytes by which a stage exceeds the room of each device that has a limit; negative where it does not."""
        return {name: need.total - room for name, need in task.needs(places, estimate).items()
                if (room := self.machine.room(name)) is not None}

    def _fitted(self, task: StageTask, tiling: Tiling | None = None) -> Fitted:
        """Places that fit with what the estimate at those places took."""
        processes = self._processes(task.stage)
        if processes is not None:
            return self._tensor_parallel(task, processes)
        best = max(self.machine.cards or self.machine.devices, key=lambda device: device.room).name
        alone = self.estimate(task, task.places({name: Resident(best, tiling) for name in task.types}))
        whole = {device.name: alone.peak[best] for device in self.machine.devices}
        try:
            return self._settled(task, tiling, alone, whole)
        except NoStrategyFits as error:
            if task.stage.name == "decode":
                raise
            # A card with a part of the blocks may compute with less than one that has all of them.
            with suppress(NoStrategyFits):
                return self._settled(task, tiling, alone, {})
            raise error from None

    def _settled(
        self, task: StageTask, tiling: Tiling | None, estimate: Estimate, reserve: Mapping[str, int]
    ) -> Fitted:
        """As `_fitted`, from an estimate and a reserve that grows by what the placements take beyond it."""
        reserve = Counter(reserve)
        first = pinned = frozenset(task.first_blocks())
        over: dict[str, int] = {}
        for _ in range(TRIES):
            placements, tried = self._chosen(task, estimate, reserve, pinned)
            places = tiled(task.places(placements), tiling)
            try:
                estimate = self.estimate(task, places)
            except MixedDevices:
                # Branches that meet again must do so on one card: only the longest row of blocks is dealt.
                if pinned != first:
                    raise
                pinned = first.union(name for weights in task.weights.values() for name in branches(weights))
                continue
            over = self._over(task, places, estimate)
            if max(over.values()) <= 0:
                return places, estimate, tried
            reserve.update({name: excess for name, excess in over.items() if excess > 0})
        raise self._outgrown(task.stage, over, tried)

    def _outgrown(self, stage: Stage, over: Mapping[str, int], tried: Tried) -> NoStrategyFits:
        """The error of a stage whose last placement is `over` the room of devices by so many bytes."""
        most = max(over, key=lambda name: over[name], default="")
        half = next((size for size, part in self.smaller.items() if part <= 0.5), None)
        # What encode takes does not depend on the size.
        fixes = () if stage.name == "encode" or half is None else (Fix("size", half),)
        advice = "choose a smaller `size`" if fixes else f"it would fit with {gib(over.get(most, 0))} more on {most}"
        return NoStrategyFits(f"{stage.name}: its activations outgrow every reserve -> {advice}", tried, fixes)

    def _with_lanes(
        self, task: StageTask, places: dict[str, Place], estimate: Estimate, tried: Tried
    ) -> tuple[int, dict[str, Place], Estimate, Tried]:
        """As many lanes as asked for; or as fit without streaming, up to one for each card that the denoiser is on."""
        if self.lanes is not None:
            return self._lanes(task.stage), places, estimate, tried
        for count in range(min(concurrency(places), self.requests), 1, -1):
            try:
                more = replace(self, lanes=count)._fitted(task)
            except NoStrategyFits:
                continue
            if concurrency(more[0]) > 1:
                return count, *more
        return 1, places, estimate, tried

    def _chosen(
        self, task: StageTask, estimate: Estimate, reserve: Mapping[str, int], pinned: frozenset[str]
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

    def _tensor_parallel(self, task: StageTask, count: int) -> Fitted:
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

    def estimate(self, task: StageTask, places: Mapping[str, Place]) -> Estimate:
        """What the stage takes at these places."""
        scratch = {device.name: device.scratch for device in self.machine.devices}
        found = recalled(
            task.known.estimates,
            (task.stage.name, dict(places), self.inputs, scratch, task.stage.checkpoint.scheduler), task.state,
            lambda: dry_run(task.stage, places, task.weights, task.state, self.inputs, scratch, task.known.costs),
        )
        # A lane takes the row of its call along to every device that computes.
        peak = {name: (size + task.row * (size > 0)) * self._lanes(task.stage) for name, size in found.peak.items()}
        return replace(found, peak=peak)

    def _lanes(self, stage: Stage) -> int:
        """How many requests are in a stage at a time: no more lanes than requests have activations."""
        return min(self.lanes or 1, self.requests) if stage.name == "denoise" else 1
