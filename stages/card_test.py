"""Whether cards can compute at all, tried before anything is planned, downloaded or loaded for them."""

import torch

from stages import machine
from stages.machine import Device, Machine

SIDE = 64
ADVICE = ("install a torch with kernels for it: its builds for CUDA 12.6 still have the old ones (on Kaggle choose "
          "the accelerator GPU T4 x2)")


def unbuilt(card: Device) -> str:
    """Why this torch has no kernels for a card; empty where it has them, or where nothing can be compared."""
    own, built = machine.architecture(card.name), machine.build().get("architectures", "")
    if not own or not built or machine.covers(built.split(), own):
        return ""
    return f"{card.name} ({card.label}) is {own}, and this torch has no kernels for it: it is built for {built}"


def computes(device: str) -> bool:
    """Whether a matrix product of whole numbers, which has one right result, comes out right on a device.

    Raises what torch raises: RuntimeError for a card without kernels or off the bus, OutOfMemoryError for a full one.
    """
    numbers = torch.arange(SIDE * SIDE, dtype=torch.float32).remainder(7).reshape(SIDE, SIDE)
    return torch.equal((numbers.to(device) @ numbers.to(device)).cpu(), numbers @ numbers)


def able(here: Machine) -> Machine:
    """The machine, if every card of it can compute; ValueError for the first one that cannot."""
    for card in here.cards:
        if fault := unbuilt(card) or _fault(card):
            others = ",".join(other.name.rpartition(":")[2] for other in here.cards if other is not card)
            without = f"leave the card out (--gpus {others})" if others else "run on the CPU (--device cpu)"
            raise ValueError(f"{fault} -> {ADVICE if unbuilt(card) else 'python -m runner doctor tells more'}, or "
                             f"{without}")
    return here


def _fault(card: Device) -> str:
    try:
        return "" if computes(card.name) else f"{card.name} ({card.label}) gets a matrix product wrong"
    except torch.OutOfMemoryError:
        # Full is not broken: the plan says how much is free.
        return ""
    except RuntimeError as error:
        return f"{card.name} ({card.label}) does not compute: {str(error).strip().splitlines()[0]}"


check_cards, missing_kernels = able, unbuilt
