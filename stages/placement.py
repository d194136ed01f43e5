"""Where one component's weights live: on one device, or dealt over several."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from accelerate.hooks import remove_hook_from_module
from torch import nn

from stages.crossing import Crossing


class Placement(Protocol):
    """A way to place a component: which device its inputs enter, how it is loaded, what is hooked afterwards."""

    @property
    def entry(self) -> str:
        """The device that takes the component's inputs."""
        ...

    @property
    def device_map(self) -> dict[str, str]:
        """Module name to device, as `from_pretrained` takes it: every tensor is read straight to its device."""
        ...

    def attach(self, model: nn.Module, home: str) -> None:
        """Make the loaded model take inputs from, and give outputs to, the device `home`."""
        ...


@dataclass(frozen=True)
class Resident:
    """The whole component on one device."""

    device: str

    @property
    def entry(self) -> str:
        return self.device

    @property
    def device_map(self) -> dict[str, str]:
        return {"": self.device}

    def attach(self, model: nn.Module, home: str) -> None:
        if torch.device(home) != torch.device(self.device):
            Crossing(model, {"": self.device}, home)


@dataclass(frozen=True)
class Sharded:
    """Blocks dealt over several devices; everything else stays on `entry`, where a pass starts and ends."""

    entry: str
    devices: Mapping[str, str]

    @property
    def device_map(self) -> dict[str, str]:
        return dict(self.devices)

    def attach(self, model: nn.Module, home: str) -> None:
        # from_pretrained leaves accelerate's hooks behind, which send every argument of every block again.
        remove_hook_from_module(model, recurse=True)
        Crossing(model, self.devices, home)


@dataclass(frozen=True)
class Place:
    """A component's placement and the type of its weights."""

    placement: Placement
    dtype: torch.dtype


Places = Mapping[str, Place]
