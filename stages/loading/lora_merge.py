"""LoRA merged into weights, one by one where they are read: W + scale * alpha / rank * B A (Hu et al., 2021).

So nothing of it is left when a stage computes: every placement, the modulation table and every step are those of the
model alone, on cards that have no room for a second set of layers. LoKr and LoHa are products of another form, and
differences of weights and biases are added as they are. docs/loras.md says whose files are taken.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import diffusers
import torch

from stages.errors import ModelError
from stages.loading.lora_config import number
from stages.loading.lora_file import Group, LoraFile, read_lora_file, refuse
from stages.loading.lora_names import LayerNames, layer_names
from stages.loading.lora_updates import Difference, DoraUpdate, HadamardUpdate, KroneckerUpdate, LowRankUpdate, Update
from stages.models.checkpoint import Checkpoint, Component
from stages.models.lora import ADAPTER, ADAPTER_CONFIG, Lora
from stages.wording import with_article

# Elements of a weight that are added to at once: merging takes three times their bytes in float32 on its device.
ELEMENTS_AT_ONCE = 2**20
_OTHER = "use a LoRA that was made for this model"


class LoraMerger:
    """The updates of all LoRAs of a component, by weight."""

    def __init__(self, component: Component) -> None:
        self.updates: dict[str, list[Update]] = {}
        for lora in component.loras:
            for name, update in read_updates(lora, component).items():
                self.updates.setdefault(name, []).append(update)

    def __contains__(self, name: str) -> bool:
        return name in self.updates

    def merged(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The weight of this name with what is added to it: on a card in its place, on the host in a copy.

        A weight on the host may be a window on its file.
        """
        if name not in self:
            return weight
        weight = weight.clone() if weight.device.type == "cpu" else weight
        add_updates(weight, self.updates[name])
        return weight


