"""What can be known of a model and its LoRAs before torch is imported: whether what lies on this machine is there."""

from pathlib import Path

from runner.job import Job
from runner.sizes import makeable
from stages.errors import InvalidInput
from stages.families import FAMILIES
from stages.models.lora import check_source

# What people write for a card, which torch calls otherwise.
_CARDS = ("gpu", "card", "nvidia", "amd", "rocm", "hip", "gpus")


def check_here(job: Job) -> Job:
    """The job, if its model folder and its LoRA files are there, and its devices and sizes can be.

    What is on the hub is left to the plan, which asks there. Raises ModelError for a folder or a file that is not
    there, or not of the family, and InvalidInput for a device or a size; a line of a file with such a size is refused.
    """
    for name in job.devices:
        kind, _, number = name.partition(":")
        if kind in _CARDS:
            raise InvalidInput(f"`devices` {name} is no device of torch -> cuda:{number or 0}, or "
                               f"`gpus={number or 0}`")
    if twice := [name for name in job.devices if job.devices.count(name) > 1]:
        raise InvalidInput(f"the device {twice[0]} is named twice -> leave one of them out")
    for lora in job.loras:
        check_source(lora.source)
    if job.model is not None and job.model != "demo":
        _check_model(job.model, job)
    return makeable(job, job.defaults.multiple) if job.model in (None, "demo", job.defaults.repo) else job


def _check_model(model: str, job: Job) -> None:
    # A run that names nothing of its own need not wait for these.
    from stages.models.checkpoint import check_family, find
    from stages.models.hub import is_id

    if is_id(model) and not Path(model).exists():
        return
    check_family(find(model, revision=job.revision, components=()), family=FAMILIES[job.family])
