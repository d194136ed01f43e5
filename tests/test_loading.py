"""What loading gives is what the library gives, bit for bit, on every device."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

from stages.errors import ModelError
from stages.loading import pinned_copy
from stages.loading.load import load
from stages.loading.pinned_copy import PendingTensor, copy_to_devices
from stages.models.checkpoint import Component, find
from stages.models.safetensors_header import TensorEntry
from stages.models.skeleton import new_skeleton
from stages.models.weights import StoredTensor, weigh
from stages.placement.placement import DISK, Place, Resident
from stages.placement.sharded import remainder
from stages.placement.streaming import Streamed
from tests.test_weights import loaded, save, tiny_sd3

Cards = Callable[..., list[str]]


def wan() -> Any:
    """A transformer with parts that stay in float32, and with buffers that no file has."""
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )


@pytest.fixture
def parts(tmp_path: Path, flux: Path) -> list[Component]:
    """Components with everything that a tensor can be: cast or not, a parameter or a buffer, in the files or not."""
    vae = find(flux).components["vae"]
    return [save(tmp_path / "wan", wan()), save(tmp_path / "sd3", tiny_sd3()), vae]


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_is_as_the_library_loads_it(
    parts: list[Component], cards: Cards, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """By pieces that no tensor is a multiple of."""
    monkeypatch.setattr(pinned_copy, "PIECE", 360)
    for device in ("cpu", *cards(2**30)):
        for component in parts:
            theirs, ours = loaded(component, dtype), load(component, Place(Resident(device), dtype))
            expected, found = tensors(theirs), tensors(ours)
            assert list(found) == list(expected) and type(ours) is type(theirs) and not ours.training
            for name, tensor in found.items():
                assert str(tensor.device) == device and tensor.dtype == expected[name].dtype, name
                assert torch.equal(tensor.cpu(), expected[name].cpu()), name


def test_every_tensor_is_copied_once_to_its_card(flux: Path, cards: Cards, sim: ModuleType) -> None:
    """The first block on one card, the second on the other, the third on the host, the others on the disk."""
    component, devices = find(flux).components["transformer"], cards(2**30, 2**30)
    weights = weigh(component, torch.bfloat16)
    first, second, third, *others = weights.blocks
    dealt = {first: devices[0], **dict.fromkeys((second, third, *others), devices[1])}
    placement = Streamed(devices[0], dealt, remainder(new_skeleton(component), dealt), cpu_blocks=frozenset({third}),
                         disk_blocks=frozenset(others))
    sim.reset_copied()
    model = load(component, Place(placement, torch.bfloat16))
    share = placement.share(weights)
    assert others and sim.copied() == {("cpu", device): share[device] for device in devices}
    held = {device: sum(t.nbytes for t in tensors(model).values() if str(t.device) == device)
            for device in (*devices, "cpu", "meta")}
    assert {DISK if device == "meta" else device: size for device, size in held.items()} == share


def test_a_file_that_ends_too_early_is_told(tmp_path: Path, cards: Cards) -> None:
    (card,) = cards(2**30)
    (tmp_path / "short.safetensors").write_bytes(bytes(100))
    target = torch.empty(64, device=card)
    source = StoredTensor(tmp_path / "short.safetensors", "part.weight", TensorEntry("F32", (64,), 20, 256))
    with pytest.raises(ModelError, match=r"short\.safetensors ends within part\.weight; fetch it again"):
        copy_to_devices([PendingTensor(source, torch.float32, target)])


def test_a_missing_tensor_is_told_by_name(tmp_path: Path, cards: Cards) -> None:
    from safetensors.torch import load_file, save_file

    component = save(tmp_path / "wan", wan())
    held = load_file(component.files[0])
    del held["blocks.1.ffn.net.2.weight"]
    save_file(held, component.files[0], {"format": "pt"})
    with pytest.raises(ModelError, match=r"asks for 1 tensor that the files lack: blocks\.1\.ffn\.net\.2\.weight"):
        load(component, Place(Resident(*cards(2**30)), torch.float32))
