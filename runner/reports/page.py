"""The report of a run: one HTML page that needs nothing else, from what the store keeps."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from runner.media.previews import strips
from runner.reports.charts.blocks import blocks
from runner.reports.charts.drawing import Drawing
from runner.reports.charts.gantt import gantt
from runner.reports.charts.style import STYLE
from runner.reports.charts.timeline import memory
from runner.reports.history import loras
from runner.reports.markup import image, said
from runner.text import gib, pictures

if TYPE_CHECKING:
    from runner.artifacts import Store

WIDTHS = {"wide": 960, "medium": 640, "narrow": 350}
MOST_PICTURES, MOST_REQUESTS, SIDE = 24, 100, 192
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
LAYOUT = """
html{background:#fff}body{margin:0}
@media (prefers-color-scheme:dark){html{background:#0f1318}}
.stagerun{background:var(--paper);max-width:960px;margin:0 auto;padding:24px 20px 48px}
.stagerun h1{font-size:22px;margin:0 0 2px;overflow-wrap:anywhere}
.stagerun h2{font-size:16px;margin:34px 0 8px;border-top:1px solid var(--line);padding-top:16px}
.stagerun p{margin:4px 0 10px;overflow-wrap:anywhere}.stagerun .faint{color:var(--faint)}
.stagerun .state{display:inline-block;border-radius:9px;padding:0 9px;font-size:12px;background:var(--band)}
.stagerun .bad{background:var(--limit);color:#fff}
.stagerun .shots{display:flex;flex-wrap:wrap;gap:14px}
.stagerun figure{margin:0;width:192px}.stagerun figcaption{font-size:12px;overflow-wrap:anywhere;
display:-webkit-box;-webkit-line-clamp:4;-webkit-box-orient:vertical;overflow:hidden}
.stagerun figure img{border-radius:4px;display:block;margin-bottom:4px}
.stagerun .strip{display:flex;flex-wrap:wrap;gap:6px;margin:2px 0 12px}
.stagerun .strip figure{width:72px}.stagerun .strip img{width:72px;height:auto;margin:0}
.stagerun .scroll{overflow-x:auto}
.stagerun table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}
.stagerun th,.stagerun td{padding:4px 14px 4px 0;border-bottom:1px solid var(--line);text-align:right;
vertical-align:top;white-space:nowrap}
.stagerun th{font-weight:600}.stagerun .word{text-align:left}.stagerun .prose{text-align:left;white-space:normal;
min-width:180px;overflow-wrap:anywhere}
.stagerun .medium,.stagerun .narrow{display:none}
@media (max-width:999px){.stagerun .wide{display:none}.stagerun .medium{display:block}.stagerun{max-width:640px}}
@media (max-width:679px){.stagerun .medium{display:none}.stagerun .narrow{display:block}
.stagerun{padding:16px 12px 32px}}
.stagerun .bar{display:block}.stagerun .bar .planned{fill:none;stroke:var(--faint);stroke-dasharray:none}
.stagerun .bar .measured{fill:var(--compute)}
.stagerun ul{margin:4px 0;padding-left:20px;overflow-wrap:anywhere}
"""


def page(run: str, record: Mapping[str, Any], store: "Store") -> str:
    """The page of a run, from its record and the artifacts that the record names."""
    parts = "".join(part(record, store) for part in PARTS)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" '
        f'content="light dark"><title>Run {said(run)}</title><style>{STYLE}{LAYOUT}</style></head>'
        f'<body><main class="stagerun">{_top(run, record)}{parts}</main></body></html>\n'
    )


def _top(run: str, record: Mapping[str, Any]) -> str:
    status, seconds = str(record.get("status", "unknown")), (record.get("timeline") or {}).get("seconds")
    plan = record.get("plan") or {}
    facts = [pictures(len(record["requests"])), str(plan.get("model", record["model"])),
             *(f"LoRA {lora}" for lora in loras(record)),
             *([f"family {plan['family']}"] if plan else []), *([f"{seconds:.1f} s"] if seconds is not None else [])]
    state = "state" if status == "done" else "state bad"
    return (f'<h1>Run {said(run)}</h1><p class="faint"><span class="{state}">{said(status)}</span> '
            f'{said(", ".join(facts))}</p>')


def _pictures(record: Mapping[str, Any], store: "Store") -> str:
    keys = record["stages"].get("decode", [])
    shots = "".join(_shot(store, key, request)
                    for key, request in zip(keys[:MOST_PICTURES], record["requests"], strict=False))
    more = f'<p class="faint">and {len(keys) - MOST_PICTURES} more</p>' if len(keys) > MOST_PICTURES else ""
    return _part("Pictures", f'<div class="shots">{shots}</div>{more}') if keys else ""


def _shot(store: "Store", key: str, request: Mapping[str, Any]) -> str:
    state = store.get(key)
    shown = '<p class="faint">not in the store</p>'
    if state is not None:
        shown = image(state.tensors()["pixels"].numpy(), SIDE, request["prompt"])
    return (f"<figure>{shown}<figcaption>{said(request['prompt'], 240)}<br>"
            f'<span class="faint">seed {request["seed"]}</span></figcaption></figure>')


def _requests(record: Mapping[str, Any], store: "Store") -> str:
    rows = [(said(_whole_prompt(r)), f"{r['width']}x{r['height']}", str(r["steps"]),
             "-" if r["guidance"] is None else f"{r['guidance']:g}", str(r["seed"]))
            for r in record["requests"][:MOST_REQUESTS]]
    left = len(record["requests"]) - len(rows)
    more = f'<p class="faint">and {left} more</p>' if left else ""
    return _part("Asked for", _table((("prompt", "prose"), ("size", ""), ("steps", ""), ("guidance", ""),
                                      ("seed", "")), rows) + more)


def _whole_prompt(request: Mapping[str, Any]) -> str:
    negative = request.get("negative_prompt")
    return str(request["prompt"]) if negative is None else f"{request['prompt']} (away from: {negative})"


def _blocks(record: Mapping[str, Any], store: "Store") -> str:
    return _chart("Where every block lay", "One column per card and stage, its blocks from the bottom in the order "
                  "in which they run. Stages follow each other; each gives its memory back.", record, blocks)


def _memory(record: Mapping[str, Any], store: "Store") -> str:
    return _chart("Memory over time", "Sampled where stages, steps and their parts begin and end. At each red mark a "
                  "stage is over, and what it held is given back.", record, memory)


def _gantt(record: Mapping[str, Any], store: "Store") -> str:
    return _chart("Where the time went", "On the scale of the memory above.", record, gantt)


def _measured(record: Mapping[str, Any], store: "Store") -> str:
    rows = [*_against(record)]
    head = (("stage", "word"), ("card", "word"), ("weights", ""), ("activations", ""), ("planned", ""),
            ("measured", ""), ("difference", ""), ("", "word"))
    return _part("Plan against measurement", _table(head, rows)) if rows else ""


def _against(record: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    peaks = (record.get("timeline") or {}).get("peaks", {})
    needs = {(stage, device): need for stage, there in (record.get("plan") or {}).get("stages", {}).items()
             for device, need in there.items() if device != "cpu" and device in peaks.get(stage, {})}
    most = max([1, *(max(need["weights"] + need["activations"], peaks[stage][device])
                     for (stage, device), need in needs.items())])
    for (stage, device), need in needs.items():
        planned, peak = need["weights"] + need["activations"], peaks[stage][device]
        # No sign for what rounds to nothing.
        off = f"{round(100 * (peak - planned) / planned, 1) + 0.0:+.1f} %".replace("+0.0", "0.0") if planned else "-"
        yield (said(stage), said(device), gib(need["weights"]), gib(need["activations"]), gib(planned), gib(peak), off,
               _bar(planned / most, peak / most))


def _bar(planned: float, measured: float) -> str:
    return (f'<svg class="bar" width="124" height="16" viewBox="0 0 124 16" role="img" aria-label="measured, framed '
            f'by the plan"><rect class="measured" x="1" y="4" width="{120 * measured:.1f}" height="8"/>'
            f'<rect class="planned" x="1" y="1" width="{120 * planned:.1f}" height="14"/></svg>')


def _previews(record: Mapping[str, Any], store: "Store") -> str:
    rows = []
    for index, shots in strips(record, store).items():
        figures = "".join(f'<figure>{image(pixels, 72, f"after step {step}")}<figcaption class="faint">step {step}'
                          f"</figcaption></figure>" for step, pixels in shots)
        prompt = record["requests"][index]["prompt"]
        rows.append(f'<p>{said(prompt, 240)}</p><div class="strip">{figures}</div>')
    return _part("Denoising, step by step", "".join(rows)) if rows else ""


def _decisions(record: Mapping[str, Any], store: "Store") -> str:
    plan = record.get("plan") or {}
    rows = [(said(name), said(part["dtype"]), gib(part["bytes"]), said(part["placement"]), said(part["reason"]))
            for name, part in plan.get("components", {}).items()]
    head = (("component", "word"), ("type", "word"), ("bytes", ""), ("placement", "word"), ("reason", "prose"))
    refused = [f"{stage} not {rung}: {why}" for stage, rungs in plan.get("refused", {}).items()
               for rung, why in rungs.items()]
    return _part("What the plan decided", _table(head, rows) + _list(refused)) if rows else ""


def _warnings(record: Mapping[str, Any], store: "Store") -> str:
    texts = [*record.get("warnings", []), *record.get("changes", []),
             *(f"picture {failure['index'] + 1}: {failure['text']}" for failure in record.get("failures", [])),
             *([record["error"]] if "error" in record else [])]
    return _part("Warnings", _list(texts)) if texts else ""


def _versions(record: Mapping[str, Any], store: "Store") -> str:
    versions = record.get("versions") or {}
    words = ", ".join(f"{name} {version}" for name, version in versions.items())
    return _part("Made with", f"<p>{said(words)}</p><p class=\"faint\">model {said(record['model'])}</p>")


PARTS: Sequence[Callable[[Mapping[str, Any], "Store"], str]] = (
    _warnings, _pictures, _requests, _blocks, _memory, _gantt, _previews, _measured, _decisions, _versions,
)


def _chart(
    title: str, words: str, record: Mapping[str, Any], draw: Callable[[Mapping[str, Any], float], Drawing | None]
) -> str:
    """A chart as wide as the window, drawn for each width: words that shrink with a drawing cannot be read."""
    drawings = {kind: draw(record, width) for kind, width in WIDTHS.items()}
    shown = "".join(f'<div class="{kind}">{drawing}</div>' for kind, drawing in drawings.items() if drawing)
    return _part(title, f'<p class="faint">{said(words)}</p>{shown}') if shown else ""


def _part(title: str, body: str) -> str:
    return f"<section><h2>{said(title)}</h2>{body}</section>"


def _table(head: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]]) -> str:
    """A table whose cells are HTML already; the classes of its columns stand in `head`."""
    top = "".join(f'<th class="{kind}">{said(name)}</th>' for name, kind in head)
    body = "".join("<tr>" + "".join(f'<td class="{kind}">{cell}</td>'
                                    for cell, (_, kind) in zip(row, head, strict=True)) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _list(texts: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{said(text)}</li>' for text in texts)}</ul>" if texts else ""
