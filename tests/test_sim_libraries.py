"""accelerate, diffusers, transformers and safetensors on simulated cards, and plain CPU work beside them."""

import gc
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import accelerate
import pytest
import safetensors
import safetensors.torch
import torch
from accelerate.hooks import remove_hook_from_submodules
from accelerate.utils import set_module_tensor_to_device
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel, T5EncoderModel

from tests.conftest import Cards

MIB = 2**20
ROOT = Path(__file__).parents[1]

MODELS = {
    "transformer": FluxTransformer2DModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": T5EncoderModel,
}


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers, tied ones once."""
    return sum(tensor.nbytes for tensor in {*model.parameters(), *model.buffers()})


def aligned(model: torch.nn.Module) -> torch.nn.Module:
    """The model with weights in memory of torch's own: kernels of the host round differently on unaligned memory."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def denoiser_inputs(device: str) -> dict[str, Any]:
    """Inputs of one step of the tiny FLUX transformer."""
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(1, 64, 16, generator=generator),
        "encoder_hidden_states": torch.randn(1, 16, 32, generator=generator),
        "pooled_projections": torch.randn(1, 32, generator=generator),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "img_ids": torch.zeros(64, 3),
        "txt_ids": torch.zeros(16, 3),
    }
    return {name: tensor.to(device) for name, tensor in inputs.items()} | {"return_dict": False}


def one_step(model: torch.nn.Module, device: str) -> torch.Tensor:
    """The model's output, on the host."""
    with torch.inference_mode():
        return model(**denoiser_inputs(device))[0].cpu()


def alternating(flux: Path, devices: list[str]) -> dict[str, str]:
    """A block-level device map that changes the card at every block."""
    config = FluxTransformer2DModel.load_config(flux, subfolder="transformer")
    with accelerate.init_empty_weights():
        model = FluxTransformer2DModel.from_config(config)
    names: list[str] = []
    for name, child in model.named_children():
        is_list = isinstance(child, torch.nn.ModuleList)
        names += [f"{name}.{index}" for index in range(len(child))] if is_list else [name]
    return {name: devices[index % 2] for index, name in enumerate(names)}


@pytest.fixture
def expected(flux: Path) -> torch.Tensor:
    """What the transformer gives on the CPU."""
    return one_step(aligned(FluxTransformer2DModel.from_pretrained(flux, subfolder="transformer")), "cpu")


@pytest.mark.parametrize("component", MODELS)
@pytest.mark.parametrize("whole", [{"": "sim:1"}, {"": 1}, "sim:1"], ids=str)
def test_models_load_straight_onto_a_card(
    flux: Path, cards: Cards, sim: ModuleType, component: str, whole: Any
) -> None:
    first, second = cards(MIB, MIB)
    model = MODELS[component].from_pretrained(flux, subfolder=component, device_map=whole)
    size = weight_bytes(model)
    assert {str(parameter.device) for parameter in model.parameters()} == {second}
    assert [torch.accelerator.memory_allocated(card) for card in (first, second)] == [0, size]
    assert torch.accelerator.max_memory_allocated(second) == size
    assert sim.copied() == {("cpu", second): size}
    del model
    gc.collect()
    assert torch.accelerator.memory_allocated(second) == 0


@pytest.mark.parametrize("entry", ["sim:0", "cpu"])
def test_a_model_loaded_by_blocks_over_two_cards_gives_the_hosts_bits(
    flux: Path, cards: Cards, sim: ModuleType, expected: torch.Tensor, entry: str
) -> None:
    devices = cards(MIB, MIB)
    places = alternating(flux, devices)
    model = FluxTransformer2DModel.from_pretrained(flux, subfolder="transformer", device_map=places)
    used = [torch.accelerator.memory_allocated(card) for card in devices]
    assert sum(used) == weight_bytes(model) and min(used) > 0
    assert torch.equal(one_step(model, entry), expected)
    assert sim.copied()["sim:0", "sim:1"] > 0 and sim.copied()["sim:1", "sim:0"] > 0


def test_a_model_dispatched_over_two_cards_comes_back_whole(
    flux: Path, cards: Cards, sim: ModuleType, expected: torch.Tensor
) -> None:
    devices = cards(MIB, MIB)
    model = FluxTransformer2DModel.from_pretrained(flux, subfolder="transformer")
    model = accelerate.dispatch_model(model, alternating(flux, devices), main_device=devices[0])
    assert torch.equal(one_step(model, devices[0]), expected)
    remove_hook_from_submodules(model)
    assert torch.equal(one_step(model.to("cpu"), "cpu"), expected)
    gc.collect()
    assert [torch.accelerator.memory_allocated(card) for card in devices] == [0, 0]


def test_accelerate_streams_weights_from_the_host(
    flux: Path, cards: Cards, sim: ModuleType, expected: torch.Tensor
) -> None:
    (card,) = cards(MIB)
    model = FluxTransformer2DModel.from_pretrained(flux, subfolder="transformer")
    size = weight_bytes(model)
    model = accelerate.cpu_offload(model, card)
    assert torch.equal(one_step(model, card), expected)
    assert torch.accelerator.max_memory_allocated(card) < size / 2 < size < sim.copied()["cpu", card]


