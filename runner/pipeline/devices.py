"""Devices and places as users of diffusers say them, in the words of a job."""

from collections.abc import Mapping
from typing import Any

import torch

from runner import job_fields as fields_of
from runner.job import STAGES
from runner.text import shown
from stages.errors import InvalidInput
from stages.wording import kind_of

# All of these leave it to the plan, which balances by bytes and work.
_PLANNED = (None, "auto", "balanced", "balanced_low_0", "sequential")
_STAGES = {"text_encoder": "encode", "image_encoder": "encode", "transformer": "denoise", "vae": "decode"}


def devices_of(devices: Any, gpus: Any, device_map: Any) -> tuple[str, ...]:
    """The names of the devices to use; none for all there are."""
    map_names = device_map if isinstance(device_map, str | int | torch.device) and device_map not in _PLANNED else ()
    given = {"devices": _listed(devices), "gpus": _listed(gpus), "device_map": _listed(map_names)}
    said = [name for name, names in given.items() if names]
    if len(said) > 1:
        raise InvalidInput(f"{said[0]} and {said[1]} both choose devices -> leave one of them out")
    names = fields_of.devices(given[said[0]] if said else [])
    # One card of a kind is meant by the kind alone; torch's current one is the first.
    return tuple(f"{name}:0" if name in ("cuda", "xpu") else name for name in names)


def places_of(place: Any, device_map: Any) -> Any:
    """The places of a job, from `place`, or from a map of components, or stages, to devices."""
    if not isinstance(device_map, Mapping):
        if not isinstance(device_map, str | int | torch.device | None):
            raise InvalidInput(f"device_map is {kind_of(device_map)} -> \"balanced\", a device, or "
                               f"{{\"vae\": \"cuda:0\"}}")
        return place
    if place != () and place is not None:
        raise InvalidInput("place and device_map both say where things go -> leave one of them out")
    return [f"{_key(name)}={_where(name, where)}" for name, where in device_map.items()]


def _key(name: Any) -> str:
    if name in STAGES:
        return str(name)
    stage = next((stage for start, stage in _STAGES.items() if str(name).startswith(start)), None)
    if stage is None:
        raise InvalidInput(f"device_map names {str(name)!r} -> a stage ({', '.join(STAGES)}), or a component such as "
                           f"text_encoder, transformer or vae")
    return f"{stage}.{name}"


def _where(name: Any, where: Any) -> str:
    if isinstance(where, Mapping):
        raise InvalidInput(f"device_map has a map for {name} -> one device, or place=\"denoise=0:9,1:28,0:20\"")
    if not isinstance(where, str | int | torch.device) or isinstance(where, bool):
        raise InvalidInput(f"device_map has {shown(repr(where))} for {name} -> a device such as \"cuda:0\", or leave "
                           f"{name} out")
    return str(where)


def _listed(values: Any) -> list[Any]:
    if isinstance(values, str):
        return [part.strip() for part in values.split(",") if part.strip()]
    if values is None or isinstance(values, int | torch.device):
        return [] if values is None else [values]
    return list(fields_of.several("devices", values))
