"""The report of a run: one HTML page that needs nothing else, from what the store keeps."""

from collections.abc import Iterator, Mapping
from typing import Any

from markupsafe import Markup, escape

from runner.artifacts import Store
from runner.job_defaults import default_store
from runner.media.previews import strips
from runner.reports.charts.blocks import blocks
from runner.reports.charts.gantt import gantt
from runner.reports.charts.timeline import memory
from runner.reports.history import loras
from runner.reports.repeat import recorded, repeat_line
from runner.reports.templates import render, thumbnail
from runner.text import clean, cut, gib, pictures

# A chart is as wide as the window: words that shrink with a drawing cannot be read.
WIDTHS = {"wide": 960, "medium": 640, "narrow": 350}
CHARTS = (
    ("Where every block lay", "One column per card and stage, its blocks from the bottom in the order in which they "
     "run. Stages follow each other; each gives its memory back.", blocks),
    ("Memory over time", "Sampled where stages, steps and their parts begin and end. At each red mark a stage is "
     "over, and what it held is given back.", memory),
    ("Where the time went", "On the scale of the memory above.", gantt),
)
MOST_PICTURES, MOST_REQUESTS, SIDE, SMALL = 24, 100, 192, 72
TITLE = 80
_BAR = Markup('<svg class="bar" width="124" height="16" viewBox="0 0 124 16" role="img" aria-label="measured, framed '
              'by the plan"><rect class="measured" x="1" y="4" width="{:.1f}" height="8"/>'
              '<rect class="planned" x="1" y="1" width="{:.1f}" height="14"/></svg>')


def page(run: str, record: Mapping[str, Any], store: Store) -> str:
    """The page of a run, from its record and the artifacts that the record names."""
    plan, keys, requests = record.get("plan") or {}, record["stages"].get("decode", []), record["requests"]
    versions = record.get("versions") or {}
    return render(
        "page.html.j2", title=_title(record), repeat=_repeat(record), run=run,
        status=record.get("status", "unknown"), facts=", ".join(_facts(record)),
        warnings=[*_warnings(record)],
        pictures=[_picture(store, key, asked) for key, asked in zip(keys[:MOST_PICTURES], requests, strict=False)],
        pictures_left=max(0, len(keys) - MOST_PICTURES),
        requests=[_request(asked) for asked in requests[:MOST_REQUESTS]],
        requests_left=max(0, len(requests) - MOST_REQUESTS),
        charts=[*_charts(record)],
        strips=[{"prompt": requests[index]["prompt"],
                 "steps": [(step, thumbnail(pixels, SMALL)) for step, pixels in shots]}
                for index, shots in strips(record, store).items()],
        measured=[*_measured(record)],
        components=[(name, part["dtype"], gib(part["bytes"]), part["placement"], part["reason"])
                    for name, part in plan.get("components", {}).items()],
        refused=[f"{stage} not {strategy}: {why}" for stage, strategies in plan.get("refused", {}).items()
                 for strategy, why in strategies.items()],
        versions=", ".join(f"{name} {version}" for name, version in versions.items()), model=record["model"],
    )


def _title(record: Mapping[str, Any]) -> str:
    """What the pictures show and the family that drew them, such as `a fox and 2 more - flux`."""
    prompts = list(dict.fromkeys(str(asked["prompt"]) for asked in record["requests"]))
    family = (record.get("plan") or {}).get("family")
    first = cut(clean(prompts[0]), TITLE) if prompts else "no pictures"
    more = f" and {len(prompts) - 1:,} more" if len(prompts) > 1 else ""
    return f"{first}{more}{'' if family is None else f' - {family}'}"


def _repeat(record: Mapping[str, Any]) -> Markup | None:
    """The command that repeats the run, where its record keeps a job; whole, however long its prompt is."""
    document = record.get("job")
    job = recorded(record, str(document.get("store", ""))) if isinstance(document, Mapping) else None
    return None if job is None else escape(repeat_line(job, str(default_store())))


def _facts(record: Mapping[str, Any]) -> Iterator[str]:
    plan, seconds = record.get("plan") or {}, (record.get("timeline") or {}).get("seconds")
    yield pictures(len(record["requests"]))
    yield str(plan.get("model", record["model"]))
    yield from (f"LoRA {lora}" for lora in loras(record))
    if plan:
        yield f"family {plan['family']}"
    if seconds is not None:
        yield f"{seconds:.1f} s"


def _warnings(record: Mapping[str, Any]) -> Iterator[str]:
    yield from record.get("warnings", [])
    yield from record.get("changes", [])
    yield from (f"picture {failure['index'] + 1}: {failure['text']}" for failure in record.get("failures", []))
    if "error" in record:
        yield record["error"]


def _picture(store: Store, key: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    state = store.get(key)
    shown = None if state is None else thumbnail(state.tensors()["pixels"].numpy(), SIDE)
    return {"thumbnail": shown, "prompt": asked["prompt"], "seed": asked["seed"]}


def _request(asked: Mapping[str, Any]) -> tuple[Any, ...]:
    """A row for a request; what should be a number may be anything in a record that was made by hand."""
    prompt, negative, guidance = asked["prompt"], asked.get("negative_prompt"), asked["guidance"]
    return (prompt if negative is None else f"{prompt} (away from: {negative})", f"{asked['width']}x{asked['height']}",
            asked["steps"], "-" if guidance is None else f"{guidance:g}" if isinstance(guidance, float) else guidance,
            asked["seed"])


def _charts(record: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for title, words, draw in CHARTS:
        drawings = {name: drawing for name, width in WIDTHS.items() if (drawing := draw(record, width)) is not None}
        if drawings:
            yield title, words, drawings


def _measured(record: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    """A row for each card in each stage: what was planned, what was measured, and both as a bar."""
    peaks = (record.get("timeline") or {}).get("peaks", {})
    needs = {(stage, device): need for stage, there in (record.get("plan") or {}).get("stages", {}).items()
             for device, need in there.items() if device != "cpu" and device in peaks.get(stage, {})}
    most = max([1, *(max(need["weights"] + need["activations"], peaks[stage][device])
                     for (stage, device), need in needs.items())])
    for (stage, device), need in needs.items():
        planned, peak = need["weights"] + need["activations"], peaks[stage][device]
        # No sign for what rounds to nothing.
        off = f"{round(100 * (peak - planned) / planned, 1) + 0.0:+.1f} %".replace("+0.0", "0.0") if planned else "-"
        yield (stage, device, gib(need["weights"]), gib(need["activations"]), gib(planned), gib(peak), off,
               _BAR.format(120 * peak / most, 120 * planned / most))
