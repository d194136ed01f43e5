"""LoRAs of every trainer that docs/loras.md names add what was meant, and what diffusers and PEFT make of them."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file

from runner.planning.planner import with_loras
from stages.errors import ModelError
from stages.families import FAMILIES
from stages.loading.load import load
from stages.loading.lora_merge import read_updates
from stages.loading.lora_names import layer_names
from stages.models.checkpoint import Checkpoint, Component, find
from stages.models.lora import LoraRequest, find_lora, read_loras
from stages.models.skeleton import model_class, skeleton
from stages.placement.placement import Place, Resident
from tests import sparse
from tests.lora_layouts import (
    CHECKPOINTS,
    FLUX2_LAYERS,
    FLUX_ENDS,
    FLUX_WHOLE,
    KOHYA,
    LAYOUTS,
    OWN,
    PEFT,
    SD3_BLOCKS,
    Z_IMAGE_BLOCKS,
    Form,
    Layout,
    Tensors,
    low_rank,
    write,
)
from tests.test_lora import fused, gap, plan

DOCS = (Path(__file__).parent.parent / "docs" / "loras.md").read_text()
Models = Callable[[str], Checkpoint]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """The tiny checkpoint of a family, made once."""
    made: dict[str, Checkpoint] = {}

    def of(family: str) -> Checkpoint:
        if family not in made:
            made[family] = find(CHECKPOINTS[family](tmp_path_factory.mktemp(family) / "model"))
        return made[family]
    return of


def weights(component: Component) -> Tensors:
    return {name: tensor for path in component.files for name, tensor in load_file(path).items()}


def merged(checkpoint: Checkpoint, path: Path, scale: float = 1.0, part: str = "transformer") -> Tensors:
    """A component's weights with the LoRA in them."""
    component = with_loras(checkpoint, read_loras([f"{path}={scale}"])).components[part]
    return dict(load(component, Place(Resident("cpu"), torch.float32)).state_dict())


def check_merged(checkpoint: Checkpoint, path: Path, added: Mapping[str, torch.Tensor], scale: float = 1.0) -> None:
    """The weights have what is added, and all that nothing is added to are as they were, bit for bit."""
    before, after = weights(checkpoint.components["transformer"]), merged(checkpoint, path, scale)
    for name, weight in before.items():
        if name in added:
            torch.testing.assert_close(after[name], weight + scale * added[name], rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(after[name], weight), name
    assert added.keys() <= before.keys() and all(bool(delta.any()) for delta in added.values())


@pytest.mark.parametrize(("row", "family"), LAYOUTS, ids=[f"{row}-{family}" for row, family in LAYOUTS])
def test_it_adds_what_its_trainer_meant(models: Models, tmp_path: Path, row: str, family: str) -> None:
    layout, checkpoint = LAYOUTS[row, family], models(family)
    before = weights(checkpoint.components["transformer"])
    tensors, added = write(layout, {name: weight.shape for name, weight in before.items()})
    save_file(tensors, tmp_path / "style.safetensors")
    check_merged(checkpoint, tmp_path / "style.safetensors", added, 0.5)
    if layout.same_as_diffusers:
        theirs = fused_by_diffusers(checkpoint, tensors, 0.5)
        assert theirs.keys() == before.keys()
        for name, weight in merged(checkpoint, tmp_path / "style.safetensors", 0.5).items():
            torch.testing.assert_close(weight, theirs[name], rtol=1e-5, atol=1e-5)


def fused_by_diffusers(checkpoint: Checkpoint, tensors: Mapping[str, torch.Tensor], scale: float) -> Tensors:
    """The transformer's weights as diffusers' own pipeline class reads, loads and fuses the file."""
    pipeline, component = getattr(diffusers, checkpoint.pipeline), checkpoint.components["transformer"]
    model = model_class(component).from_pretrained(component.folder)
    more = {"return_alphas": True} if checkpoint.pipeline == "FluxPipeline" else {}
    read = pipeline.lora_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, **more)
    named, alphas = read if more else (read, None)
    pipeline.load_lora_into_transformer(named, transformer=model, **({"network_alphas": alphas} if more else {}))
    model.fuse_lora(lora_scale=scale)
    model.unload_lora()
    return dict(model.state_dict())


