"""Where every block of a plan lies, for the record of a run."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runner.planning.plan import Plan

Layout = dict[str, dict[str, dict[str, dict[str, int]]]]
REST = "outside blocks"


def layout(plan: "Plan") -> Layout:
    """Bytes by stage, device, component and block, in the order of execution; what is in no block is one entry."""
    found: Layout = {}
    for stage in plan.stages:
        devices = found[stage.name] = dict[str, dict[str, dict[str, int]]]()
        for component in stage.components:
            weights, placement = plan.weights[component.name], plan.places[component.name].placement
            if plan.cut and stage.name == "denoise":
                for device, size in placement.share(weights).items():
                    devices.setdefault(device, {})[component.name] = {component.name: size}
                continue
            storage_devices = placement.storage_devices
            parts = {REST: sum(weights.rest.values()), **weights.blocks}
            for block, size in parts.items():
                if size:
                    there = devices.setdefault(storage_devices.get(block, storage_devices[""]), {})
                    there.setdefault(component.name, {})[block or component.name] = size
    return found
