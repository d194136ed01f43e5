"""Cards that are there and that torch does not see, and the words in which libraries say that memory ran out."""

from pathlib import Path

import pytest
import torch

from runner.commands.doctor import examine
from stages import drivers
from stages.drivers import unseen_cards
from stages.errors import InvalidInput
from stages.machine import memory_users, probe
from stages.out_of_memory import is_out_of_memory


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine of which nothing is known, with a program path that the tests write to."""
    for name in drivers._HIDING:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(drivers, "_NVIDIA_NODES", (str(tmp_path / "nvidia0"),))
    monkeypatch.setattr(drivers, "_AMD_NODE", str(tmp_path / "kfd"))
    monkeypatch.setattr(drivers, "_DRIVER", tmp_path / "version")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: None)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


def smi(folder: Path, says: str) -> None:
    """The driver's tool, which says this."""
    tool = folder / "bin" / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho '{says}'\n")
    tool.chmod(0o755)


@pytest.mark.parametrize(("driver", "built", "says"), [
    ("580.65.06", None, "was built without CUDA -> pip install --force-reinstall torch --index-url "
                        "https://download.pytorch.org/whl/cu130 (built for CUDA 13.0)"),
    ("535.104.05", None, "whl/cu126 (built for CUDA 12.6)"),
    ("535.104.05", "13.0", "CUDA 13.0, and its driver is 535.104.05 (at least 580 is needed) -> pip install"),
    ("470.82", "13.0", "its driver, 470.82, is too old for this torch"),
    ("470.82", "12.6", "built for CUDA 12.6 -> install driver 525 or newer"),
    ("580.65.06", "12.6", "driver 580.65.06 -> nvidia-smi says what"),
    ("No devices were found", "12.6", ""),
])
def test_a_torch_that_does_not_see_the_card_is_told_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: str, built: str | None, says: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", built)
    smi(tmp_path, driver)
    assert says in unseen_cards() and bool(says) == bool(unseen_cards())
    if says:
        with pytest.raises(InvalidInput, match=r"torch does not see.* -> .*, or run on the CPU .devices="):
            probe()
        check = next(check for check in examine() if check.name == "cards")
        assert not check.ok and check.advice and " -> " not in check.found
    assert [device.name for device in probe(["cpu"]).devices] == ["cpu"]


def test_the_drivers_own_word_and_node_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert unseen_cards() == "" and probe().devices[0].name == "cpu"
    (tmp_path / "nvidia0").touch()
    assert "its driver does not answer -> nvidia-smi says" in unseen_cards()
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19\n")
    assert "its driver is 535.104.05" in unseen_cards()
    for name, value in (("CUDA", ""), ("CUDA", "-1"), ("NVIDIA", "void"), ("HIP", "")):
        monkeypatch.setenv(f"{name}_VISIBLE_DEVICES", value)
        assert unseen_cards() == "", "somebody hides them"
        monkeypatch.delenv(f"{name}_VISIBLE_DEVICES")


def test_graphics_of_a_processor_are_no_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kfd").touch()
    assert unseen_cards() == ""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "built for ROCm 6.4, does not see -> rocminfo" in unseen_cards()


@pytest.mark.parametrize("text", [
    "CUDA out of memory. Tried to allocate 2.00 GiB.", "CUDA error: out of memory", "CUDA driver error: out of memory",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
    "cuFFT error: CUFFT_ALLOC_FAILED", "HIP out of memory. Tried to allocate", "HIP error: out of memory",
    "MIOpen Error: miopenStatusAllocFailed hipErrorOutOfMemory", "MPS backend out of memory (MPS allocated: 9 GB)",
    "UR error: UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY", "NCCL error: unhandled. Cuda failure 2 'out of memory'",
    "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.",
    "DefaultCPUAllocator: not enough memory: out of memory", "sim out of memory. Tried to allocate 1 bytes",
])
def test_out_of_memory_is_known_in_every_librarys_words(text: str) -> None:
    assert is_out_of_memory(RuntimeError(text))


@pytest.mark.parametrize("text", [
    "CUDA error: an illegal memory access was encountered", "CUBLAS_STATUS_EXECUTION_FAILED", "device-side assert",
    "mat1 and mat2 shapes cannot be multiplied", "CUDNN_STATUS_NOT_SUPPORTED", "unspecified launch failure",
])
def test_what_is_something_else_is_not_taken_for_it(text: str) -> None:
    assert not is_out_of_memory(RuntimeError(text)) and is_out_of_memory(MemoryError(text))


def test_processes_that_are_not_here_use_no_memory_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container the driver tells numbers of the host."""
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda name: type("P", (), {"uuid": "1"}))
    parent = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[1]
    smi(tmp_path, f"GPU-1, {parent}, python, 100 MiB\nGPU-1, 4194305, other, 7 MiB\nGPU-2, {parent}, x, 1 MiB")
    assert memory_users("cuda:0") == [f"{parent}, python, 100 MiB"]
