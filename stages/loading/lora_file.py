"""A LoRA's file taken apart: which tensors say together what is added to a layer, and that none is left over.

Each name is a prefix that says the component, the layer's name, and a suffix that says what the tensor is. Names that
are not made so, and tensors that go with nothing, are refused, unless they are known to add nothing.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open

from stages.errors import ModelError
from stages.loading.lora_config import TrainerConfig, read_configs
from stages.models.lora import Lora, check_unchanged
from stages.models.safetensors_header import read_header
from stages.wording import counted

TRANSFORMER = "transformer"
# Who begins a name so: the component that is meant, and whether the layer's name has `_` for its dots.
PREFIXES: Mapping[str, tuple[str, bool]] = {
    "lora_unet_": (TRANSFORMER, True), "lora_transformer_": (TRANSFORMER, True), "lycoris_": (TRANSFORMER, True),
    "transformer.": (TRANSFORMER, False), "diffusion_model.": (TRANSFORMER, False),
    "base_model.model.": (TRANSFORMER, False),
    "lora_te_": ("text_encoder", True), "lora_te1_": ("text_encoder", True), "lora_te2_": ("text_encoder_2", True),
    "text_encoders.clip_l.transformer.": ("text_encoder", False), "text_encoder.": ("text_encoder", False),
    "text_encoders.clip_g.transformer.": ("text_encoder_2", False), "text_encoder_2.": ("text_encoder_2", False),
    "lora_te3_": ("T5", True), "text_encoders.t5xxl.transformer.": ("T5", False), "text_encoder_3.": ("T5", False),
    "": (TRANSFORMER, False),
}
_FACTORS = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "hada_w1_a", "hada_w1_b",
            "hada_w2_a", "hada_w2_b")
# What ends a name so is that part of what is added.
SUFFIXES: Mapping[str, str] = {
    ".lora_A.weight": "down", ".lora_B.weight": "up", ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up", ".lora_down.weight": "down", ".lora_up.weight": "up",
    ".lora.down.weight": "down", ".lora.up.weight": "up", ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up", ".down.weight": "down", ".up.weight": "up",
    ".lora_B.bias": "up_bias", ".lora_B.default.bias": "up_bias", ".alpha": "alpha", ".diff": "diff",
    ".diff_b": "diff_b",
    **dict.fromkeys((".lora_magnitude_vector", ".lora_magnitude_vector.weight",
                     ".lora_magnitude_vector.default.weight"), "magnitude"),
    **{f".{factor}": factor for factor in _FACTORS},
}
# What ends a name so is not run, and why.
NOT_RUN: Mapping[str, str] = {
    **dict.fromkeys((".dora_scale",), "DoRA as LyCORIS writes it"),
    **dict.fromkeys((".lora_mid.weight", ".lokr_t2", ".hada_t1", ".hada_t2"), "for convolutions"),
    **dict.fromkeys((".oft_blocks", ".oft_diag", ".oft_R", ".oft_R.weight", ".oft_R.default.weight", ".rescale"),
                    "OFT"),
    **dict.fromkeys((".query_norm.scale", ".key_norm.scale"), "weights that replace those of a norm, as in a "
                                                             "control LoRA"),
    **dict.fromkeys((".w_norm", ".b_norm"), "what is added to a norm"),
    **dict.fromkeys((".scale_weight", ".weight_scale", ".scale_input", ".input_scale"), "scales of quantized "
                                                                                       "matrices"),
    **dict.fromkeys((".on_input",), "IA3"),
}
_KINDS = {**SUFFIXES, **NOT_RUN}
# PEFT's own prefix, behind which it has whole weights too.
_PEFT = "base_model.model."
REPLACED = "whole weights that replace the model's, as by PEFT's modules_to_save and bias"
UNKNOWN = "under names that no known trainer writes"
INCOMPLETE = "without others that belong to them"
# Together they are an update; an alpha may come with any, and `diff_b` stands alone beside it.
WHOLE = (
    {"down", "up"}, {"down", "up", "up_bias"}, {"down", "up", "magnitude"}, {"diff"},
    {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
    *({*left, *right} for left in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
      for right in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))),
)
_READ = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I32", "I16", "I8", "U8"})


@dataclass(frozen=True)
class Group:
    """The tensors of a file that say what is added to one layer."""

    component: str
    """The component that has the layer."""
    flat: bool
    """Whether the layer's name has `_` in place of each dot."""
    layer: str
    """The layer as the file names it."""
    names: Mapping[str, str]
    """The tensors' names in the file, by what they are."""
    tensors: Mapping[str, torch.Tensor]
    """The tensors, by what they are."""

    @property
    def first(self) -> str:
        """The first of the tensors' names."""
        return next(iter(self.names.values()))

    @property
    def shown(self) -> str:
        """The layer's name for a message: a file's names may hold what a terminal obeys."""
        return repr(self.layer)[1:-1][:100]

    @property
    def is_named_as_peft_does(self) -> bool:
        """Whether it is a pair under PEFT's names."""
        return ".lora_A." in self.names.get("down", "")

    def adds_nothing(self) -> bool:
        """Whether it is known to: one of the factors is all zeros, and so is all that is no factor."""
        values = {part: tensor.float() for part, tensor in self.tensors.items()}
        factors = [value for part, value in values.items() if part in (*_FACTORS, "down", "up")]
        others = [value for part, value in values.items() if part not in (*_FACTORS, "down", "up", "alpha")]
        # A DoRA scales the weight also where its matrices add nothing, and zeros may replace what is none.
        return (bool(factors or others) and not {NOT_RUN[".dora_scale"], "magnitude", REPLACED} & values.keys()
                and all(bool(value.isfinite().all()) for value in values.values())
                and not any(bool(value.any()) for value in others)
                and (not factors or any(not value.any() for value in factors)))


