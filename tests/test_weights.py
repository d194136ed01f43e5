"""What a component weighs is what it takes when loaded; files and configs that do not match are refused."""

import json
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from stages.errors import ModelError
from stages.models.checkpoint import Checkpoint, Component, find
from stages.models.skeleton import new_skeleton
from stages.models.weights import Weights, weigh
from stages.pipeline.split import split
from tests import sparse

MAKERS = {"flux": sparse.flux_dev, "sd35": sparse.sd35_large, "flux2": sparse.flux2_dev, "qwen": sparse.qwen_image}
GB = {
    "flux": {"transformer": 23.80, "text_encoder_2": 9.52, "text_encoder": 0.25, "vae": 0.17},
    # 16.11 GB of parameters, and a table of positions: 192 * 192 * 2432 numbers, 0.18 GB
    "sd35": {"transformer": 16.29, "text_encoder_3": 9.52, "text_encoder_2": 1.39, "text_encoder": 0.25, "vae": 0.17},
    "flux2": {"transformer": 64.45, "text_encoder": 48.02, "vae": 0.17},
    "qwen": {"transformer": 40.86, "text_encoder": 16.58, "vae": 0.25},
}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """The large models by name, made on first use."""
    made: dict[str, Checkpoint] = {}

    def give(name: str) -> Checkpoint:
        if name not in made:
            made[name] = find(MAKERS[name](tmp_path_factory.mktemp(name)))
        return made[name]

    return give


