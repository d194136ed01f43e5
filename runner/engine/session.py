"""From a job to what a run of it needs: the store that it keeps artifacts in."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from runner.artifacts import Store, open_store
from runner.artifacts.atomic_files import explained
from runner.events import Emit
from runner.job import Job
from runner.job_defaults import default_store, new_run
from runner.media.paths import check_recorded
from stages.errors import InvalidInput, StoreError


def prepared(job: Job) -> Job:
    """The job with a name for its run and a store: what another process needs to work on it."""
    return replace(job, run=job.run or new_run(), store=job.store or str(default_store())).absolute()


def open_job_store(job: Job, emit: Emit) -> Store:
    """The store of a job; StoreError where there can be none."""
    if not job.store or job.store == str(default_store()):
        # The user's own is made where it is missing.
        with explained(default_store(), "make"):
            default_store().parent.mkdir(parents=True, exist_ok=True)
    return open_store(job.store or str(default_store()), warn=lambda text: emit("warning", {"text": text}),
                      strict=job.policy.strict)


def recorded_job(store: Store, run: str, where: str) -> Job:
    """The job that a run's record keeps, to go on with it in the store at `where`.

    Raises StoreError where there is none that can be read.
    """
    document: Any = store.load_run(run).get("job")
    if not isinstance(document, dict):
        raise StoreError(f"the record of run {run} is of an older version, which kept no job -> give its command "
                         f"again; its artifacts are kept, and taken from the store")
    try:
        job = Job.from_json(document)
    except InvalidInput as error:
        raise StoreError(f"the record of run {run} cannot be read ({error.text}) -> give its job again; its artifacts "
                         f"are kept") from None
    try:
        # Whoever may write in the store could name any file there.
        check_recorded(job.output.paths, job.output.folder)
    except InvalidInput as error:
        raise StoreError(f"the record of run {run} names a picture that cannot be written: {error.text}") from None
    output = replace(job.output, paths=tuple(map(_near, job.output.paths)), folder=_near(job.output.folder))
    return replace(job, store=where, run=run, resumed=True, output=output,
                   model=None if job.model is None else str(_near(job.model)))


def _near(path: str) -> str:
    """An absolute path as it is said from here."""
    here = str(Path.cwd())
    return path.removeprefix(f"{here}/") if path.startswith(f"{here}/") else path