def read_by_diffusers(pipeline: str, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """What diffusers' own reader makes of a file's tensors: what is added to each weight of the transformer."""
    reader = getattr(diffusers, pipeline)
    more = {"return_alphas": True} if pipeline == "FluxPipeline" else {}
    read = reader.lora_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, **more)
    named, alphas = read if more else (read, None)
    named = {name.removeprefix("transformer."): tensor.float() for name, tensor in named.items()}
    alphas = {name.removeprefix("transformer."): float(alpha) for name, alpha in (alphas or {}).items()}
    found = {}
    for name, down in named.items():
        layer = name.rpartition(".lora_A.")[0]
        if layer:
            rank = down.shape[0]
            strength = alphas.get(f"{layer}.alpha", rank) / rank
            found[f"{layer}.weight"] = named[f"{layer}.lora_B.weight"] @ down * strength
    for layer in {name.rpartition(".lokr_")[0] for name in named if ".lokr_" in name}:
        sides = [named[f"{layer}.lokr_{side}"] if f"{layer}.lokr_{side}" in named
                 else named[f"{layer}.lokr_{side}_a"] @ named[f"{layer}.lokr_{side}_b"] for side in ("w1", "w2")]
        found[f"{layer}.weight"] = torch.kron(*sides)
    return found


def test_the_page_has_every_layout_and_no_other() -> None:
    table = DOCS[DOCS.index("| layout |") :].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert {(row[0], family) for row in rows for family in re.findall(r"`([a-z0-9-]+)`", row[3])} == LAYOUTS.keys()
    assert CHECKPOINTS.keys() <= FAMILIES.keys()


def thin(down: str, up: str) -> Form:
    """A pair of rank 1, for which all of its second matrix stands: a product would be as large as the model."""
    def form(name: str, out: int, into: int) -> tuple[Tensors, torch.Tensor]:
        column = torch.randn(out, 1)
        return {f"{name}{down}": torch.randn(1, into), f"{name}{up}": column}, column
    return form


@pytest.mark.parametrize("row", ["sd-scripts", "ComfyUI", "fal"])
def test_flux_as_large_as_it_is_reads_as_diffusers_reads_it(tmp_path: Path, row: str) -> None:
    """diffusers counts on the width of FLUX.1 where it splits what is fused, and for fal's on all of its blocks."""
    component = (find(sparse.flux_dev(tmp_path / "flux")).components["transformer"] if row == "fal" else
                 real_flux(tmp_path, 1, 3))
    if row == "fal":
        plain = "base_model.model."
        blocks = {plain + re.sub(r"\.[0-9]+\.", f".{number}.", name, count=1): tuple(
                      re.sub(r"_blocks\.[0-9]+\.", f"_blocks.{number}.", layer) for layer in layers)
                  for name, layers in FLUX_WHOLE.items() for number in range(38 if name.startswith("single") else 19)}
        blocks[f"{plain}final_layer.linear"] = ("proj_out",)
        layout = Layout(thin(".lora_A.weight", ".lora_B.weight"), blocks)
    else:
        layers = LAYOUTS[row, "flux"].layers
        layout = Layout(thin(".lora_down.weight", ".lora_up.weight"), {
            name: layers[name] for name in layers if "block" in name})
    tensors, added = write(layout, {name: weight.shape for name, weight in skeleton(component).state_dict().items()})
    path = tmp_path / "style.safetensors"
    save_file(tensors, path)
    ours: Any = read_updates(find_lora(LoraRequest(str(path)), "FluxPipeline"), component)
    theirs = diffusers.FluxPipeline.lora_state_dict(dict(tensors))
    assert ours.keys() == added.keys() and len(theirs) == 2 * len(ours)
    for name, update in ours.items():
        layer = f"transformer.{name.removesuffix('.weight')}"
        assert update.scale == 1.0 and torch.equal(update.up, added[name])
        assert torch.equal(update.down, theirs[f"{layer}.lora_A.weight"])
        assert torch.equal(update.up, theirs[f"{layer}.lora_B.weight"])


