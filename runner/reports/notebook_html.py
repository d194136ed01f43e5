"""How plans, runs, stages, pictures and artifacts show themselves: a line of text, and HTML in a notebook."""

from typing import TYPE_CHECKING

from runner.planning import describe
from runner.reports.markup import FAINT, block, image, said, table
from runner.reports.report import PARTS
from runner.text import gib, pictures, shown

if TYPE_CHECKING:
    from runner.artifacts.manifest import Artifact
    from runner.engine.report import Picture, Report, StageReport
    from runner.planning.plan import Plan

SIDE = 256
SMALL = 128
MOST_PICTURES = 12
MOST_TENSORS = 20


def plan_line(plan: "Plan") -> str:
    """Such as `Plan(flux, some/model, 2 pictures, encode on cuda:0, denoise on cuda:0 and cuda:1, ...)`."""
    stages = (f"{stage} on {' and '.join(device for device, need in needs.items() if need.total)}"
              for stage, needs in plan.needs.items())
    count = pictures(len(plan.requests))
    return f"Plan({', '.join((plan.family.name, plan.checkpoint.source, count, *stages))})"


def plan_html(plan: "Plan") -> str:
    """The table of what goes where, and under it what was decided and refused."""
    head, *rows = ([said(cell) for cell in row] for row in describe.needs(plan))
    refused = [*describe.refusals(plan)]
    more = f"<details><summary>not chosen: {len(refused)}</summary>{lines(refused)}</details>" if refused else ""
    return block(f"<b>{said(plan.checkpoint.source)}</b>, {pictures(len(plan.requests))}",
                 table(head, rows, words=2), lines([*describe.choices(plan)]), more)


def stage_line(stage: "StageReport") -> str:
    """Such as `StageReport(denoise, 2 made, 0 re-used, 20.1 s, peak cuda:0 8.5 GiB)`."""
    peaks = "".join(f", peak {device} {gib(peak)}" for device, peak in stage.peak.items())
    return (f"StageReport({stage.stage}, {stage.ran} made, {stage.reused} re-used, "
            f"{sum(stage.seconds.values()):.1f} s{peaks})")


def stages_html(*stages: "StageReport") -> str:
    """A table with a line per stage: seconds by part, peaks, and what the flush gave back."""
    devices = list(dict.fromkeys(device for stage in stages for device in stage.peak))
    # Only cards are asked what a flush gave back.
    flushed = () if all(device.endswith("cpu") for device in devices) else ("freed", "left")
    head = ["stage", "made", "re-used", *(f"{part} s" for part in PARTS), *(f"peak {d}" for d in devices), *flushed]
    rows = ([stage.stage, str(stage.ran), str(stage.reused), *(f"{stage.seconds[part]:.2f}" for part in PARTS),
             *(gib(stage.peak[device]) if device in stage.peak else "" for device in devices),
             *(gib(getattr(stage.flushed, name)) for name in flushed)] for stage in stages)
    return table([said(cell) for cell in head], ([said(cell) for cell in row] for row in rows))


def report_line(report: "Report") -> str:
    """Such as `Report(20250131-120000-0f3a2b, 2 pictures, encode 1.2 s, denoise 20.1 s, decode 0.5 s)`."""
    stages = (f"{stage.stage} {sum(stage.seconds.values()):.1f} s" for stage in report.stages)
    return f"Report({', '.join((report.run, pictures(len(report.pictures)), *stages))})"


def report_html(report: "Report") -> str:
    """The stages, and the first pictures as thumbnails."""
    first = report.pictures[:MOST_PICTURES]
    thumbs = "".join(f'<span style="display:inline-block;margin:4px">{thumbnail(one, SMALL)}</span>' for one in first)
    more = len(report.pictures) - len(first)
    return block(f"run <b>{said(report.run)}</b>, {pictures(len(report.pictures))}", stages_html(*report.stages),
                 thumbs, f'<span style="{FAINT}">and {more} more</span>' if more else "")


def picture_line(picture: "Picture") -> str:
    """Such as `Picture(0, 'a red circle', 128x128, seed 7)`."""
    asked = picture.request
    return f"Picture({picture.index}, {shown(asked.prompt)}, {asked.width}x{asked.height}, seed {asked.seed})"


def picture_html(picture: "Picture") -> str:
    """A thumbnail over its prompt, size and seed."""
    asked = picture.request
    facts = f"{asked.width}x{asked.height}, {asked.steps} steps, seed {asked.seed}"
    return block(thumbnail(picture, SIDE), said(asked.prompt), f'<span style="{FAINT}">{facts}</span>')


def thumbnail(picture: "Picture", side: int) -> str:
    """The picture, at most `side` pixels wide and high, or a word about its absence."""
    state = picture.store.get(picture.key)
    if state is None:
        return f'<span style="{FAINT}">picture {picture.index} is no longer in the store</span>'
    return image(state.tensors()["pixels"].numpy(), side, picture.request.prompt)


def artifact_line(artifact: "Artifact") -> str:
    """Such as `Artifact(denoise 0123456789ab, 64.3 KiB, 3 tensors)`."""
    count = len(artifact.tensors)
    tensors = f"{count} tensor{'' if count == 1 else 's'}"
    return f"Artifact({artifact.stage} {artifact.key[:12]}, {gib(artifact.bytes)}, {tensors})"


def artifact_html(artifact: "Artifact") -> str:
    """What a stored state is, and the names, types and shapes of its tensors."""
    rows = [(said(name, 100), said(spec["dtype"]), said("x".join(map(str, spec["shape"])) or "-"))
            for name, spec in list(artifact.tensors.items())[:MOST_TENSORS]]
    more = len(artifact.tensors) - len(rows)
    return block(f"{said(artifact.stage)} <code>{said(artifact.key)}</code>, {gib(artifact.bytes)}",
                 table(("tensor", "type", "shape"), rows, words=2),
                 f'<span style="{FAINT}">and {more} more</span>' if more else "")


def lines(texts: list[str]) -> str:
    """Texts below one another, escaped."""
    return "".join(f'<div style="{FAINT}">{said(text)}</div>' for text in texts)
