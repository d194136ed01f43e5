"""PEFT's config of a LoRA, in the file or beside it: JSON from a stranger, and numbers are taken."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from stages.errors import ModelError
from stages.loading.lora_patterns import LayerPatterns, Unreadable, ends_of, matches_whole
from stages.models.files import read_json
from stages.models.lora import ADAPTER_CONFIG, Lora
from stages.models.safetensors_header import header_text, parse_header
from stages.strict_json import strict_json

KEY = "lora_adapter_metadata"
# What a file's tensors mean does not depend on these: they were for the training, or their tensors are in the file.
_HARMLESS = frozenset({
    "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "modules_to_save", "trainable_token_indices", "ensure_weight_tying",
    "bias", "lora_bias", "use_dora", "lora_dropout", "rank_dropout", "module_dropout", "rank_dropout_scale",
    "fan_in_fan_out",
    "init_lora_weights", "init_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "megatron_core", "qalora_group_size", "runtime_config", "decompose_both", "decompose_factor",
    "use_effective_conv2d",
})
# Other ways to begin a training change the weights of the model as well, which are not in the file.
_BEGINNINGS = (True, False, None, "gaussian", "orthogonal", "eva")


# What PEFT takes for the alpha of a config that has none.
_USUAL = 8
# What matrices are multiplied by depends on these alone.
_NUMBERS = ("r", "lora_alpha", "alpha", "rank_pattern", "alpha_pattern", "use_rslora")
_FLAGS = ("use_rslora", "use_dora")
_TABLES = ("rank_pattern", "alpha_pattern")
_NAMES = ("target_modules", "exclude_modules")
_TYPES = ("LORA", "LOHA", "LOKR")


@dataclass(frozen=True)
class TrainerConfig:
    """What a config says of one component."""

    lora: Lora
    """Whose it is."""
    fields: Mapping[str, Any]
    """PEFT's fields."""

    def strength(self, names: Sequence[str], rank: int | None) -> float:
        """Alpha over rank for a layer, by any of its names; `rank` is that of its matrices, if they have one."""
        alpha = self._number("alpha_pattern", names, "lora_alpha" if "lora_alpha" in self.fields else "alpha", _USUAL)
        told = self._number("rank_pattern", names, "r", rank or _USUAL)
        if told <= 0 or rank not in (None, told):
            raise ModelError(f"{self.lora.source} says rank {told:g} for {names[0][:100]!r}, and its matrices have "
                             f"{rank or 'another'} -> use another LoRA")
        return alpha / (math.sqrt(told) if self.fields.get("use_rslora") else told)

    def _number(self, table: str, names: Sequence[str], field: str, usual: int) -> float:
        found = next(filter(None, map(self._patterns[table].first, names)), None)
        return number(self.lora, self.fields.get(field, usual) if found is None else self.fields[table][found])

    @cached_property
    def _patterns(self) -> Mapping[str, LayerPatterns]:
        with _readable(self.lora):
            return {table: LayerPatterns(self.fields.get(table) or {}) for table in _TABLES}

    def targets(self, name: str) -> bool:
        """Whether PEFT has matrices for a layer of this name."""
        meant = self.fields.get("target_modules") in (None, "all-linear") or self._names("target_modules", name)
        return meant and not self._names("exclude_modules", name)

    def _names(self, field: str, name: str) -> bool:
        value = self.fields.get(field) or ()
        if isinstance(value, str):
            with _readable(self.lora):
                return matches_whole(value, name)
        return not self._named[field].isdisjoint(ends_of(name))

    @cached_property
    def _named(self) -> Mapping[str, frozenset[str]]:
        return {field: frozenset(self.fields.get(field) or ()) for field in _NAMES}


def read_configs(lora: Lora) -> Mapping[str, TrainerConfig]:
    """What the configs of a LoRA say of each component; ModelError for one that changes what the tensors mean."""
    tables = _in_file(lora)
    if lora.config is not None:
        # PEFT's own speaks of one model, and its files have no word for which.
        beside, told = read_json(lora.config), tables.get("transformer")
        _check(lora, beside)
        if told is not None and [told.get(name) for name in _NUMBERS] != [beside.get(name) for name in _NUMBERS]:
            raise ModelError(f"{lora.source} has a trainer's config in the file and another one beside it "
                             f"({ADAPTER_CONFIG}) -> take away the one that is not its own")
        tables["transformer"] = beside
    return {component: TrainerConfig(lora, table) for component, table in tables.items()}


def _in_file(lora: Lora) -> dict[str, dict[str, Any]]:
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
    return tables


def _check(lora: Lora, table: Mapping[str, Any]) -> None:
    for field, value in table.items():
        if field in _TABLES and not isinstance(value or {}, dict):
            raise ModelError(f"{lora.source} has a trainer's config that is no table ({field}) -> use another LoRA")
        if (field in _FLAGS and not isinstance(value, bool | None)) or (field in _NAMES and not _are_names(value)):
            raise ModelError(f"{lora.source} has {value!r:.60} for {field} in its trainer's config -> use another "
                             f"LoRA")
        if field == "peft_type" and value not in (None, *_TYPES):
            raise ModelError(f"{lora.source} is of the type {value!r:.40} by its trainer's config, and "
                             f"{', '.join(_TYPES)} are run -> use one of those")
        if field in ("init_lora_weights", "init_weights") and value not in _BEGINNINGS:
            raise ModelError(f"{lora.source} was trained from changed weights (`{field}` {value!r:.40}), which are "
                             f"not in it -> convert it to a plain LoRA, as PEFT's save_pretrained does")
        if field not in _HARMLESS and value:
            raise ModelError(f"{lora.source} has {field[:60]!r} in its trainer's config, which is not run -> use a "
                             f"plain LoRA")


def _are_names(value: object) -> bool:
    return isinstance(value, str | None) or (
        isinstance(value, list) and all(isinstance(each, str) for each in value))


@contextmanager
def _readable(lora: Lora) -> Iterator[None]:
    try:
        yield
    except Unreadable as error:
        raise ModelError(f"{lora.source} has the pattern {str(error)[:60]!r} for layers in its trainer's config, and "
                         f"only names and simple regular expressions are read, as others could run for ever -> use a "
                         f"LoRA that names its layers") from None


def number(lora: Lora, alpha: Any) -> float:
    """A finite number that the file says."""
    with suppress(TypeError, ValueError, RuntimeError, OverflowError):
        if math.isfinite(value := float(alpha)):
            return value
    raise ModelError(f"{lora.source} has the alpha {str(alpha)[:60]!r} -> use another LoRA")