@pytest.mark.parametrize("family", ["flux2", "sd3", "z-image"])
def test_the_authors_names_are_those_of_diffusers_conversion(models: Models, tmp_path: Path, family: str) -> None:
    """What converts the authors' weights converts the authors' sums as well: shares, and halves that change places."""
    layers = {"flux2": FLUX2_LAYERS, "sd3": SD3_BLOCKS, "z-image": Z_IMAGE_BLOCKS}[family]
    if family != "z-image":
        layers = {**layers, "final_layer.adaLN_modulation.1": ("norm_out.linear",)}
    checkpoint = models(family)
    sizes = {name: weight.shape for name, weight in weights(checkpoint.components["transformer"]).items()}
    tensors, _ = write(Layout(PEFT, {f"diffusion_model.{name}": each for name, each in layers.items()}), sizes)
    sums = {f"{name}.weight": tensors[f"diffusion_model.{name}.lora_B.weight"]
            @ tensors[f"diffusion_model.{name}.lora_A.weight"] for name in layers}
    converter = getattr(single_file_utils, f"convert_{family.replace('-', '_')}_transformer_checkpoint_to_diffusers")
    converted = converter(WholeCheckpoint(sums))
    expected = {name: delta for name, delta in converted.items() if bool(delta.any())}
    assert len(expected) == sum(map(len, layers.values()))
    save_file(tensors, tmp_path / "style.safetensors")
    check_merged(checkpoint, tmp_path / "style.safetensors", expected)


class WholeCheckpoint(dict[str, torch.Tensor]):
    """Tensors among others that are all zeros, for a reader that takes all that a model has."""

    def pop(self, name: str, *default: Any) -> torch.Tensor:  # type: ignore[override]
        return super().pop(name, torch.zeros(6, 1))

    def __missing__(self, name: str) -> torch.Tensor:
        return torch.zeros(6, 1)


def test_layers_of_flux_outside_of_its_blocks_are_as_diffusers_converts_them(flux: Path) -> None:
    """They then have no prefix, and diffusers' loader drops them; and it leaves out the alphas of two of them."""
    sizes = {name: weight.shape for name, weight in weights(find(flux).components["transformer"]).items()}
    names = {f"lora_unet_{name.replace('.', '_')}": layers for name, layers in FLUX_ENDS.items()}
    tensors, added = write(Layout(low_rank(".lora_down.weight", ".lora_up.weight"), names,
                                  halves="lora_unet_final_layer_adaLN_modulation_1"), sizes)
    theirs = read_by_diffusers("FluxPipeline", tensors)
    assert theirs.keys() == added.keys()
    for name, delta in theirs.items():
        torch.testing.assert_close(delta, added[name])


@pytest.mark.parametrize("prefix", ["diffusion_model.", "base_model.model."])
def test_krea_2_reads_as_diffusers_reads_it(tmp_path: Path, prefix: str) -> None:
    """All layers under the names of its authors, of a model without weights."""
    with torch.device("meta"):
        model = diffusers.Krea2Transformer2DModel(
            num_layers=2, attention_head_dim=16, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
            timestep_embed_dim=16, text_hidden_dim=32, num_text_layers=3, text_num_attention_heads=2,
            text_num_key_value_heads=2, text_intermediate_size=48, axes_dims_rope=(4, 6, 6))
    model.save_config(tmp_path / "transformer")
    component = Component("transformer", "diffusers", "Krea2Transformer2DModel", tmp_path / "transformer", ())
    sizes = {name: weight.shape for name, weight in model.state_dict().items()}
    authors = layer_names(component).original
    tensors, added = write(Layout(PEFT, {prefix + name: layers for name, layers in authors.items()}), sizes)
    linear = {f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    save_file(tensors, tmp_path / "style.safetensors")
    ours = read_updates(find_lora(LoraRequest(str(tmp_path / "style.safetensors")), "Krea2Pipeline"), component)
    theirs = read_by_diffusers("Krea2Pipeline", tensors)
    assert ours.keys() == theirs.keys() == added.keys() == linear
    for name, delta in theirs.items():
        torch.testing.assert_close(ours[name].rows(slice(None)), delta)


def real_flux(folder: Path, doubles: int, singles: int) -> Component:
    """The transformer of FLUX.1 with some of its blocks, and without weights."""
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(num_layers=doubles, num_single_layers=singles, guidance_embeds=True)
    model.save_config(folder / "transformer")
    return Component("transformer", "diffusers", "FluxTransformer2DModel", folder / "transformer", ())


CONFIGS: Mapping[str, Any] = {
    "plain": peft.LoraConfig(r=4, lora_alpha=6),
    "patterns": peft.LoraConfig(r=4, lora_alpha=6, rank_pattern={"transformer_blocks.0.attn.to_q": 2, "x_embedder": 1},
                                alpha_pattern={"x_embedder": 5, "^transformer_blocks.0.attn.to_q": 7}),
    "rslora": peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True),
    "bias of the second matrix": peft.LoraConfig(r=4, lora_alpha=6, lora_bias=True),
    "LoKr": peft.LoKrConfig(r=2, alpha=3), "LoKr, both products": peft.LoKrConfig(r=2, alpha=3, decompose_both=True),
    "LoKr, whole": peft.LoKrConfig(r=64, alpha=3), "LoHa": peft.LoHaConfig(r=2, alpha=3),
}


