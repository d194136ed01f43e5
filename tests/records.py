"""The record of a run on two cards, written by hand: what reports are made of, without a run."""

from typing import Any

MIB = 2**20
HOSTILE = "\"><script>alert(1)</script><img src=x onerror=alert(2)> \u202ereversed\u202c </title></style> & 'quotes'"
SECONDS = {"encode": (0.0, 1.5), "denoise": (1.6, 9.0), "decode": (9.1, 10.0)}


def blocks(row: str, numbers: range, size: int) -> dict[str, int]:
    """So many bytes in each block of a row."""
    return {f"{row}.{number}": size for number in numbers}


def record(prompt: str = HOSTILE) -> dict[str, Any]:
    """A record such as `run_all` keeps, of one picture on two cards of 14 MiB."""
    rest, double, single = {"outside blocks": MIB // 2}, "transformer_blocks", "single_transformer_blocks"
    layout = {
        "encode": {"sim:0": {"text_encoder": blocks("text_model.encoder.layers", range(12), MIB // 16),
                             "text_encoder_2": rest | blocks("encoder.block", range(24), MIB // 3)}},
        "denoise": {
            "sim:0": {"transformer": rest | blocks(double, range(6), MIB) | blocks(single, range(9, 18), MIB // 2)},
            "sim:1": {"transformer": blocks(double, range(6, 13), MIB) | blocks(single, range(9), MIB // 2)}},
        "decode": {"sim:0": {"vae": {"vae": 2 * MIB}}},
    }
    weights = {stage: {card: sum(sum(parts.values()) for parts in components.values())
                       for card, components in cards.items()} for stage, cards in layout.items()}
    peaks = {stage: {card: cards.get(card, 0) + (MIB if card in cards else 0) for card in ("sim:0", "sim:1")}
             for stage, cards in weights.items()}
    return {
        "model": "sha256:" + 64 * "a", "status": "done", "warnings": ["careful <b>now</b>"],
        "requests": [{"prompt": prompt, "width": 128, "height": 128, "steps": 16, "guidance": None, "seed": 1,
                      "text_tokens": 20, "index": 0}],
        "stages": {"encode": [64 * "1"], "denoise": [64 * "2"], "decode": [64 * "3"]},
        "plan": {
            "model": "some/<model>", "family": "flux",
            "devices": {card: {"total": 14 * MIB, "free": 14 * MIB, "room": 14 * MIB} for card in ("sim:0", "sim:1")},
            "stages": {stage: {card: {"weights": size, "activations": MIB} for card, size in cards.items()}
                       for stage, cards in weights.items()},
            "components": {"transformer": {"dtype": "float32", "placement": "sim:0:6,sim:1:16,sim:0:9",
                                           "bytes": 23 * MIB, "reason": "asked for"}},
            "refused": {"denoise": {"resident": "23.0 MiB on one device"}},
        },
        "layout": layout,
        "versions": {"torch": "2.13.0", "diffusers": "0.42.1"},
        "timeline": timeline(weights, peaks),
    }


def timeline(weights: dict[str, dict[str, int]], peaks: dict[str, dict[str, int]]) -> dict[str, Any]:
    """Samples, spans and flushes of three stages."""
    samples: list[Any] = []
    spans: list[Any] = []
    for stage, (begin, end) in SECONDS.items():
        used = [weights[stage].get(card, 0) for card in ("sim:0", "sim:1")]
        load, last = begin + 0.2 * (end - begin), end - 0.02
        samples += [[begin, stage, "stage", [0, 0], 400 * MIB], [load, stage, "loaded", used, 450 * MIB]]
        samples += [[load + (last - load) * step / 8, stage, "step", used, 450 * MIB] for step in range(1, 8)]
        samples += [[last, stage, "part", used, 440 * MIB], [end, stage, "flush", [0, 0], 410 * MIB]]
        for part, start, stop in (("load", begin, load), ("compute", load, last - 0.02), ("save", last - 0.02, last),
                                  ("flush", last, end)):
            spans.append({"stage": stage, "part": part, "lane": 0, "begin": start, "end": stop, "busy": stop - start,
                          "count": 1})
    flushes = [{"seconds": end, "stage": stage, "freed": sum(weights[stage].values()), "left": 0}
               for stage, (_, end) in SECONDS.items()]
    return {"seconds": 10.0, "devices": ["sim:0", "sim:1"], "samples": samples, "spans": spans, "flushes": flushes,
            "peaks": peaks}