def test_accelerate_sets_single_tensors(cards: Cards, sim: ModuleType) -> None:
    first, second = cards(MIB, MIB)
    with accelerate.init_empty_weights():
        layer = torch.nn.Linear(4, 4)
    set_module_tensor_to_device(layer, "weight", second, value=torch.ones(4, 4))
    set_module_tensor_to_device(layer, "bias", 0, value=torch.ones(4))
    assert (str(layer.weight.device), str(layer.bias.device)) == (second, first)
    set_module_tensor_to_device(layer, "weight", "meta")
    assert [torch.accelerator.memory_allocated(card) for card in (first, second)] == [16, 0]


def test_a_state_dict_is_taken_over_without_a_copy(cards: Cards, sim: ModuleType) -> None:
    (card,) = cards(MIB)
    state = {"weight": torch.ones(4, 4, device=card), "bias": torch.zeros(4, device=card)}
    layer = torch.nn.Linear(4, 4, device="meta")
    layer.load_state_dict(state, assign=True)
    assert layer.weight.data_ptr() == state["weight"].data_ptr()
    assert torch.accelerator.memory_allocated(card) == 80
    assert layer(torch.ones(1, 4, device=card)).tolist() == [[4, 4, 4, 4]]


def test_safetensors_reads_to_a_card_by_its_index_but_not_by_its_name(
    tmp_path: Path, cards: Cards, sim: ModuleType
) -> None:
    """It knows accelerators by a fixed list of names; an index means torch's current accelerator, of any kind."""
    _, second = cards(MIB, MIB)
    file = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"a": torch.arange(100.0)}, file)
    with safetensors.safe_open(file, framework="pt", device=1) as opened:
        read, part = opened.get_tensor("a"), opened.get_slice("a")[10:12]
    loaded = safetensors.torch.load_file(file, device=1)["a"]
    assert {str(tensor.device) for tensor in (read, part, loaded)} == {second}
    assert torch.equal(read.cpu(), torch.arange(100.0)) and part.tolist() == [10, 11]
    with pytest.raises(safetensors.SafetensorError, match="device sim:1 is invalid"):
        safetensors.torch.load_file(file, device=second)
    safetensors.torch.save_file({"a": read}, tmp_path / "b.safetensors")
    assert torch.equal(safetensors.torch.load_file(tmp_path / "b.safetensors")["a"], torch.arange(100.0))


def test_a_whole_pipeline_runs_on_a_card_or_offloaded_from_it(flux: Path, cards: Cards, sim: ModuleType) -> None:
    _, second = cards(2 * MIB, 2 * MIB)

    def picture(pipeline: FluxPipeline) -> torch.Tensor:
        pipeline.set_progress_bar_config(disable=True)
        return pipeline(
            "a red circle", height=64, width=64, num_inference_steps=2, max_sequence_length=16,
            generator=torch.Generator().manual_seed(0), output_type="pt",
        ).images.cpu()

    resident, offloaded = FluxPipeline.from_pretrained(flux).to(second), FluxPipeline.from_pretrained(flux)
    drawn = picture(resident)
    assert torch.accelerator.memory_allocated(second) > 0
    del resident
    gc.collect()
    torch.accelerator.reset_peak_memory_stats(second)
    offloaded.enable_model_cpu_offload(device=second)
    assert torch.equal(picture(offloaded), drawn)
    assert 0 < torch.accelerator.max_memory_allocated(second) < 2 * MIB


BEFORE_DURING_AFTER = """
import sys, torch
from diffusers import ModularPipeline

def picture():
    pipeline = ModularPipeline.from_pretrained(sys.argv[1])
    pipeline.load_components(dtype=torch.float32)
    image = pipeline(prompt="a red circle", max_sequence_length=16, height=64, width=64, num_inference_steps=2,
                     generator=torch.Generator().manual_seed(1), output_type="pt", output="images")[0]
    assert {str(parameter.device) for parameter in pipeline.transformer.parameters()} == {"cpu"} == {str(image.device)}
    return image

images, numbers = [picture()], [torch.manual_seed(0) and torch.randn(3)]
from tests import sim
for change in (lambda: None, lambda: sim.configure([2**20, 2**20]), sim.withdraw):
    change()
    images.append(picture())
    numbers.append(torch.manual_seed(0) and torch.randn(3))
    print(torch.accelerator.is_available(), torch.accelerator.current_accelerator(check_available=True))
assert all(torch.equal(image, images[0]) for image in images), "the pictures differ"
assert all(torch.equal(number, numbers[0]) for number in numbers), "the random numbers differ"
assert sim.copied() == {}, sim.copied()
"""


def test_cpu_work_is_the_same_before_beside_and_after_the_cards(flux: Path, sim: ModuleType) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", BEFORE_DURING_AFTER, str(flux)], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == ["False None", "True sim", "False None"]


def test_no_card_is_left_between_tests(sim: ModuleType) -> None:
    assert not torch.accelerator.is_available()
    assert torch.accelerator.device_count() == 0
    with pytest.raises(RuntimeError, match="there are 0 simulated cards"):
        torch.empty(1, device="sim:0")
