"""What a placement says of itself, and that a block that waits elsewhere goes back there whatever happens."""

import threading
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn

from stages.models.weights import Weights
from stages.placement.placement import DISK, Place, Placement, Resident, through_host
from stages.placement.sharded import Sharded, remainder
from stages.placement.streaming import Streamed
from stages.placement.tensor_parallel import TensorParallel
from stages.placement.tiling import Tiling
from stages.placement.transfers import direct, via_host

BLOCKS = {"a.0": "cuda:0", "a.1": "cuda:1", "a.2": "cuda:0"}
WEIGHTS = Weights("transformer", dict.fromkeys(BLOCKS, 100), {"b": 10})
SHARDED = Sharded("cuda:0", BLOCKS, ("b",))
STREAMED = Streamed("cuda:0", BLOCKS, ("b",), cpu_blocks=frozenset({"a.1"}), disk_blocks=frozenset({"a.2"}))
PARALLEL = TensorParallel(("cuda:0", "cuda:1"), 155)
TILING = Tiling(512, whole=640 * 480)
ALL = [Resident("cuda:0"), SHARDED, STREAMED, PARALLEL]


def test_what_each_device_holds_between_calls() -> None:
    assert Resident("cuda:1").share(WEIGHTS) == {"cuda:1": 310}
    assert SHARDED.share(WEIGHTS) == {"cuda:0": 210, "cuda:1": 100}
    assert STREAMED.share(WEIGHTS) == {"cuda:0": 110, "cpu": 100, DISK: 100}
    assert PARALLEL.share(WEIGHTS) == {"cuda:0": 155, "cuda:1": 155}


def test_requests_in_flight_and_processes() -> None:
    assert [placement.concurrency for placement in ALL] == [1, 2, 1, 1]
    assert [placement.processes for placement in ALL] == [1, 1, 1, 2]
    assert [placement.loads_directly for placement in ALL] == [True, True, True, False]


@pytest.mark.parametrize("placement", ALL, ids=lambda placement: type(placement).__name__)
def test_a_process_that_sees_other_names(placement: Placement) -> None:
    names = {"cuda:0": "cuda:3", "cuda:1": "cuda:2"}
    moved = placement.renamed(names)
    assert moved.entry == names[placement.entry]
    assert moved.compute_devices == {name: names[device] for name, device in placement.compute_devices.items()}
    assert moved.renamed({new: old for old, new in names.items()}) == placement
    assert placement.renamed({}) == placement


def test_only_a_vae_on_one_device_has_tiles() -> None:
    assert [placement.tiled(TILING).tiling for placement in ALL] == [TILING, None, None, None]
    assert Resident("cpu", TILING).tiled(None) == Resident("cpu")
    assert all(placement.tiled(TILING) is placement for placement in ALL[1:])


def test_a_picture_is_tiled_that_is_longer_than_a_tile_and_has_more_pixels_than_fit_whole() -> None:
    sizes = [(512, 512), (640, 480), (480, 640), (1024, 256), (640, 512), (2048, 256)]
    assert [TILING.tile(*size) for size in sizes] == [None, None, None, None, 512, 512]
    assert Tiling(512).tile(513, 16) == 512
    assert (str(TILING), str(Tiling(512))) == ("in tiles of 512 pixels where a picture has more than 307,200",
                                               "in tiles of 512 pixels")


def test_only_a_cut_component_differs_by_rank() -> None:
    assert [placement.for_rank(1) is placement for placement in ALL] == [True, True, True, False]
    assert [PARALLEL.for_rank(rank).entry for rank in (0, 1)] == ["cuda:0", "cuda:1"]


def test_through_the_host() -> None:
    places = {type(placement).__name__: Place(placement, torch.float32) for placement in ALL}
    around = through_host(places)
    assert all(place.placement.transfer is direct for place in places.values())
    assert all(place.placement.transfer is via_host for place in around.values())
    assert {name: replace(place, placement=replace(place.placement, via_host=False))
            for name, place in around.items()} == places


class Row(nn.Module):
    """Blocks in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.a:
            x = block(x)
        return x


def test_a_streamed_block_that_fails_is_put_back_and_lets_the_next_one_in() -> None:
    model, moved = Row(), list[str]()

    def transfer(tensor: torch.Tensor, device: str) -> torch.Tensor:
        moved.append(device)
        return tensor.clone()

    placement = Streamed("cpu", {"a.0": "cpu", "a.1": "cpu"}, remainder(model, ["a.0", "a.1"]),
                         cpu_blocks=frozenset({"a.1"}))
    placement.attach(model, "cpu", transfer)
    waiting = [tensor.data_ptr() for tensor in model.a[1].parameters()]
    moved.clear()
    broken = torch.ones(1, 3)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        model.a[1](broken)
    assert moved == ["cpu", "cpu", "cpu"], "its input, and its weight and bias"
    # The lock is free: another thread gets in, too.
    thread = threading.Thread(target=model, args=(torch.ones(1, 2),))
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert [tensor.data_ptr() for tensor in model.a[1].parameters()] == waiting
    reference = weakref.ref(model.a[1])
    del model, thread
    assert reference() is None, "nothing holds it, and no garbage was collected"