@pytest.fixture
def model(flux: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may damage."""
    return shutil.copytree(flux, tmp_path / "model")


def one(model: Path, name: str, dtype: torch.dtype = torch.float32) -> Weights:
    return weigh(find(model).components[name], dtype)


def loaded(component: Component, dtype: torch.dtype) -> nn.Module:
    """The component as its library loads it."""
    library: Any = {"diffusers": diffusers, "transformers": transformers}[component.library]
    kind = {"torch_dtype" if component.library == "diffusers" else "dtype": dtype}
    model = getattr(library, component.class_name).from_pretrained(component.folder, **kind)
    assert isinstance(model, nn.Module)
    return model


def bytes_of(model: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("name", MAKERS)
def test_large_models(large: Callable[[str], Checkpoint], name: str) -> None:
    components = large(name).components
    weights = {part: weigh(components[part], torch.bfloat16) for part in GB[name]}
    assert {part: round(found.total / 1e9, 2) for part, found in weights.items()} == GB[name]
    assert all(found.extra == () for found in weights.values())
    assert set(weights) == {part for part, component in components.items() if component.files}


def test_sparse_models_take_no_disk(large: Callable[[str], Checkpoint]) -> None:
    files = [path for path in large("flux").path.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) > 33_700_000_000
    assert sum(path.stat().st_blocks for path in files) * 512 < 4_000_000


def test_blocks_of_flux(large: Callable[[str], Checkpoint]) -> None:
    """Width 3072: a double block is 36 squares of it and 30 rows, a single block 15 and 11, and their norms."""
    found = weigh(large("flux").components["transformer"], torch.bfloat16)
    double, single = 2 * (36 * 3072**2 + 30 * 3072 + 512), 2 * (15 * 3072**2 + 11 * 3072 + 256)
    assert (round(double / 1e6, 1), round(single / 1e6, 1)) == (679.7, 283.2)
    assert list(found.blocks.items()) == [
        *((f"transformer_blocks.{index}", double) for index in range(19)),
        *((f"single_transformer_blocks.{index}", single) for index in range(38)),
    ]
    assert set(found.rest) == {"x_embedder", "context_embedder", "time_text_embed", "norm_out", "proj_out"}
    assert found.total == sum(file.stat().st_size for file in large("flux").components["transformer"].files) - headers(
        large("flux").components["transformer"]
    )


def headers(component: Component) -> int:
    return sum(8 + int.from_bytes(file.open("rb").read(8), "little") for file in component.files)


def test_tied_weights_count_once_and_t5_keeps_wo_in_float32(large: Callable[[str], Checkpoint]) -> None:
    component = large("flux").components["text_encoder_2"]
    found, half = weigh(component, torch.bfloat16), weigh(component, torch.float16)
    assert found.rest["shared"] == 2 * 32128 * 4096
    assert list(found.blocks) == [f"encoder.block.{index}" for index in range(24)]
    assert half.total - found.total == 24 * 10240 * 4096 * 2


def test_a_component_that_cannot_be_split_is_one_block(large: Callable[[str], Checkpoint]) -> None:
    found = weigh(large("qwen").components["vae"], torch.bfloat16)
    assert (found.blocks, found.rest) == ({"": found.total}, {})


def test_under_a_second(large: Callable[[str], Checkpoint]) -> None:
    """Of three tries, as other processes may want the processor too."""
    for component in large("flux").components.values():
        if component.files:
            tries = [seconds(lambda part=component: weigh(part, torch.bfloat16)) for _ in range(3)]
            assert min(tries) < 1, component.name


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_much_as_when_loaded(flux: Path, dtype: torch.dtype) -> None:
    for component in find(flux).components.values():
        if component.files:
            assert weigh(component, dtype).total == bytes_of(loaded(component, dtype)), component.name


def save(tmp_path: Path, model: Any, library: str = "diffusers") -> Component:
    model.save_pretrained(tmp_path)
    files = tuple(sorted(tmp_path.glob("*.safetensors")))
    return Component("part", library, type(model).__name__, tmp_path, files)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_modules_and_buffers(tmp_path: Path, dtype: torch.dtype) -> None:
    """Wan keeps norms and time embedding in float32 and has tables of its own; SD3 stores a table; VLMs rotate."""
    wan = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )
    component = save(tmp_path / "wan", wan)
    assert weigh(component, dtype).total == bytes_of(loaded(component, dtype)) > bytes_of(wan.to(dtype))

    component = save(tmp_path / "sd3", tiny_sd3())
    assert weigh(component, dtype).total == bytes_of(loaded(component, dtype))
    assert weigh(component, dtype).rest["pos_embed"] > 2 * 8 * 8 * 16

    qwen = transformers.Qwen2_5_VLForConditionalGeneration(transformers.Qwen2_5_VLConfig(**tiny_qwen()))
    component = save(tmp_path / "qwen", qwen, "transformers")
    assert weigh(component, dtype).total == bytes_of(loaded(component, dtype))
    with_config_in = json.loads((tmp_path / "qwen" / "config.json").read_text()) | {"dtype": "float64"}
    (tmp_path / "qwen" / "config.json").write_text(json.dumps(with_config_in))
    assert weigh(component, dtype).total == bytes_of(loaded(component, dtype))


def tiny_qwen() -> dict[str, Any]:
    return {
        "text_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                        "num_key_value_heads": 2, "vocab_size": 160},
        "vision_config": {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2,
                          "out_hidden_size": 32},
        "tie_word_embeddings": True,
    }


def tiny_sd3() -> Any:
    return diffusers.SD3Transformer2DModel(
        sample_size=8, num_layers=3, num_attention_heads=2, attention_head_dim=8, caption_projection_dim=16,
        joint_attention_dim=16, pooled_projection_dim=16, in_channels=4, out_channels=4, pos_embed_max_size=8,
    )


def test_blocks_come_in_the_order_in_which_they_run(large: Callable[[str], Checkpoint], flux: Path) -> None:
    def t(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, device="meta")

    stream = {"hidden_states": t(1, 64, 64), "timestep": t(1)}
    calls: dict[str, dict[str, Any]] = {
        "flux": {**stream, "encoder_hidden_states": t(1, 8, 4096), "pooled_projections": t(1, 768),
                 "img_ids": t(64, 3), "txt_ids": t(8, 3), "guidance": t(1)},
        "flux2": {**stream, "hidden_states": t(1, 64, 128), "encoder_hidden_states": t(1, 8, 15360),
                  "img_ids": t(1, 64, 4), "txt_ids": t(1, 8, 4), "guidance": t(1)},
        "sd35": {**stream, "hidden_states": t(1, 16, 64, 64), "encoder_hidden_states": t(1, 8, 4096),
                 "pooled_projections": t(1, 2048)},
    }
    for name, call in calls.items():
        component = large(name).components["transformer"]
        assert order(new_skeleton(component), call) == list(weigh(component, torch.bfloat16).blocks)
    t5 = find(flux).components["text_encoder_2"]
    assert order(loaded(t5, torch.float32), {"input_ids": torch.ones(1, 4, dtype=torch.long)}) == list(
        weigh(t5, torch.float32).blocks
    )


def test_blocks_of_qwen_image_come_in_the_order_in_which_they_run(tmp_path: Path) -> None:
    model = diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 4, 8),
    )
    call = {"hidden_states": torch.zeros(1, 16, 16), "encoder_hidden_states": torch.zeros(1, 8, 16),
            "encoder_hidden_states_mask": torch.ones(1, 8), "timestep": torch.zeros(1), "img_shapes": [[(1, 4, 4)]]}
    assert order(model, call) == list(weigh(save(tmp_path, model), torch.float32).blocks)


def order(model: nn.Module, call: dict[str, Any]) -> list[str]:
    """The names of the blocks as a pass runs through them."""
    ran: list[str] = []
    classes = model._no_split_modules or ()
    for name, module in model.named_modules():
        if type(module).__name__ in classes:
            module.register_forward_pre_hook(lambda module, inputs, name=name: ran.append(name))
    with torch.no_grad():
        model(**call)
    return ran


def test_skeleton_has_every_shape_and_no_data(flux: Path) -> None:
    vae = find(flux).components["vae"]
    bones = new_skeleton(vae)
    assert isinstance(bones, diffusers.AutoencoderKL) and bones.config.latent_channels == 4
    assert all(tensor.is_meta for tensor in (*bones.parameters(), *bones.buffers()))
    real = loaded(vae, torch.float32).state_dict()
    assert {name: tensor.shape for name, tensor in bones.state_dict().items()} == {
        name: tensor.shape for name, tensor in real.items()
    }
    assert torch.get_default_dtype() == torch.float32
    assert torch.nn.init.ones_(torch.zeros(2)).tolist() == [1, 1]


def rewrite(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def test_config_with_more_layers_than_the_files(model: Path) -> None:
    """diffusers loads this, with tensors on meta."""
    rewrite(model / "transformer" / "config.json", num_layers=3)
    with pytest.raises(ModelError, match=r"asks for \d+ tensors? that the files lack: transformer_blocks\.2\..*"
                                        r"and \d+ more.*hf download ID --include 'transformer/\*'"):
        one(model, "transformer")


def test_text_encoder_that_lacks_tensors(model: Path) -> None:
    """transformers loads this, with random numbers in their place."""
    lost = [f"encoder.block.{index}.layer.1.DenseReluDense.wo.weight" for index in range(2)]
    edit(model / "text_encoder_2" / "model.safetensors", lambda tensors: [tensors.pop(name) for name in lost])
    with pytest.raises(ModelError, match=f"asks for 2 tensors that the files lack: {lost[0]}, {lost[1]};"):
        one(model, "text_encoder_2")


def test_tied_tensor_under_either_name(model: Path) -> None:
    path = model / "text_encoder_2" / "model.safetensors"
    before = one(model, "text_encoder_2")
    edit(path, lambda tensors: tensors.update({"encoder.embed_tokens.weight": tensors.pop("shared.weight")}))
    assert one(model, "text_encoder_2") == before
    edit(path, lambda tensors: tensors.pop("encoder.embed_tokens.weight"))
    with pytest.raises(ModelError, match=r"lack: shared\.weight"):
        one(model, "text_encoder_2")


@pytest.mark.parametrize(("component", "changes"), [
    ("transformer", {"joint_attention_dim": 48}), ("text_encoder", {"intermediate_size": 48}),
])
def test_config_of_other_shapes(model: Path, component: str, changes: dict[str, object]) -> None:
    rewrite(model / component / "config.json", **changes)
    with pytest.raises(ModelError, match=r"does not fit the shape of \d tensors? in the files: .* is \[.* not \[.*48"):
        one(model, component)


def test_tensors_that_only_the_files_have_are_told(model: Path) -> None:
    path = model / "transformer" / "diffusion_pytorch_model.safetensors"
    before = one(model, "transformer")
    edit(path, lambda tensors: tensors.update(ema=torch.zeros(3)))
    after = one(model, "transformer")
    assert (after.extra, after.total) == (("ema",), before.total)


def test_vae_with_the_attention_names_of_old(model: Path) -> None:
    """Stable Diffusion's VAEs have them; diffusers renames them on loading, and so do we."""
    vae = find(model).components["vae"]
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def age(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            for young, old in new.items():
                if f".attentions.0.{young}." in name:
                    tensors[name.replace(young, old)] = tensors.pop(name)

    before = weigh(vae, torch.float32)
    edit(vae.files[0], age)
    assert any(".query." in name for name in load_file(vae.files[0]))
    assert weigh(vae, torch.float32) == before


@pytest.mark.parametrize(("component", "changes", "words"), [
    ("transformer", {"num_layers": "three"}, r": num_layers is 'three', which FluxTransformer2DModel cannot take"),
    ("transformer", {"num_attention_heads": -1}, ": num_attention_heads is -1, and less than 0 is refused"),
    ("transformer", {"axes_dims_rope": "wide"}, ": axes_dims_rope is 'wide', which"),
    ("transformer", {"axes_dims_rope": [4, 4]}, r": axes_dims_rope is \[4, 4\], which"),
    ("text_encoder", {"hidden_size": 30}, r" does not fit CLIPTextModel \(.*hidden size \(30\).*\); fetch it again"),
    ("text_encoder", {"num_attention_heads": 0}, r" with num_attention_heads=0 does not fit CLIPTextModel \(.*zero"),
    ("text_encoder_2", {"d_model": "wide"}, r" with d_model='wide' does not fit T5EncoderModel \(.+\); fetch"),
    ("vae", {"down_block_types": ["NoSuchBlock"] * 4}, r" does not fit AutoencoderKL \(NoSuchBlock .+\); fetch"),
    ("vae", {"norm_num_groups": 0}, r" with norm_num_groups=0 does not fit AutoencoderKL \(.*zero.*\); fetch"),
    ("vae", {"block_out_channels": {}}, r": block_out_channels is \{\}, which AutoencoderKL cannot take"),
])
def test_config_that_no_model_can_have(model: Path, component: str, changes: dict[str, object], words: str) -> None:
    rewrite(model / component / "config.json", **changes)
    with pytest.raises(ModelError, match=rf"{component}/config\.json{words}"):
        one(model, component)


@pytest.mark.parametrize("count", [10**6, 10**9, 10**30])
@pytest.mark.parametrize(("component", "field"), [
    ("transformer", "num_layers"), ("transformer", "num_single_layers"), ("transformer", "axes_dims_rope"),
    ("text_encoder", "num_hidden_layers"), ("text_encoder", "max_position_embeddings"),
    ("text_encoder_2", "num_layers"), ("vae", "layers_per_block"), ("vae", "norm_num_groups"),
])
def test_counts_are_held_against_the_headers_before_anything_is_made(
    model: Path, component: str, field: str, count: int
) -> None:
    path = model / component / "config.json"
    usual = json.loads(path.read_text())[field]
    rewrite(path, **{field: [count, *usual[1:]] if isinstance(usual, list) else count})
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelError, match=rf"{component}/config\.json.*{field} is {count},|"
                                        rf"{component}/config\.json does not fit the shape of .*{count}"):
        one(model, component)
    assert time.process_time() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18


def test_layers_of_which_few_are_claimed_stop_at_the_tensors_that_there_are(model: Path) -> None:
    rewrite(model / "transformer" / "config.json", num_layers=1000)
    with pytest.raises(ModelError, match=r"config\.json does not fit FluxTransformer2DModel \(it makes more than \d+ "
                                        r"modules, but the files have \d+ tensors\)"):
        one(model, "transformer")


@pytest.mark.parametrize("name", ["NoSuchModel", "FluxPipeline", "logging"])
def test_class_that_is_no_model(model: Path, name: str) -> None:
    rewrite(model / "model_index.json", transformer=["diffusers", name])
    with pytest.raises(ModelError, match=rf"diffusers [\d.]+ has no (model )?class {name}, which transformer needs"):
        one(model, "transformer")


@pytest.mark.parametrize(("part", "name"), [("transformer", "NoSuchModel"), ("scheduler", "NoSuchScheduler")])
def test_class_that_the_library_lacks_is_refused_before_diffusers_looks_for_it(
    model: Path, part: str, name: str
) -> None:
    rewrite(model / "model_index.json", **{part: ["diffusers", name]})
    with pytest.raises(ModelError, match=rf"diffusers [\d.]+ has no class {name}, which {part} needs"):
        split(find(model), ["prompt"])
