"""Fixtures of the whole suite, above all the cards that the tests run on."""

import fcntl
import gc
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import hypothesis
import pytest

# One thread for torch in each process, set before it is imported and handed on to subprocesses: two test processes
# fill two cores, and on tensors this small threads cost ten times what they give.
os.environ["OMP_NUM_THREADS"] = "1"
# Left to itself, MKL chooses kernels by where in memory an operand lies, so that equal products differ in a last bit.
os.environ["MKL_CBWR"] = "AVX2,STRICT"

# What whoever runs the tests has set for runs of their own is nothing to them.
for _name in [name for name in os.environ if name.startswith("STAGERUN_")]:
    del os.environ[_name]
os.environ["STAGERUN_CONFIG"] = ""

# A machine that is busy with other tests is slow, not wrong.
hypothesis.settings.register_profile("busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("busy")

# A background job of a plain shell ignores Ctrl-C, and nohup a lost terminal; so would whatever a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

Cards = Callable[..., list[str]]

# What takes long and looks again at what other tests look at: marked slow.
SECOND_LOOK = (
    "test_benchmarks.py::test_on_cards[sim-load]",
    "test_benchmarks.py::test_on_cards[sim-lanes]",
    "test_benchmarks.py::test_on_cards[sim-memory]",
    "test_benchmarks.py::test_on_cards[sim-overhead]",
    "test_cluster.py::test_ray_makes_the_pictures_of_one_process",
    "test_cluster.py::test_ray_shows_previews",
    "test_errors.py::test_what_would_fit_is_proposed_by_ranks_too",
    "test_gpu_benchmark.py::test_all_ways_run_on_a_simulated_card",
    "test_hosts.py::test_the_script_for_slurm",
    "test_launchers.py::test_a_killed_rank",
    "test_midway.py::test_every_family_goes_on_from_any_step[flux2-klein-base]",
    "test_midway.py::test_every_family_goes_on_from_any_step[z-image-base]",
    "shows_what_is_stored[03_where_memory_goes]",
    "shows_what_is_stored[04_many_prompts]",
    "shows_what_is_stored[05_distributed]",
    "test_plan.py::test_other_families_of_real_size",
    "test_plan.py::test_with_the_modulation_table_plans_hold_too",
    "test_plan_command.py::test_the_whole_command_takes_little_longer",
    "test_ranks.py::test_ranks_show_previews",
    "test_remote.py::test_three_machines_share_a_bucket",
    "test_scheduler_choice.py::test_the_picture_is_that_of_diffusers_with_this_scheduler[FlowMatchLCM",
    "test_sim_libraries.py::test_cpu_work_is_the_same",
    "test_streams.py::test_lanes_on_one_card_make_what_the_cpu_makes[drawn1]",
    "test_streams.py::test_lanes_on_one_card_make_what_the_cpu_makes[drawn2]",
    "test_streams.py::test_lanes_over_two_cards_make_what_the_cpu_makes[drawn1]",
    "test_streams.py::test_lanes_over_two_cards_make_what_the_cpu_makes[drawn2]",
    "test_streams.py::test_the_host_waits_once_a_step_and_for_the_step_before[sim-denoise=resident]",
    "test_tiles.py::test_a_picture_that_is_there_stays_whole",
    "test_tiles.py::test_a_repeated_picture_is_decoded_as_it_was",
    "test_tiles.py::test_a_run_goes_on_as_it_was_planned",
)

# Below this a real card has no room beside what is not ours: cuBLAS takes 8 to 32 MiB, torch reserves 20 MiB steps.
_LEAST_REAL_LIMIT = 256 * 2**20


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two processes for the whole suite; one for files named on the command line, and where there are real cards.

    Two, as more would each build the checkpoints that tests share; one, as starting two takes longer than a file, and
    as the limits of a real card hold in one process alone.
    """
    named = config.args_source is pytest.Config.ArgsSource.ARGS
    return 0 if named or _real_cards() else 2


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark what is left out unless it is asked for."""
    if any(part in item.nodeid for part in SECOND_LOOK):
        item.add_marker("slow")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep, of each test on cards, the variant that this process can run.

    A process has one `torch.accelerator`, and the simulated one takes it over once loaded. So where CUDA devices are,
    tests run on those, and `-m "not gpu"` runs them on simulated cards; elsewhere the gpu variants are deselected.
    """
    real = [item for item in items if item.get_closest_marker("gpu")]
    if not real:
        return
    if not _real_cards():
        dropped = real
    else:
        dropped = [item for item in real if _simulates(item)]
        reason = "real cards are here, and a process has one accelerator: -m 'not gpu' runs the simulated ones"
        for item in items:
            if _simulates(item):
                item.add_marker(pytest.mark.skip(reason=reason))
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        gone = set(dropped)
        items[:] = [item for item in items if item not in gone]


def pytest_collection_finish() -> None:
    """Keep what was imported so far out of garbage collection, as the command line does: flushes collect often."""
    _look_away()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """After each file also what was imported and kept since: in a long run a collection came to take 0.2 s."""
    if nextitem is not None and nextitem.path != item.path:
        _look_away()


def _look_away() -> None:
    gc.unfreeze()
    gc.collect()
    gc.freeze()


@pytest.fixture
def sim() -> ModuleType:
    """The module `tests.sim`, for faults and counters; a test that asks for it never runs on real cards."""
    return _simulated()


SCHEDULES = {"sim": "synchronous", "late": "late", "early": "early", "drawn0": 0, "drawn1": 1, "drawn2": 2}
"""When simulated cards do what they are asked for, by what the cards of a test are called."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests of streams have their cards under every schedule, and others simulated cards that do all at once."""
    its_own = [mark for mark in metafunc.definition.iter_markers("parametrize") if "cards" in mark.args[0]]
    if "cards" in metafunc.fixturenames and not its_own:
        streams = metafunc.definition.get_closest_marker("streams") is not None
        real = pytest.param("cuda", marks=pytest.mark.gpu)
        metafunc.parametrize("cards", [*(SCHEDULES if streams else ["sim"]), real], indirect=True)


@pytest.fixture
def cards(request: pytest.FixtureRequest) -> Iterator[Cards]:
    """A function of limits in bytes that gives as many devices: `cards(12_000_000, 8_000_000)` -> two names.

    The cards are simulated, or real ones with their memory capped; a real one's cap is 256 MiB at the least.
    """
    yield from _cuda_cards() if request.param == "cuda" else _sim_cards(SCHEDULES[request.param])


def _sim_cards(schedule: str | int) -> Iterator[Cards]:
    sim = _simulated()

    def give(*limits: int) -> list[str]:
        sim.configure(limits)
        sim.reset()
        sim.schedule(schedule)
        for index in range(len(limits)):
            _reset_counters(index)
        return [f"sim:{index}" for index in range(len(limits))]

    yield give
    sim.reset()
    sim.withdraw()


def _cuda_cards() -> Iterator[Cards]:
    import torch

    def give(*limits: int) -> list[str]:
        if len(limits) > _real_cards():
            pytest.skip(f"needs {len(limits)} cards, there are {_real_cards()}")
        gc.collect()
        torch.accelerator.empty_cache()
        for index, limit in enumerate(limits):
            total = torch.accelerator.get_memory_info(index)[1]
            torch.cuda.set_per_process_memory_fraction(min(1.0, max(limit, _LEAST_REAL_LIMIT) / total), index)
            _reset_counters(index)
        return [f"cuda:{index}" for index in range(len(limits))]

    yield give
    gc.collect()
    torch.accelerator.empty_cache()
    for index in range(_real_cards()):
        torch.cuda.set_per_process_memory_fraction(1.0, index)


def _reset_counters(index: int) -> None:
    import torch

    torch.accelerator.reset_peak_memory_stats(index)
    torch.accelerator.reset_accumulated_memory_stats(index)


def _simulated() -> ModuleType:
    from torch.utils import cpp_extension

    compiler = cpp_extension.get_cxx_compiler()
    if shutil.which(compiler) is None:
        pytest.skip(f"no C++ compiler to build the simulated cards with: {compiler} is not on the path")
    from tests import sim

    return sim


def _real_cards() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _simulates(item: pytest.Item) -> bool:
    callspec = getattr(item, "callspec", None)
    on_sim = callspec is not None and callspec.params.get("cards") in SCHEDULES
    return on_sim or "sim" in getattr(item, "fixturenames", ())


@pytest.fixture
def ray_alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One Ray at a time: two that start at once on a machine may choose the same ports."""
    with open(tmp_path_factory.getbasetemp().parent / "ray.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random FLUX checkpoint with the guidance embedding; read it, do not change it."""
    from tests.tiny import flux

    return flux(tmp_path_factory.mktemp("models") / "flux")


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder and a cache of its own for each test; what a run froze is thawed."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        monkeypatch.setenv(name, "error")
    yield
    gc.unfreeze()
