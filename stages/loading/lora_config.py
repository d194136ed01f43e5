"""PEFT's config in a LoRA's file, as diffusers' trainers write it: JSON from a stranger, and numbers are taken."""

import math
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from stages.errors import ModelError
from stages.models.lora import Lora
from stages.models.safetensors_header import header_text, parse_header
from stages.strict_json import strict_json

KEY = "lora_adapter_metadata"
# What a file's tensors mean does not depend on these: they were for the training, or their tensors are in the file.
_HARMLESS = frozenset({
    "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "modules_to_save", "trainable_token_indices", "ensure_weight_tying",
    "bias", "lora_bias", "lora_dropout", "rank_dropout", "module_dropout", "rank_dropout_scale", "fan_in_fan_out",
    "init_lora_weights", "init_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "megatron_core", "qalora_group_size", "runtime_config", "decompose_both", "decompose_factor",
    "use_effective_conv2d",
})
# Other ways to begin a training change the weights of the model as well, which are not in the file.
_BEGINNINGS = (True, False, None, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class TrainerConfig:
    """What a config says of one component."""

    lora: Lora
    """Whose it is."""
    fields: Mapping[str, Any]
    """PEFT's fields."""

    def strength(self, names: Iterable[str], rank: int | None) -> float:
        """Alpha over rank for a layer, by any of its names; `rank` is that of its matrices, if they have one."""
        names = list(names)
        alpha = self._number("alpha_pattern", "lora_alpha" if "lora_alpha" in self.fields else "alpha", names)
        told = rank if rank and "r" not in self.fields else self._number("rank_pattern", "r", names)
        if told <= 0 or rank not in (None, told):
            raise ModelError(f"{self.lora.source} says rank {told:g} for {names[0][:100]!r}, and its matrices have "
                             f"{rank or 'another'} -> use another LoRA")
        return alpha / (math.sqrt(told) if self.fields.get("use_rslora") else told)

    def _number(self, pattern: str, field: str, names: list[str]) -> float:
        own = (value for key, value in (self.fields.get(pattern) or {}).items()
               if any(_means(self.lora, key, name) for name in names))
        return number(self.lora, next(own, self.fields.get(field)))


def read_configs(lora: Lora) -> Mapping[str, TrainerConfig]:
    """What the file's config says of each component; ModelError for one that changes what the tensors mean."""
    told = parse_header(header_text(lora.path)).metadata
    text = told.get(KEY) if isinstance(told, dict) else None
    if not text:
        return {}
    try:
        document = strict_json(text) if isinstance(text, str) else None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{lora.source} has a trainer's config that is not JSON ({error!s:.80}) -> use another "
                         f"LoRA") from error
    if not isinstance(document, dict):
        raise ModelError(f"{lora.source} has a trainer's config that is no table -> use another LoRA")
    tables: dict[str, dict[str, Any]] = {}
    for name, value in document.items():
        # A model that saves its own adapter has no word for itself.
        component, _, field = name.partition(".") if "." in name else ("transformer", ".", name)
        tables.setdefault(component, {})[field] = value
    for table in tables.values():
        _check(lora, table)
    return {component: TrainerConfig(lora, table) for component, table in tables.items()}


def _check(lora: Lora, table: Mapping[str, Any]) -> None:
    for field, value in table.items():
        if field.endswith("_pattern") and field != "layers_pattern" and not isinstance(value or {}, dict):
            raise ModelError(f"{lora.source} has a trainer's config that is no table ({field}) -> use another LoRA")
        if field == "use_dora" and value:
            raise ModelError(f"{lora.source} is a DoRA by its trainer's config -> use one without DoRA")
        if field in ("init_lora_weights", "init_weights") and value not in _BEGINNINGS:
            raise ModelError(f"{lora.source} was trained from changed weights (`{field}` {value!r:.40}), which are "
                             f"not in it -> convert it to a plain LoRA, as PEFT's save_pretrained does")
        if field not in _HARMLESS and value:
            raise ModelError(f"{lora.source} has {field[:60]!r} in its trainer's config, which is not run -> use a "
                             f"plain LoRA")


def number(lora: Lora, alpha: Any) -> float:
    """A finite number that the file says."""
    with suppress(TypeError, ValueError, RuntimeError, OverflowError):
        if math.isfinite(value := float(alpha)):
            return value
    raise ModelError(f"{lora.source} has the alpha {str(alpha)[:60]!r} -> use another LoRA")


def _means(lora: Lora, pattern: str, layer: str) -> bool:
    """Whether a name of PEFT's patterns means the layer: the whole of it behind a `^`, or else its end.

    To PEFT it is a regular expression, and one from a file could run for ever.
    """
    if not re.fullmatch(r"\^?[\w.]+", pattern):
        raise ModelError(f"{lora.source} has an alpha for layers like {pattern[:60]!r}, and only names of layers are "
                         f"read -> use a LoRA that names them")
    return layer == pattern.removeprefix("^") or (pattern[0] != "^" and layer.endswith(f".{pattern}"))
