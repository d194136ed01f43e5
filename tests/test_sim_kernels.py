"""The simulated cards' kernels: the host's bits, views that stay views, devices that do not mix, counted copies."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import Cards

MIB = 2**20
ROOT = Path(__file__).parent.parent

KERNELS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "arithmetic": lambda x: (2 * x + x**2 - x / 3).clamp(-1, 4),
    "linear": lambda x: F.linear(x, x[0, :5], x[1, 0, :5]),
    "matmul": lambda x: x @ x.transpose(1, 2),
    "conv2d": lambda x: F.conv2d(x[None, :2], x[:4, None, :3, :3].repeat(1, 2, 1, 1), x[0, 0, :4], padding=1),
    "conv_transpose2d": lambda x: F.conv_transpose2d(x[None, :2], x[:2, None, :3, :3], stride=2),
    "attention": lambda x: F.scaled_dot_product_attention(x[None], x[None] + 1, x[None] * 2),
    "attention, causal": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None], is_causal=True),
    "attention, masked": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None], attn_mask=x[0] > 0),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:], x[0, 0], x[0, 1]),
    "group_norm": lambda x: F.group_norm(x[None], 2, x[0, 0, :4], x[0, 1, :4]),
    "rms_norm": lambda x: F.rms_norm(x, x.shape[-1:], x[0, 0]),
    "activations": lambda x: F.gelu(x) + F.gelu(x, approximate="tanh") + F.silu(x) + F.softmax(x, -1),
    "embedding": lambda x: F.embedding((x[0, 0] > 0).long(), x[0]),
    "interpolate": lambda x: F.interpolate(x[None], scale_factor=2, mode="nearest"),
    "cat and stack": lambda x: torch.cat([torch.stack([x, x + 1]), x[None]]),
    "index and where": lambda x: torch.where(x > 0, x[[3, 2, 1, 0]], torch.tensor(0.5, dtype=x.dtype)),
    "reductions": lambda x: x.sum() + x.mean(0) + x.amax(1, keepdim=True) + x.std(),
    "sort": lambda x: x.sort(-1).values.cumsum(-1),
    "factories": lambda x: torch.arange(12, device=x.device) + torch.full((12,), 2.5, device=x.device),
    "noncontiguous": lambda x: x.permute(2, 0, 1)[1:, ::2].flip(0).contiguous(),
    "finite": lambda x: torch.isfinite(x / (x > 9)).all(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_results_are_the_hosts_bit_for_bit(
    cards: Cards, sim: ModuleType, kernel: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype
) -> None:
    (card,) = cards(MIB)
    x = torch.randn(4, 12, 12, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected, got = kernel(x), kernel(x.to(card))
    assert str(got.device) == card
    assert got.stride() == expected.stride()
    torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=0, equal_nan=True)


def test_rotary_embeddings_by_complex_numbers_are_the_hosts(cards: Cards, sim: ModuleType) -> None:
    (card,) = cards(MIB)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        angles = torch.outer(torch.arange(6, device=x.device), torch.arange(4, device=x.device).double())
        turned = torch.view_as_complex(x.double().reshape(6, 4, 2)) * torch.polar(torch.ones_like(angles), angles)
        return torch.view_as_real(turned.conj().resolve_conj()).flatten(1)

    x = torch.randn(6, 8)
    there = x.to(card)
    assert torch.equal(rotate(there).cpu(), rotate(x))
    assert torch.equal(torch.view_as_complex(there.view(6, 4, 2)).conj().cpu().imag, -x.view(6, 4, 2)[..., 1])


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.t(), lambda x: x[1:3], lambda x: x[:, ::2], lambda x: x[2], lambda x: x.chunk(2)[1],
        lambda x: x.split([1, 3])[1], lambda x: x.unbind(1)[0], lambda x: x.unsqueeze(0).squeeze(0),
        lambda x: x.view(2, 8), lambda x: x.reshape(16), lambda x: x.permute(1, 0), lambda x: x.diagonal(),
        lambda x: x.detach(), lambda x: x.as_strided((2, 2), (4, 1), 1), lambda x: x.unfold(0, 2, 1),
        lambda x: x.flatten(), lambda x: x.narrow(1, 1, 2), lambda x: x.view(torch.int32), lambda x: x.movedim(0, 1),
        lambda x: x.data, lambda x: x.swapaxes(0, 1)[1:].view_as(x[:, 1:].t()), lambda x: x.contiguous(),
    ],
)
def test_views_share_memory_and_writes_through_them_arrive(
    cards: Cards, sim: ModuleType, view: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    (card,) = cards(MIB)
    host = torch.arange(16.0).view(4, 4)
    there = host.to(card)
    before = torch.accelerator.memory_allocated(card)
    seen = view(there)
    assert torch.accelerator.memory_allocated(card) == before
    assert torch.equal(seen.cpu(), view(host))
    seen.add_(100)
    view(host).add_(100)
    assert torch.equal(there.cpu(), host)
    assert there.untyped_storage().data_ptr() == seen.untyped_storage().data_ptr()


def test_writing_in_place_and_into_out_reaches_the_original(cards: Cards, sim: ModuleType) -> None:
    (card,) = cards(MIB)
    x = torch.arange(6.0, device=card).view(2, 3)
    address = x.data_ptr()
    assert x.mul_(2).sub_(1) is x and x.data_ptr() == address
    x[0].zero_()
    x[:, 1] = 7
    x[x > 8] = -1
    x.index_put_((torch.tensor([1]), torch.tensor([0])), torch.tensor(3.0))
    assert x.tolist() == [[0, 7, 0], [3, 7, -1]]
    whole, row, nothing = torch.zeros(2, 3, device=card), torch.zeros(4, 3, device=card), torch.empty(0, device=card)
    assert torch.add(x, 1, out=whole) is whole
    torch.mul(x, 2, out=row[1:3])
    torch.matmul(x, x.t(), out=nothing)
    assert whole.tolist() == [[1, 8, 1], [4, 8, 0]]
    assert row.tolist() == [[0, 0, 0], [0, 14, 0], [6, 14, -2], [0, 0, 0]]
    assert nothing.tolist() == [[49, 49], [49, 59]]
    values, indices = torch.empty(2, device=card), torch.empty(2, dtype=torch.long, device=card)
    torch.max(x, 1, out=(values, indices))
    assert (values.tolist(), indices.tolist()) == ([7, 7], [1, 1])


def test_inference_mode_works(cards: Cards, sim: ModuleType) -> None:
    (card,) = cards(MIB)
    layer = torch.nn.Linear(3, 3).to(card)
    with torch.inference_mode():
        y = layer(torch.ones(2, 3, device=card)).view(3, 2).t()
        y += 1
        assert y.is_inference() and y.cpu().shape == (2, 3)


def test_autograd_works(sim: ModuleType) -> None:
    """In a process of its own: autograd counts the devices once, at the first backward pass of the process.

    That process leaves without waiting for the thread that autograd keeps for each device.
    """
    code = (
        "import os, torch; from tests import sim; sim.configure([1000000]); layer = torch.nn.Linear(3, 3).to('sim:0');"
        "layer(torch.ones(2, 3, device='sim:0')).sum().backward(); print(layer.weight.grad.tolist(), flush=True);"
        "os._exit(0)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert told.strip() == str([[2.0, 2.0, 2.0]] * 3)


@pytest.mark.parametrize(
    "mix",
    [
        lambda a, b: a + b, lambda a, b: a.add_(b), lambda a, b: a @ b.t(), lambda a, b: torch.cat([a, b]),
        lambda a, b: F.linear(a, b), lambda a, b: F.layer_norm(a, (3,), b[0]), lambda a, b: torch.where(a > 0, a, b),
        lambda a, b: F.conv1d(a[None], b[:, :2, None]), lambda a, b: F.embedding((b[0] > 0).long(), a),
        lambda a, b: F.scaled_dot_product_attention(a[None], b[None], a[None]), lambda a, b: a.addmm(b[:, :1], b[:1]),
    ],
)
@pytest.mark.parametrize("other", ["sim:1", "cpu"])
def test_operations_refuse_tensors_of_two_devices(
    cards: Cards, sim: ModuleType, mix: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], other: str
) -> None:
    first, _ = cards(MIB, MIB)
    a, b = torch.ones(2, 3, device=first), torch.ones(2, 3, device=other)
    wording = "Expected all tensors to be on the same device, but found at least two devices, "
    with pytest.raises(RuntimeError, match=f"{wording}({first} and {other}|{other} and {first})!"):
        mix(a, b)


def test_only_numbers_and_indices_may_stay_on_the_host(cards: Cards, sim: ModuleType) -> None:
    first, second = cards(MIB, MIB)
    x = torch.arange(3.0, device=first)
    assert (x * torch.tensor(2.0)).tolist() == [0, 2, 4]
    assert x[torch.tensor([2, 0])].tolist() == [2, 0]
    with pytest.raises(RuntimeError, match="at least two devices, sim:0 and sim:1!"):
        x * torch.tensor(2.0, device=second)
    with pytest.raises(RuntimeError, match="at least two devices"):
        torch.tensor(2.0).add_(x[0])
    with pytest.raises(TypeError, match="can't convert sim:0"):
        x.numpy()


def test_copies_are_counted_in_bytes_of_each_pair(cards: Cards, sim: ModuleType) -> None:
    first, second = cards(MIB, MIB)
    x = torch.arange(100.0).to(first)
    y = x.to(second)
    y.copy_(x, non_blocking=True)
    half = y.to("cpu", torch.float16)
    x.clone().add_(1)
    x.to(torch.float64)
    assert sim.copied() == {("cpu", first): 400, (first, second): 800, (second, "cpu"): 200}
    assert torch.equal(half, torch.arange(100.0).half())
    sim.reset_copied()
    assert x[3].item() == 3.0 and bool((x >= 0).all())
    assert sim.copied() == {(first, "cpu"): 5}
    x[::2].copy_(torch.zeros(50))
    assert x[:4].tolist() == [0, 1, 0, 3]
    assert sim.copied()["cpu", first] == 200
