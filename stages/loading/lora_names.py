"""What trainers call the layers of a model: as diffusers does, as the model's own authors do, with dots or without.

Names are looked up in the model and never taken apart, so whatever a file has, it is a layer of this model or none.
"""

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache

from diffusers.models.normalization import AdaLayerNormContinuous
from torch import nn

from stages.models.checkpoint import Component
from stages.models.skeleton import config_text, skeleton

Names = Mapping[str, tuple[str, ...]]
QKV = ("to_q", "to_k", "to_v")
ADDED_QKV = ("add_q_proj", "add_k_proj", "add_v_proj")


def _in(path: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{path}.{name}" for name in names)


_FLUX_DOUBLE, _FLUX_SINGLE = "transformer_blocks.*", "single_transformer_blocks.*"
_EMBEDDERS = {"time_in": "timestep_embedder", "vector_in": "text_embedder", "guidance_in": "guidance_embedder"}
_FLUX_ENDS: Names = {
    "img_in": ("x_embedder",), "txt_in": ("context_embedder",),
    "final_layer.linear": ("proj_out",), "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
_FLUX_ATTENTION: Names = {
    "double_blocks.*.img_attn.qkv": _in(f"{_FLUX_DOUBLE}.attn", QKV),
    "double_blocks.*.txt_attn.qkv": _in(f"{_FLUX_DOUBLE}.attn", ADDED_QKV),
    "double_blocks.*.img_attn.proj": (f"{_FLUX_DOUBLE}.attn.to_out.0",),
    "double_blocks.*.txt_attn.proj": (f"{_FLUX_DOUBLE}.attn.to_add_out",),
}
_KREA2_BLOCKS = {"blocks.*": "transformer_blocks.*", "txtfusion.layerwise_blocks.*": "text_fusion.layerwise_blocks.*",
                 "txtfusion.refiner_blocks.*": "text_fusion.refiner_blocks.*"}
_KREA2_LAYERS = {"attn.wq": "attn.to_q", "attn.wk": "attn.to_k", "attn.wv": "attn.to_v", "attn.wo": "attn.to_out.0",
                 "attn.gate": "attn.to_gate", "mlp.gate": "ff.gate", "mlp.up": "ff.up", "mlp.down": "ff.down"}
# What the authors of a model call a layer, and which ones it is in diffusers; `*` is the number of a block.
ORIGINAL_NAMES: Mapping[str, Names] = {
    "FluxTransformer2DModel": {
        **_FLUX_ENDS, **_FLUX_ATTENTION,
        **{f"{old}.{layer}_layer": (f"time_text_embed.{new}.linear_{number}",)
           for old, new in _EMBEDDERS.items() for number, layer in ((1, "in"), (2, "out"))},
        "double_blocks.*.img_mlp.0": (f"{_FLUX_DOUBLE}.ff.net.0.proj",),
        "double_blocks.*.img_mlp.2": (f"{_FLUX_DOUBLE}.ff.net.2",),
        "double_blocks.*.txt_mlp.0": (f"{_FLUX_DOUBLE}.ff_context.net.0.proj",),
        "double_blocks.*.txt_mlp.2": (f"{_FLUX_DOUBLE}.ff_context.net.2",),
        "double_blocks.*.img_mod.lin": (f"{_FLUX_DOUBLE}.norm1.linear",),
        "double_blocks.*.txt_mod.lin": (f"{_FLUX_DOUBLE}.norm1_context.linear",),
        "single_blocks.*.linear1": (*_in(f"{_FLUX_SINGLE}.attn", QKV), f"{_FLUX_SINGLE}.proj_mlp"),
        "single_blocks.*.linear2": (f"{_FLUX_SINGLE}.proj_out",),
        "single_blocks.*.modulation.lin": (f"{_FLUX_SINGLE}.norm.linear",),
        # XLabs trains attention processors beside the layers, which add to what the layers say.
        "double_blocks.*.processor.qkv_lora1": _in(f"{_FLUX_DOUBLE}.attn", QKV),
        "double_blocks.*.processor.qkv_lora2": _in(f"{_FLUX_DOUBLE}.attn", ADDED_QKV),
        "double_blocks.*.processor.proj_lora1": (f"{_FLUX_DOUBLE}.attn.to_out.0",),
        "double_blocks.*.processor.proj_lora2": (f"{_FLUX_DOUBLE}.attn.to_add_out",),
        "single_blocks.*.processor.qkv_lora": _in(f"{_FLUX_SINGLE}.attn", QKV),
        "single_blocks.*.processor.proj_lora": (f"{_FLUX_SINGLE}.proj_out",),
    },
    "Flux2Transformer2DModel": {
        **_FLUX_ENDS, **_FLUX_ATTENTION,
        **{f"{old}.{layer}_layer": (f"time_guidance_embed.{_EMBEDDERS[old]}.linear_{number}",)
           for old in ("time_in", "guidance_in") for number, layer in ((1, "in"), (2, "out"))},
        "double_blocks.*.img_mlp.0": (f"{_FLUX_DOUBLE}.ff.linear_in",),
        "double_blocks.*.img_mlp.2": (f"{_FLUX_DOUBLE}.ff.linear_out",),
        "double_blocks.*.txt_mlp.0": (f"{_FLUX_DOUBLE}.ff_context.linear_in",),
        "double_blocks.*.txt_mlp.2": (f"{_FLUX_DOUBLE}.ff_context.linear_out",),
        "single_blocks.*.linear1": (f"{_FLUX_SINGLE}.attn.to_qkv_mlp_proj",),
        "single_blocks.*.linear2": (f"{_FLUX_SINGLE}.attn.to_out",),
        **{f"{name}.lin": (f"{name}.linear",) for name in
           ("single_stream_modulation", "double_stream_modulation_img", "double_stream_modulation_txt")},
    },
    "SD3Transformer2DModel": {
        "t_embedder.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
        "t_embedder.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
        "y_embedder.mlp.0": ("time_text_embed.text_embedder.linear_1",),
        "y_embedder.mlp.2": ("time_text_embed.text_embedder.linear_2",),
        "final_layer.linear": ("proj_out",), "final_layer.adaLN_modulation.1": ("norm_out.linear",),
        "joint_blocks.*.x_block.attn.qkv": _in(f"{_FLUX_DOUBLE}.attn", QKV),
        "joint_blocks.*.x_block.attn2.qkv": _in(f"{_FLUX_DOUBLE}.attn2", QKV),
        "joint_blocks.*.context_block.attn.qkv": _in(f"{_FLUX_DOUBLE}.attn", ADDED_QKV),
        "joint_blocks.*.x_block.attn.proj": (f"{_FLUX_DOUBLE}.attn.to_out.0",),
        "joint_blocks.*.x_block.attn2.proj": (f"{_FLUX_DOUBLE}.attn2.to_out.0",),
        "joint_blocks.*.context_block.attn.proj": (f"{_FLUX_DOUBLE}.attn.to_add_out",),
        "joint_blocks.*.x_block.adaLN_modulation.1": (f"{_FLUX_DOUBLE}.norm1.linear",),
        "joint_blocks.*.context_block.adaLN_modulation.1": (f"{_FLUX_DOUBLE}.norm1_context.linear",),
        "joint_blocks.*.x_block.mlp.fc1": (f"{_FLUX_DOUBLE}.ff.net.0.proj",),
        "joint_blocks.*.x_block.mlp.fc2": (f"{_FLUX_DOUBLE}.ff.net.2",),
        "joint_blocks.*.context_block.mlp.fc1": (f"{_FLUX_DOUBLE}.ff_context.net.0.proj",),
        "joint_blocks.*.context_block.mlp.fc2": (f"{_FLUX_DOUBLE}.ff_context.net.2",),
    },
    "Krea2Transformer2DModel": {
        **{f"{block}.{layer}": (f"{_KREA2_BLOCKS[block]}.{_KREA2_LAYERS[layer]}",)
           for block in _KREA2_BLOCKS for layer in _KREA2_LAYERS},
        "first": ("img_in",), "last.linear": ("final_layer.linear",), "tproj.1": ("time_mod_proj",),
        "tmlp.0": ("time_embed.linear_1",), "tmlp.2": ("time_embed.linear_2",),
        "txtmlp.1": ("txt_in.linear_1",), "txtmlp.3": ("txt_in.linear_2",),
        "txtfusion.projector": ("text_fusion.projector",),
    },
    "ZImageTransformer2DModel": {
        "x_embedder": ("all_x_embedder.2-1",), "final_layer.linear": ("all_final_layer.2-1.linear",),
        "final_layer.adaLN_modulation.1": ("all_final_layer.2-1.adaLN_modulation.1",),
        **{f"{part}.*.attention.qkv": _in(f"{part}.*.attention", QKV)
           for part in ("layers", "noise_refiner", "context_refiner")},
        **{f"{part}.*.attention.out": (f"{part}.*.attention.to_out.0",)
           for part in ("layers", "noise_refiner", "context_refiner")},
    },
}


class LayerNames:
    """The linear layers of a component, by all names that a file may have for them."""

    def __init__(self, component: Component) -> None:
        self._model = skeleton(component)
        self.layers = {name: layer for name, layer in self._model.named_modules() if isinstance(layer, nn.Linear)}
        self._own: Names = {name: (name,) for name in self.layers}
        self.original: Names = dict(self._named_by_authors(ORIGINAL_NAMES.get(component.class_name, {})))
        if component.library != "diffusers":
            # transformers has done without this level since CLIP's encoder is a model of its own.
            self._own = {**{f"text_model.{name}": (name,) for name in self.layers}, **self._own,
                         **{name.removeprefix("text_model."): (name,) for name in self.layers}}
        self._dotted = {**self.original, **self._own}
        self._flat = _flattened(self._dotted)

    def find(self, name: str, flat: bool) -> tuple[str, ...]:
        """The layers that a name means: several where the authors have one for them, none where there is none.

        A flat name has `_` in place of each dot.
        """
        return (self._flat if flat else self._dotted).get(name, ())

    def has_changed_halves(self, name: str, flat: bool) -> bool:
        """Whether it is the authors' name of a layer that says shift and scale, which is scale and shift in diffusers.

        diffusers changes the halves of such weights where it converts a checkpoint.
        """
        found = self.find(name, flat)
        own = name.replace(".", "_") in (each.replace(".", "_") for each in found)
        parents = [self._model.get_submodule(layer.rpartition(".")[0]) for layer in found]
        return not own and any(isinstance(parent, AdaLayerNormContinuous) for parent in parents)

    def _named_by_authors(self, table: Names) -> Iterator[tuple[str, tuple[str, ...]]]:
        for name, layers in table.items():
            pattern = re.escape(layers[0]).replace(r"\*", "([0-9]+)")
            for found in (re.fullmatch(pattern, layer) for layer in self.layers):
                number = found[1] if found and found.groups() else ""
                here = tuple(layer.replace("*", number) for layer in layers)
                if found and all(layer in self.layers for layer in here):
                    yield name.replace("*", number), here


def _flattened(names: Names) -> Names:
    """Names with `_` in place of each dot, but for those that then mean two things."""
    flat: dict[str, set[tuple[str, ...]]] = {}
    for name, layers in names.items():
        flat.setdefault(name.replace(".", "_"), set()).add(layers)
    return {name: next(iter(meant)) for name, meant in flat.items() if len(meant) == 1}


def layer_names(component: Component) -> LayerNames:
    """The names of a component's layers, made once."""
    return _layer_names(component, config_text(component))


@lru_cache(maxsize=8)
def _layer_names(component: Component, config: str) -> LayerNames:
    return LayerNames(component)
