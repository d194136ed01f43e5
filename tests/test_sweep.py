"""Command lines by chance: each is refused with a suggestion that then works, or runs within its figures and makes
the pictures of the unsplit pipeline.

Some sixty that are always the same; `python -m benchmarks.sweep --cases 1000` runs others.
"""

from collections.abc import Iterator
from types import ModuleType

import pytest

from tests.sweep.models import Models

# The last ones each ended with a fault once.
SEEDS = (*range(60), 6015, 6144, 7183, 7279)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("sweep"))


@pytest.fixture
def here(models: Models, sim: ModuleType, elsewhere: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Models]:
    """The models, in whose folder the command lines run; afterwards there are no cards."""
    monkeypatch.chdir(models.folder)
    yield models
    sim.reset()
    sim.withdraw()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_command_line_by_chance(here: Models, seed: int) -> None:
    from tests.sweep.case import case_of
    from tests.sweep.judge import verdict

    case = case_of(seed, here)
    ended = verdict(case, here)
    assert not ended.fault, f"{case}\n{case.words}\n{ended}"