def merged_by_peft(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights of the layers that have an adapter, with the adapter in them."""
    expected = {}
    for name, layer in model.named_modules():
        if isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer):
            layer.merge()
            expected |= {f"{name}.{leaf}": value for leaf, value in layer.get_base_layer().state_dict().items()}
    return expected


def test_an_adapter_that_the_transformer_saved_by_itself_is_what_peft_merges(models: Models, tmp_path: Path) -> None:
    """Its config has no word in front that says whose it is."""
    checkpoint = models("flux")
    component = checkpoint.components["transformer"]
    model = model_class(component).from_pretrained(component.folder)
    model.add_adapter(peft.LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_k"], init_lora_weights=False))
    model.save_lora_adapter(tmp_path)
    ours, expected = merged(checkpoint, tmp_path / "pytorch_lora_weights.safetensors"), merged_by_peft(model)
    assert expected
    for name, weight in expected.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_it_is_what_peft_merges(models: Models, tmp_path: Path, kind: str) -> None:
    """With PEFT's own layers as the truth, and its config as diffusers' trainers write it."""
    checkpoint, config = models("flux"), CONFIGS[kind]
    config.target_modules = set(OWN["flux"])
    component = checkpoint.components["transformer"]
    model = model_class(component).from_pretrained(component.folder)
    peft.inject_adapter_in_model(config, model)
    torch.manual_seed(0)
    trained = [weight for name, weight in model.named_parameters() if weight.requires_grad]
    for weight in trained:
        weight.data = torch.randn_like(weight) / 4
    tensors = {f"transformer.{name}": tensor.contiguous()
               for name, tensor in peft.get_peft_model_state_dict(model).items()}
    told = {f"transformer.{name}": sorted(value) if isinstance(value, set) else value
            for name, value in config.to_dict().items()}
    save_file(tensors, tmp_path / "style.safetensors", metadata={"lora_adapter_metadata": json.dumps(told)})
    expected = merged_by_peft(model)
    assert len(trained) == len(tensors) and len(expected) == 2 * len(OWN["flux"])
    ours = merged(checkpoint, tmp_path / "style.safetensors")
    for name, weight in expected.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prefix", ["lora_te1_text_model_", "text_encoders.clip_l.transformer.text_model."])
def test_clip_is_merged_as_diffusers_fuses_it(models: Models, tmp_path: Path, prefix: str) -> None:
    """The picture of a whole file of sd-scripts, and of the same as ComfyUI has it."""
    checkpoint, flat = models("flux"), prefix.startswith("lora")
    sizes = {name: weight.shape for name, weight in weights(checkpoint.components["text_encoder"]).items()}
    level = "" if "encoder.layers.0.mlp.fc1.weight" in sizes else "text_model."
    names = ("encoder.layers.0.self_attn.q_proj", "encoder.layers.1.self_attn.out_proj", "encoder.layers.0.mlp.fc1")
    clip, added = write(Layout(KOHYA, {prefix + (name.replace(".", "_") if flat else name): (level + name,)
                                       for name in names}), sizes)
    block = "lora_unet_double_blocks_0_img_attn_proj" if flat else "diffusion_model.double_blocks.0.img_attn.proj"
    sizes = {name: weight.shape for name, weight in weights(checkpoint.components["transformer"]).items()}
    tensors, _ = write(Layout(KOHYA, {block: ("transformer_blocks.0.attn.to_out.0",)}), sizes)
    path = tmp_path / "style.safetensors"
    save_file(clip | tensors, path)
    ours, before = merged(checkpoint, path, part="text_encoder"), weights(checkpoint.components["text_encoder"])
    for name, delta in added.items():
        torch.testing.assert_close(ours[name], before[name] + delta)
    assert gap(plan(checkpoint.path, str(path)), fused(checkpoint.path, {path: 1.0})) == 0


def test_both_clips_of_sd3_are_taken(models: Models, tmp_path: Path) -> None:
    checkpoint, tensors, added = models("sd3"), {}, {}
    for number, part in ((1, "text_encoder"), (2, "text_encoder_2")):
        sizes = {name: weight.shape for name, weight in weights(checkpoint.components[part]).items()}
        layer = "text_model.encoder.layers.1.mlp.fc2"
        made, added[part] = write(Layout(KOHYA, {f"lora_te{number}_{layer.replace('.', '_')}": (layer,)}), sizes)
        tensors |= made
    save_file(tensors, tmp_path / "style.safetensors")
    for part, deltas in added.items():
        before = weights(checkpoint.components[part])
        ours = merged(checkpoint, tmp_path / "style.safetensors", part=part)
        (name,) = deltas
        torch.testing.assert_close(ours[name], before[name] + deltas[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn,
                                   torch.float8_e5m2], ids=str)
def test_any_floating_point_and_rank_1_are_taken(models: Models, tmp_path: Path, dtype: torch.dtype) -> None:
    """And computed in float32, where diffusers multiplies by alpha in what the file has."""
    checkpoint = models("flux")
    sizes = {name: weight.shape for name, weight in weights(checkpoint.components["transformer"]).items()}
    form = low_rank(".lora_down.weight", ".lora_up.weight", 3.0, rank=1, dtype=dtype)
    tensors, added = write(LAYOUTS["sd-scripts", "flux"], sizes, form)
    tensors |= {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items() if name.endswith("alpha")}
    save_file(tensors, tmp_path / "style.safetensors")
    check_merged(checkpoint, tmp_path / "style.safetensors", added)


def test_a_missing_alpha_is_the_rank_where_all_programs_agree(models: Models, tmp_path: Path) -> None:
    checkpoint = models("flux")
    sizes = {name: weight.shape for name, weight in weights(checkpoint.components["transformer"]).items()}
    tensors, added = write(LAYOUTS["sd-scripts", "flux"], sizes)
    del tensors["lora_unet_double_blocks_0_img_attn_proj.alpha"]
    added["transformer_blocks.0.attn.to_out.0.weight"] *= 4 / 3
    save_file(tensors, tmp_path / "style.safetensors")
    check_merged(checkpoint, tmp_path / "style.safetensors", added)


def test_biases_are_added_to(models: Models, tmp_path: Path) -> None:
    """`diff_b` of ComfyUI, also of a fused layer, beside matrices and alone; an alpha is not for it."""
    checkpoint = models("flux")
    sizes = {name: weight.shape for name, weight in weights(checkpoint.components["transformer"]).items()}
    chosen = {name: layers for name, layers in LAYOUTS["ComfyUI", "flux"].layers.items() if "linear1" in name}
    tensors, added = write(Layout(KOHYA, chosen), sizes)
    for name, layers in {**chosen, "diffusion_model.img_in": ("x_embedder",)}.items():
        rows = [sizes[f"{layer}.bias"][0] for layer in layers]
        tensors[f"{name}.diff_b"] = torch.randn(sum(rows))
        parts = tensors[f"{name}.diff_b"].split(rows)
        added |= {f"{layer}.bias": part for layer, part in zip(layers, parts, strict=True)}
    save_file(tensors, tmp_path / "style.safetensors")
    check_merged(checkpoint, tmp_path / "style.safetensors", added, 0.5)


def test_two_formats_in_one_file_are_both_used(models: Models, tmp_path: Path) -> None:
    """diffusers drops one of them without a word."""
    checkpoint = models("flux")
    sizes = {name: weight.shape for name, weight in weights(checkpoint.components["transformer"]).items()}
    tensors, added = write(Layout(PEFT, {"transformer.x_embedder": ("x_embedder",)}), sizes)
    more, others = write(Layout(KOHYA, {"lora_unet_double_blocks_0_img_attn_proj": (
        "transformer_blocks.0.attn.to_out.0",)}), sizes)
    save_file(tensors | more, tmp_path / "style.safetensors")
    check_merged(checkpoint, tmp_path / "style.safetensors", added | others)
    save_file(tensors | {name.replace("transformer.", "diffusion_model."): tensor.clone()
                         for name, tensor in tensors.items()}, tmp_path / "twice.safetensors")
    with pytest.raises(ModelError, match=r"says twice .* x_embedder\.weight \(4 tensors, first '"):
        merged(checkpoint, tmp_path / "twice.safetensors")