@torch.no_grad()
def add_updates(weight: torch.Tensor, updates: Sequence[Update]) -> None:
    """Add all of them to a weight [out, in] or a bias [out] in float32, some rows at a time, and round once."""
    here = [update.to(weight.device) for update in updates]
    count = max(1, ELEMENTS_AT_ONCE // weight[0].numel())
    for first in range(0, len(weight), count):
        rows = slice(first, first + count)
        total = weight[rows].float()
        for update in here:
            total = update.added_to(total, rows)
        weight[rows] = total


@lru_cache(maxsize=32)
def bytes_to_merge(component: Component) -> int:
    """The most bytes that merging takes on a weight's device besides it: its updates and some rows, in float32."""
    most = 0
    for updates in LoraMerger(component).updates.values():
        first, *others = updates[0].shape
        columns = math.prod(others)
        rows = min(first, max(1, ELEMENTS_AT_ONCE // columns))
        buffers = 1 + max(update.copies for update in updates)
        most = max(most, 4 * buffers * rows * columns + sum(update.bytes_in_float32 for update in updates))
    return most


@lru_cache(maxsize=32)
def check_loras(component: Component) -> None:
    """Raise ModelError for a LoRA that is not made for the component, or adds to more than its linear layers.

    What is well once is not looked at again: a LoRA is named by the hash of its file.
    """
    for lora in component.loras:
        for name, update in read_updates(lora, component).items():
            if not update.finite():
                raise ModelError(f"{lora.source} adds values to {name} that are not finite -> fetch it again, or use "
                                 f"another LoRA")


def components_reached(lora: Lora, checkpoint: Checkpoint) -> list[str]:
    """The components that a LoRA adds to; ModelError for one that is not in the checkpoint, or adds to nothing."""
    known = _loadable(lora) & checkpoint.components.keys()
    file = read_lora_file(lora)
    found = dict.fromkeys(group.component for group in file.groups)
    for name in found.keys() - known:
        if groups := [group for group in file.of(name) if not group.adds_nothing()]:
            there = checkpoint.components.get(name)
            what = f"{name!r} ({there.class_name})" if there else repr(name)
            raise refuse(lora, f"adds to {what}, and diffusers {diffusers.__version__} knows LoRA for "
                               f"{' and '.join(sorted(known))} of this model", groups, "use one for those alone")
    if not found.keys() & known:
        raise ModelError(f"{lora.source} holds nothing -> use another LoRA")
    return [name for name in found if name in known]


def _loadable(lora: Lora) -> set[str]:
    """The components that the pipeline class reads a LoRA for; ModelError for one that reads none."""
    found: Any = getattr(diffusers, lora.pipeline)
    if not hasattr(found, "lora_state_dict"):
        raise ModelError(f"diffusers {diffusers.__version__} reads no LoRA for {with_article(lora.pipeline)} -> "
                         f"leave `loras` out")
    # No public name says it.
    return set(found._lora_loadable_modules)


def read_updates(lora: Lora, component: Component) -> dict[str, Update]:
    """What a LoRA adds to the component, by the name of the parameter; ModelError for what has no place in it."""
    file, names = read_lora_file(lora), layer_names(component)
    groups = file.of(component.name)
    unknown = [group for group in groups if not names.find(group.layer, group.flat)]
    if strangers := [group for group in unknown if not group.adds_nothing()]:
        raise refuse(lora, f"adds to {strangers[0].shown}.weight, which is no linear layer of this model's "
                           f"{component.class_name}", strangers, _OTHER)
    found: dict[str, Update] = {}
    sources: dict[str, Group] = {}
    for group in groups:
        for parameter, update in _updates(file, group) if names.find(group.layer, group.flat) else ():
            for name, part in _shared_out(lora, group, parameter, update, names):
                if name in found:
                    raise refuse(lora, f"says twice what is added to {name}", [sources[name], group],
                                 "use a LoRA in one format")
                found[name], sources[name] = part, group
    return found


def _shared_out(
    lora: Lora, group: Group, parameter: str, update: Update, names: LayerNames
) -> Iterator[tuple[str, Update]]:
    """What a group adds to each of the layers that it means, which share its rows; of the shape that they have."""
    layers = names.find(group.layer, group.flat)
    weights = {f"{layer}.{parameter}": getattr(names.layers[layer], parameter) for layer in layers}
    for name, weight in weights.items():
        if weight is None:
            raise refuse(lora, f"adds to {name}, which this model does not have", [group], _OTHER)
    expected = {name: list(weight.shape) for name, weight in weights.items()}
    sizes = [shape[0] for shape in expected.values()]
    for name, shape in expected.items():
        if update.shape != [sum(sizes), *shape[1:]]:
            together = f"{' and '.join(expected)} are {[sum(sizes), *shape[1:]]}" if len(sizes) > 1 else (
                f"{name}, which is {shape}")
            raise refuse(lora, f"adds {update.shape} to {together} in this model", [group], _OTHER)
    rows = torch.arange(sum(sizes))
    if names.has_changed_halves(group.layer, group.flat):
        rows = torch.cat([*reversed(rows.chunk(2))])
    for name, shape in expected.items():
        share, rows = rows[: shape[0]], rows[shape[0] :]
        yield name, update.part(share)


def _updates(file: LoraFile, group: Group) -> Iterator[tuple[str, Update]]:
    """What a group adds, to the weight and to the bias of its layers."""
    lora, tensors = file.lora, {part: tensor for part, tensor in group.tensors.items() if part != "alpha"}
    if not all(tensor.is_floating_point() for tensor in tensors.values()):
        kinds = " by ".join(str(tensor.dtype) for tensor in reversed(tensors.values()))
        raise ModelError(f"{lora.source} has {kinds} for {group.shown} -> use a LoRA in floating point")
    if not all(tensor.ndim == (1 if part in ("diff_b", "up_bias", "magnitude") else 2) and tensor.numel()
               for part, tensor in tensors.items() if part != "diff"):
        raise _odd(file.lora, group)
    if "diff_b" in tensors:
        yield "bias", Difference(tensors["diff_b"], lora.scale)
    if "diff" in tensors:
        yield "weight", Difference(tensors["diff"], lora.scale)
    if "up" in tensors:
        down, up = tensors["down"], tensors["up"]
        if down.shape[0] != up.shape[1]:
            raise _odd(file.lora, group)
        scale = _strength(file, group, down.shape[0]) * lora.scale
        _check_dora(file, group)
        yield "weight", (DoraUpdate(down, up, scale, tensors["magnitude"]) if "magnitude" in tensors
                         else LowRankUpdate(down, up, scale))
        if "up_bias" in tensors:
            yield "bias", Difference(tensors["up_bias"], scale)
    if "hada_w1_a" in tensors:
        first, down, second, other = (tensors[f"hada_{name}"] for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
        if [first.shape[1], second.shape[1], first.shape[0], down.shape[1]] != [
                down.shape[0], other.shape[0], second.shape[0], other.shape[1]]:
            raise _odd(file.lora, group)
        scale = _strength(file, group, down.shape[0]) * lora.scale
        yield "weight", HadamardUpdate(first, down, second, other, scale)
    if any(part.startswith("lokr") for part in tensors):
        # The alpha of a LoKr goes with the rank of its second factor, or else of its first; with neither it has none.
        ranks = [tensors[name].shape[0] for name in ("lokr_w2_b", "lokr_w1_b") if name in tensors]
        left, right = (_multiplied(file.lora, group, tensors, f"lokr_{side}") for side in ("w1", "w2"))
        yield "weight", KroneckerUpdate(left, right, _strength(file, group, *ranks[:1]) * lora.scale)


def _check_dora(file: LoraFile, group: Group) -> None:
    """Raise ModelError for a pair of which it is not clear whether it is a DoRA, or what its scale would mean."""
    lora, length, config = file.lora, group.tensors.get("magnitude"), file.configs.get(group.component)
    told = None if config is None else config.fields.get("use_dora")
    if (length is not None) != (group.component in file.doras if told is None else told):
        raise refuse(lora, f"is a DoRA for a part alone: it has {'one' if length is not None else 'no'} "
                           f"lora_magnitude_vector for {group.shown}", [group], "use a whole one")
    if length is not None and len(length) != len(group.tensors["up"]):
        raise _odd(lora, group)
    if length is not None and lora.scale != 1:
        raise ModelError(f"{lora.source} is a DoRA with the scale {lora.scale:g}, and programs differ in what another "
                         f"than 1 means -> leave the scale out")


def _multiplied(lora: Lora, group: Group, tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """A factor of a LoKr, which may be a product itself."""
    if name in tensors:
        return tensors[name]
    up, down = tensors[f"{name}_a"], tensors[f"{name}_b"]
    if up.shape[1] != down.shape[0]:
        raise _odd(lora, group)
    return up.float() @ down.float()


def _odd(lora: Lora, group: Group) -> ModelError:
    shapes = " by ".join(str(list(tensor.shape)) for part, tensor in reversed(list(group.tensors.items()))
                         if part != "alpha")
    return refuse(lora, f"has {shapes:.200} for {group.shown}", [group], "use a LoRA of linear layers")


def _strength(file: LoraFile, group: Group, rank: int | None = None) -> float:
    """Alpha over rank, from where the file says it; 1 where it says nothing, as its trainer then means."""
    lora, alpha, config = file.lora, group.tensors.get("alpha"), file.configs.get(group.component)
    if config is not None:
        if alpha is not None:
            raise refuse(lora, f"has two alphas for {group.shown}, one in its trainer's config", [group],
                         "use a LoRA with one")
        layers = (group.layer, group.layer.removeprefix("text_model."))
        if lora.config is not None and not any(map(config.targets, layers)):
            raise refuse(lora, f"has matrices for {group.shown}, which its {ADAPTER_CONFIG} leaves out", [group],
                         "use a LoRA with the config that was saved with it")
        return config.strength(layers, rank if "up" in group.tensors else None)
    if alpha is None and lora.config is not None:
        raise refuse(lora, f"has no alpha for {group.shown} of {group.component!r}, and its {ADAPTER_CONFIG} is for "
                     f"the transformer alone", [group], "use a LoRA that says its alphas")
    if alpha is None and lora.path.name == ADAPTER and group.is_named_as_peft_does:
        raise ModelError(f"{lora.source} has its alpha in {ADAPTER_CONFIG}, which is not beside it -> put it there, "
                         f"or give the file another name to use its rank as its alpha")
    if alpha is None:
        # Without an alpha sd-scripts and ComfyUI take the rank, and diffusers for its own names what is most common.
        if group.is_named_as_peft_does and group.component in file.told:
            raise ModelError(f"{lora.source} has an alpha for other layers and none for {group.shown} -> use a "
                             f"whole LoRA")
        return 1.0
    if alpha.numel() != 1:
        raise ModelError(f"{lora.source} has {list(alpha.shape)} values for the alpha of {group.shown} -> use "
                         f"another LoRA")
    if rank is None:
        return 1.0
    if not (value := number(lora, alpha.float().item())):
        raise ModelError(f"{lora.source} has the alpha 0 for {group.shown}, which is nothing to some programs "
                         f"and the rank to others -> use another LoRA")
    return value / rank