@dataclass(frozen=True)
class LoraFile:
    """What a file holds: nothing else than this adds to anything."""

    lora: Lora
    """Whose it is."""
    groups: tuple[Group, ...]
    """What is added, layer by layer."""
    configs: Mapping[str, TrainerConfig]
    """What its trainer says of each component."""
    told: frozenset[str]
    """The components with an alpha beside a pair under PEFT's names."""
    doras: frozenset[str]
    """The components with a pair that has lengths for rows."""

    def of(self, component: str) -> list[Group]:
        """What is added to a component."""
        return [group for group in self.groups if group.component == component]


def read_lora_file(lora: Lora) -> LoraFile:
    """The file, its tensors mapped; ModelError where one goes with nothing, or is of a kind that is not run."""
    check_unchanged(lora)
    for name, entry in read_header(lora.path).items():
        if entry.dtype not in _READ:
            raise ModelError(f"{lora.source} has {name[:100]!r} in {entry.dtype} -> use a LoRA in floating point")
    try:
        with safe_open(lora.path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
    except SafetensorError as error:
        raise ModelError(f"{lora.source} cannot be read ({' '.join(str(error).split()):.200}) -> fetch it again, or "
                         f"use another LoRA") from error
    groups = _grouped(lora, tensors)
    causes: dict[str, list[str]] = {}
    for group in groups:
        if (cause := _not_run(group)) and not group.adds_nothing():
            causes.setdefault(cause, []).extend(group.names.values())
    for cause, names in causes.items():
        # A DoRA has matrices beside what makes it one, which may come first.
        first = next((name for name in names if _kind(name)[0] == cause), names[0])
        raise ModelError(f"{lora.source} holds what is not run: {len(names)} of {len(tensors)} tensors are {cause}, "
                         f"such as {first[:120]!r} -> use a LoRA without them")
    run = tuple(group for group in groups if not _not_run(group))
    told = frozenset(group.component for group in run if group.is_named_as_peft_does and "alpha" in group.names)
    doras = frozenset(group.component for group in run if "magnitude" in group.names)
    return LoraFile(lora, run, read_configs(lora), told, doras)


def refuse(lora: Lora, what: str, groups: Collection[Group], step: str) -> ModelError:
    """The error that names what is not run, how many tensors that are, and the first of them."""
    names = [name for group in groups for name in group.names.values()]
    return ModelError(f"{lora.source} {what} ({counted(len(names), 'tensor')}, first {names[0][:120]!r}) -> {step}")


def _grouped(lora: Lora, tensors: Mapping[str, torch.Tensor]) -> list[Group]:
    names: dict[tuple[str, str], dict[str, str]] = {}
    for name in tensors:
        prefix = max((each for each in PREFIXES if name.startswith(each)), key=len)
        part, suffix = _kind(name)
        layer = name.removeprefix(prefix).removesuffix(suffix)
        parts = names.setdefault((prefix, layer), {})
        if part in parts:
            raise ModelError(f"{lora.source} says twice what is added to a layer: {parts[part][:120]!r} and "
                             f"{name[:120]!r} -> use a LoRA in one format")
        parts[part] = name
    return [Group(*PREFIXES[prefix], layer, parts, {part: tensors[name] for part, name in parts.items()})
            for (prefix, layer), parts in names.items()]


def _kind(name: str) -> tuple[str, str]:
    """What a tensor is, and the suffix that says so."""
    suffix = max((each for each in _KINDS if name.endswith(each)), key=len, default="")
    if not suffix and name.startswith(_PEFT) and name.endswith((".weight", ".bias")) and "lora_" not in name:
        return REPLACED, ""
    return _KINDS.get(suffix, UNKNOWN), suffix


def _not_run(group: Group) -> str:
    """Why a group is not run; empty where it is."""
    for part in group.names:
        if part in (UNKNOWN, REPLACED) or part in NOT_RUN.values():
            return part
    parts = group.names.keys() - {"alpha", "diff_b"}
    if parts in WHOLE and not ("alpha" in group.names and parts == {"diff"}):
        return ""
    return "" if not parts and group.names.keys() == {"diff_b"} else INCOMPLETE
