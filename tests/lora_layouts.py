"""Files of LoRAs as their trainers lay them out, for tiny models, and by hand what each of them adds.

A row of docs/loras.md is a layout here for each of its families: `tests/test_lora_trainers.py` holds them together.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from tests import tiny, tiny_families

Tensors = dict[str, torch.Tensor]
# Of a layer's name in the file and its size: its tensors, and what they add to the weight.
Form = Callable[[str, int, int], tuple[Tensors, torch.Tensor]]
CHECKPOINTS: Mapping[str, Callable[[Path], Path]] = {
    "flux": tiny.flux, "flux2": tiny_families.flux2, "qwen-image": tiny_families.qwen_image,
    "sd3": tiny_families.sd3, "z-image": tiny_families.z_image,
}
ALPHA = 3.0


def low_rank(
    down: str, up: str, alpha: float | None = None, rank: int = 4, dtype: torch.dtype = torch.float32
) -> Form:
    """A pair under two suffixes, with an alpha or without."""
    def form(name: str, out: int, into: int) -> tuple[Tensors, torch.Tensor]:
        first, second = (torch.randn(rank, into) / 8).to(dtype), (torch.randn(out, rank) / 8).to(dtype)
        said = {} if alpha is None else {f"{name}.alpha": torch.tensor(alpha)}
        return ({f"{name}{down}": first, f"{name}{up}": second, **said},
                second.float() @ first.float() * (1 if alpha is None else alpha / rank))
    return form


def lokr(alpha: float | None = ALPHA, rank: int = 2, left_product: bool = False, rows: int = 4) -> Form:
    """LyCORIS' LoKr: the first factor [rows, 4] whole or a product, the second a product."""
    def form(name: str, out: int, into: int) -> tuple[Tensors, torch.Tensor]:
        w1, first, second = torch.randn(rows, 4), torch.randn(out // rows, rank) / 4, torch.randn(rank, into // 4) / 4
        factors = {"w1": w1}
        if left_product:
            factors = {"w1_a": torch.randn(rows, rank), "w1_b": torch.randn(rank, 4)}
            w1 = factors["w1_a"] @ factors["w1_b"]
        said = {} if alpha is None else {f"{name}.alpha": torch.tensor(alpha)}
        tensors = {f"{name}.lokr_{part}": value for part, value in {**factors, "w2_a": first, "w2_b": second}.items()}
        return tensors | said, torch.kron(w1, first @ second) * (1 if alpha is None else alpha / rank)
    return form


def whole_lokr(name: str, out: int, into: int) -> tuple[Tensors, torch.Tensor]:
    """A LoKr of two whole matrices, whose alpha LyCORIS writes and means nothing by."""
    w1, w2 = torch.randn(4, 4), torch.randn(out // 4, into // 4) / 8
    return {f"{name}.lokr_w1": w1, f"{name}.lokr_w2": w2, f"{name}.alpha": torch.tensor(1e9)}, torch.kron(w1, w2)


def loha(name: str, out: int, into: int) -> tuple[Tensors, torch.Tensor]:
    """LyCORIS' LoHa."""
    parts = {"w1_a": torch.randn(out, 2), "w1_b": torch.randn(2, into) / 4, "w2_a": torch.randn(out, 2),
             "w2_b": torch.randn(2, into) / 4}
    delta = (parts["w1_a"] @ parts["w1_b"]) * (parts["w2_a"] @ parts["w2_b"]) * (ALPHA / 2)
    tensors = {f"{name}.hada_{part}": value for part, value in parts.items()}
    return tensors | {f"{name}.alpha": torch.tensor(ALPHA)}, delta


def difference(name: str, out: int, into: int) -> tuple[Tensors, torch.Tensor]:
    """The difference itself, as ComfyUI extracts it and LyCORIS' full modules have it."""
    delta = torch.randn(out, into) / 8
    return {f"{name}.diff": delta}, delta


PEFT = low_rank(".lora_A.weight", ".lora_B.weight")
PEFT_ALPHA = low_rank(".lora_A.weight", ".lora_B.weight", ALPHA)
DEFAULT = low_rank(".lora_A.default.weight", ".lora_B.default.weight")
KOHYA = low_rank(".lora_down.weight", ".lora_up.weight", ALPHA)
DOTS = low_rank(".lora.down.weight", ".lora.up.weight")
XLABS = low_rank(".down.weight", ".up.weight")


@dataclass(frozen=True)
class Layout:
    """A file as a trainer lays it out."""

    form: Form
    """What it has for a layer."""
    layers: Mapping[str, tuple[str, ...]]
    """Its layers, and which of the model's each of them is."""
    same_as_diffusers: bool = True
    """Whether diffusers reads the same from it."""
    halves: str = ""
    """The layer whose shift and scale change places in diffusers."""


def _one(prefix: str, layers: tuple[str, ...], flat: bool = False) -> dict[str, tuple[str, ...]]:
    return {prefix + (layer.replace(".", "_") if flat else layer): (layer,) for layer in layers}


def _of(prefix: str, layers: Mapping[str, tuple[str, ...]], flat: bool = False) -> dict[str, tuple[str, ...]]:
    return {prefix + (name.replace(".", "_") if flat else name): ours for name, ours in layers.items()}


_ATTENTION = "transformer_blocks.0.attn"
OWN = {
    "flux": ("x_embedder", "norm_out.linear", "transformer_blocks.1.norm1.linear", f"{_ATTENTION}.to_q",
             "transformer_blocks.1.ff_context.net.0.proj", "single_transformer_blocks.3.proj_mlp"),
    "flux2": ("x_embedder", "norm_out.linear", f"{_ATTENTION}.add_q_proj", "transformer_blocks.0.ff.linear_in",
              "single_transformer_blocks.1.attn.to_qkv_mlp_proj"),
    "qwen-image": ("img_in", "norm_out.linear", "time_text_embed.timestep_embedder.linear_1", f"{_ATTENTION}.to_k",
                   "transformer_blocks.1.attn.to_add_out", "transformer_blocks.1.img_mlp.net.0.proj",
                   "transformer_blocks.0.txt_mod.1"),
    "sd3": ("context_embedder", f"{_ATTENTION}.to_out.0", "transformer_blocks.0.attn2.to_q",
            "transformer_blocks.1.norm1.linear", "transformer_blocks.0.ff.net.2"),
    "z-image": ("layers.0.attention.to_q", "layers.1.attention.to_out.0", "noise_refiner.0.feed_forward.w2",
                "context_refiner.0.attention.to_v", "layers.0.adaLN_modulation.0", "cap_embedder.1"),
}
_DOUBLE = {
    "double_blocks.0.img_attn.qkv": tuple(f"{_ATTENTION}.to_{part}" for part in "qkv"),
    "double_blocks.0.txt_attn.qkv": tuple(f"{_ATTENTION}.add_{part}_proj" for part in "qkv"),
    "double_blocks.0.img_attn.proj": (f"{_ATTENTION}.to_out.0",),
    "double_blocks.0.txt_attn.proj": (f"{_ATTENTION}.to_add_out",),
}
_SINGLE_QKV = tuple(f"single_transformer_blocks.2.attn.to_{part}" for part in "qkv")
FLUX_BLOCKS = _DOUBLE | {
    "double_blocks.0.img_mlp.0": ("transformer_blocks.0.ff.net.0.proj",),
    "double_blocks.0.txt_mlp.2": ("transformer_blocks.0.ff_context.net.2",),
    "double_blocks.0.img_mod.lin": ("transformer_blocks.0.norm1.linear",),
    "double_blocks.0.txt_mod.lin": ("transformer_blocks.0.norm1_context.linear",),
    "single_blocks.2.linear1": (*_SINGLE_QKV, "single_transformer_blocks.2.proj_mlp"),
    "single_blocks.2.linear2": ("single_transformer_blocks.2.proj_out",),
    "single_blocks.2.modulation.lin": ("single_transformer_blocks.2.norm.linear",),
}
FLUX_ENDS = {
    "img_in": ("x_embedder",), "txt_in": ("context_embedder",), "final_layer.linear": ("proj_out",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
# All that a block has.
FLUX_WHOLE = FLUX_BLOCKS | {
    "double_blocks.0.img_mlp.2": ("transformer_blocks.0.ff.net.2",),
    "double_blocks.0.txt_mlp.0": ("transformer_blocks.0.ff_context.net.0.proj",),
}
_XLABS = {
    "double_blocks.0.processor.qkv_lora1": _DOUBLE["double_blocks.0.img_attn.qkv"],
    "double_blocks.0.processor.qkv_lora2": _DOUBLE["double_blocks.0.txt_attn.qkv"],
    "double_blocks.1.processor.proj_lora1": ("transformer_blocks.1.attn.to_out.0",),
    "double_blocks.1.processor.proj_lora2": ("transformer_blocks.1.attn.to_add_out",),
    "single_blocks.2.processor.qkv_lora": _SINGLE_QKV,
    "single_blocks.2.processor.proj_lora": ("single_transformer_blocks.2.proj_out",),
}
_FLUX2_BLOCKS = _DOUBLE | {
    "double_blocks.0.img_mlp.0": ("transformer_blocks.0.ff.linear_in",),
    "double_blocks.0.txt_mlp.2": ("transformer_blocks.0.ff_context.linear_out",),
    "single_blocks.1.linear1": ("single_transformer_blocks.1.attn.to_qkv_mlp_proj",),
    "single_blocks.1.linear2": ("single_transformer_blocks.1.attn.to_out",),
    "img_in": ("x_embedder",), "final_layer.linear": ("proj_out",),
    "time_in.in_layer": ("time_guidance_embed.timestep_embedder.linear_1",),
}
FLUX2_LAYERS = _FLUX2_BLOCKS | {
    "guidance_in.out_layer": ("time_guidance_embed.guidance_embedder.linear_2",),
    "double_stream_modulation_img.lin": ("double_stream_modulation_img.linear",),
    "single_stream_modulation.lin": ("single_stream_modulation.linear",),
}
_FINAL = {"final_layer.adaLN_modulation.1": ("norm_out.linear",)}
SD3_BLOCKS = {
    "joint_blocks.0.x_block.attn.qkv": tuple(f"{_ATTENTION}.to_{part}" for part in "qkv"),
    "joint_blocks.0.x_block.attn2.qkv": tuple(f"transformer_blocks.0.attn2.to_{part}" for part in "qkv"),
    "joint_blocks.0.context_block.attn.qkv": tuple(f"{_ATTENTION}.add_{part}_proj" for part in "qkv"),
    "joint_blocks.0.x_block.attn.proj": (f"{_ATTENTION}.to_out.0",),
    "joint_blocks.0.context_block.mlp.fc1": ("transformer_blocks.0.ff_context.net.0.proj",),
    "joint_blocks.1.x_block.mlp.fc2": ("transformer_blocks.1.ff.net.2",),
    "joint_blocks.0.context_block.adaLN_modulation.1": ("transformer_blocks.0.norm1_context.linear",),
    "joint_blocks.1.context_block.adaLN_modulation.1": ("transformer_blocks.1.norm1_context.linear",),
}
Z_IMAGE_BLOCKS = {
    "layers.0.attention.qkv": tuple(f"layers.0.attention.to_{part}" for part in "qkv"),
    "noise_refiner.0.attention.out": ("noise_refiner.0.attention.to_out.0",),
    "layers.1.feed_forward.w1": ("layers.1.feed_forward.w1",),
}
_LOKR_FLUX2 = (f"{_ATTENTION}.to_q", f"{_ATTENTION}.to_add_out", "transformer_blocks.0.ff.linear_in",
               "single_transformer_blocks.1.attn.to_out")

LAYOUTS: Mapping[tuple[str, str], Layout] = {
    **{("diffusers", family): Layout(PEFT, _one("transformer.", layers)) for family, layers in OWN.items()},
    # diffusers has no reader for alphas beside its own names but for FLUX.1, and takes them for another trainer's.
    **{("alphas beside", family): Layout(PEFT_ALPHA, _one("transformer.", layers), family == "flux")
       for family, layers in OWN.items()},
    **{("down and up", family): Layout(KOHYA, _one("transformer.", layers), False) for family, layers in OWN.items()},
    ("sd-scripts", "flux"): Layout(KOHYA, _of("lora_unet_", FLUX_BLOCKS | FLUX_ENDS, True), False,
                                   "lora_unet_final_layer_adaLN_modulation_1"),
    ("sd-scripts", "sd3"): Layout(KOHYA, _of("lora_unet_", SD3_BLOCKS, True), False,
                                  "lora_unet_joint_blocks_1_context_block_adaLN_modulation_1"),
    ("sd-scripts", "flux2"): Layout(KOHYA, _of("lora_unet_", _FLUX2_BLOCKS, True)),
    ("sd-scripts", "z-image"): Layout(KOHYA, _of("lora_unet_", Z_IMAGE_BLOCKS, True), False),
    ("musubi-tuner", "qwen-image"): Layout(KOHYA, _one("lora_unet_", OWN["qwen-image"][:5], True)),
    ("musubi-tuner", "z-image"): Layout(KOHYA, _one("lora_unet_", OWN["z-image"], True)),
    ("ComfyUI", "flux"): Layout(KOHYA, _of("diffusion_model.", FLUX_BLOCKS), False),
    ("ComfyUI", "flux2"): Layout(KOHYA, _of("diffusion_model.", FLUX2_LAYERS), False),
    ("ComfyUI", "sd3"): Layout(KOHYA, _of("diffusion_model.", SD3_BLOCKS), False,
                               "diffusion_model.joint_blocks.1.context_block.adaLN_modulation.1"),
    ("ComfyUI", "z-image"): Layout(KOHYA, _of("diffusion_model.", Z_IMAGE_BLOCKS), False),
    ("ComfyUI", "qwen-image"): Layout(KOHYA, _one("diffusion_model.", OWN["qwen-image"])),
    ("ai-toolkit", "flux2"): Layout(PEFT, _of("diffusion_model.", FLUX2_LAYERS)),
    ("ai-toolkit, last layer", "flux2"): Layout(PEFT, _of("diffusion_model.", _FINAL), False,
                                                "diffusion_model.final_layer.adaLN_modulation.1"),
    ("ai-toolkit", "qwen-image"): Layout(PEFT, _one("diffusion_model.", OWN["qwen-image"])),
    ("ai-toolkit", "z-image"): Layout(PEFT, _one("diffusion_model.", OWN["z-image"])),
    **{("OneTrainer", family): Layout(KOHYA, _one("lora_transformer_", layers, True), False)
       for family, layers in OWN.items()},
    ("XLabs", "flux"): Layout(XLABS, _XLABS),
    ("base_model", "flux"): Layout(PEFT, _of("base_model.model.", FLUX_BLOCKS), False),
    ("base_model", "flux2"): Layout(PEFT, _of("base_model.model.", FLUX2_LAYERS)),
    ("default", "qwen-image"): Layout(DEFAULT, _one("", OWN["qwen-image"])),
    ("default", "z-image"): Layout(DEFAULT, _one("", OWN["z-image"])),
    ("bare", "qwen-image"): Layout(KOHYA, _one("", OWN["qwen-image"])),
    ("dots", "z-image"): Layout(DOTS, _of("diffusion_model.", dict(list(Z_IMAGE_BLOCKS.items())[:2]))),
    ("LoKr of ai-toolkit", "flux2"): Layout(lokr(rows=2), _of("diffusion_model.", FLUX2_LAYERS), False),
    ("LoKr of ai-toolkit", "z-image"): Layout(lokr(), _one("diffusion_model.", tuple(
        layer for layer in OWN["z-image"] if "feed_forward" not in layer))),
    ("LoKr of LyCORIS", "flux"): Layout(lokr(left_product=True, rows=2), _one("lycoris_", OWN["flux"], True), False),
    ("LoKr of LyCORIS in sd-scripts", "flux"): Layout(lokr(rows=2), _of("lora_unet_", FLUX_BLOCKS, True), False),
    ("LoKr of LyCORIS", "flux2"): Layout(lokr(rank=1, left_product=True), _one("lycoris_", _LOKR_FLUX2, True)),
    ("LoKr of LyCORIS", "sd3"): Layout(whole_lokr, _one("lycoris_", OWN["sd3"], True), False),
    ("LoKr of SimpleTuner", "flux2"): Layout(whole_lokr, _one("", _LOKR_FLUX2)),
    ("LoKr of PEFT", "flux2"): Layout(lokr(None), _one("transformer.", _LOKR_FLUX2)),
    ("LoHa of LyCORIS", "flux"): Layout(loha, _one("lycoris_", OWN["flux"], True), False),
    ("differences", "flux"): Layout(difference, _of("diffusion_model.", FLUX_BLOCKS | FLUX_ENDS), False,
                                    "diffusion_model.final_layer.adaLN_modulation.1"),
}


def write(layout: Layout, sizes: Mapping[str, torch.Size], form: Form | None = None) -> tuple[Tensors, Tensors]:
    """The tensors of a layout's file for a model with weights of these sizes, and what they add to each weight."""
    torch.manual_seed(0)
    tensors: Tensors = {}
    added: Tensors = {}
    for name, layers in layout.layers.items():
        rows = [sizes[f"{layer}.weight"][0] for layer in layers]
        made, delta = (form or layout.form)(name, sum(rows), sizes[f"{layers[0]}.weight"][1])
        tensors |= made
        if name == layout.halves:
            delta = torch.cat([*reversed(delta.chunk(2))])
        added |= {f"{layer}.weight": part for layer, part in zip(layers, delta.split(rows), strict=True)}
    return tensors, added
