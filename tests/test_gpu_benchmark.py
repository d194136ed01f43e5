"""The benchmark for a real card: what it can be sure of without one."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch.profiler import ProfilerActivity

from benchmarks import gpu, gpu_tables
from benchmarks.copies import copied, extended, watched
from benchmarks.floors import operations
from benchmarks.full_size import DONE, LAYER, LAYERS, LEFT, REST, build, overwrite, text_layers
from benchmarks.gpu_workload import WAYS, Clock, Notes, Way
from tests.conftest import Cards
from tests.sparse import flux_dev, hollow

TRACE: dict[str, Any] = {"schemaVersion": 1, "baseTimeNanoseconds": 1, "traceEvents": [
    {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy HtoD (Pageable -> Device)", "ts": 1.5, "dur": 2.0, "tid": 7,
     "args": {"stream": 7, "bytes": 100, "memory bandwidth (GB/s)": "N/A"}},
    {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy HtoD (Pinned -> Device)", "ts": 4, "args": {"bytes": 20}},
    {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy DtoH (Device -> Pageable)", "ts": 5, "args": {"bytes": 3}},
    {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy DtoD (Device -> Device)", "ts": 6, "args": {"bytes": 1000}},
    {"ph": "X", "cat": "cuda_runtime", "name": "cudaMemcpyAsync", "ts": 1, "args": {"cbid": 41}},
    {"ph": "X", "cat": "kernel", "name": "void gemm<float>(\"\")", "ts": 7, "args": {"stream": 7}},
    {"ph": "f", "cat": "ac2g", "name": "ac2g", "id": 3}, {"ph": "M", "name": "process_name"},
]}


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FLUX.1-dev with one of T5's layers, and holes for its numbers."""
    return flux_dev(tmp_path_factory.mktemp("models") / "dev", text_layers=1)


def test_copies_are_counted_from_a_trace() -> None:
    assert copied(json.loads(json.dumps(TRACE))) == {"to card": 120, "to host": 3}
    assert copied({"traceEvents": []}) == {}


def test_the_profiler_writes_a_trace_that_can_be_read() -> None:
    done = []
    assert watched(lambda: done.append(torch.ones(8) @ torch.ones(8)), [ProfilerActivity.CPU]) == {} and len(done) == 1


def test_two_short_images_make_a_line() -> None:
    found = extended({"to card": 30, "to host": 5}, {"to card": 50, "to host": 5}, 28)
    assert found == {"per step": {"to card": 20, "to host": 0}, "per image": {"to card": 30 + 27 * 20, "to host": 5}}
    assert extended({}, {"to card": 7}, 2)["per image"] == {"to card": 7, "to host": 0}


def test_a_way_that_no_longer_fits_is_left_out_and_says_so() -> None:
    ways, left, kept = [Way("a", 24, 10, 50), Way("b", 24, 45, 60), Way("c", 16, 10, 20)], [200.0, 40.0, 15.0], []
    given: dict[str, float] = {}

    def start(way: Way, seconds: float) -> dict[str, Any]:
        given[way.name] = seconds
        return {"status": "made"}

    found = gpu.compare(ways, start, lambda: left.pop(0), lambda all_: kept.append(len(all_)))
    assert given == {"a, 24 GiB": 50, "c, 16 GiB": 15} and kept == [1, 2, 3]
    assert found["b, 24 GiB"] == {"status": "skipped", "why": "40 s left, needs 45"}
    assert gpu_tables.times(found, 28)[1][-1] == "skipped; 40 s left, needs 45"


def test_what_a_process_noted_before_it_ended_is_kept(tmp_path: Path) -> None:
    notes = Notes(tmp_path / "notes.json")
    notes.add(status="making", load=2.0, steps=[3.0, 1.0, 2.0, 1.5])
    found = gpu.started(notes.path or tmp_path, 60.0, "--no-such-option")
    assert found["status"] == "ended while making" and found["why"].startswith("exit code 2: ")
    assert gpu_tables.step_seconds(found) == 1.5 and gpu_tables.times({"a": found}, 28)[0][1:3] == ["1.500", "3.000"]
    assert "4 of 28 steps" in gpu_tables.remark(found, 28) and gpu_tables.image(found, 28) == "-"
    found = gpu.started(tmp_path / "none.json", 0.01, "--prepare")
    assert found == {"status": "ended while starting", "why": "ended after 0 s"}
    assert gpu.settled({"status": "made, watching copies", "image": 1.0}, "late")["status"] == "made"
    assert gpu_tables.image({"image": 10.0, "steps": [1.0, 2.0, 2.0]}, 5) == "~14.0"


def test_steps_are_counted_anew_where_a_stage_is_tried_again(cards: Cards) -> None:
    cards(1000)
    clock = Clock()
    for kind in ("item", "step", "step", "item", "step", "step", "step"):
        clock.hear(kind, {"stage": "denoise"})
    clock.hear("item", {"stage": "decode"})
    assert len(clock.steps) == 3


def test_files_are_written_over_with_numbers_that_make_pictures(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    hollow(path, {"a.weight": ("BF16", (300, 10), 6000), "norm.weight": ("F32", (500,), 2000),
                  "norm.bias": ("F32", (500,), 2000)})
    size = path.stat().st_size
    assert overwrite(path, "cpu", 0, chunk=512) == 10_000 and path.stat().st_size == size
    with safe_open(path, "pt") as file:
        found = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    for name, mean in {"a.weight": 0, "norm.weight": 1, "norm.bias": 0}.items():
        assert abs(found[name].mean() - mean) < 0.005 and 0.015 < found[name].std() < 0.025
    assert found["a.weight"].unique().numel() > 1000


def test_a_small_disk_gets_a_smaller_text_encoder(dev: Path, tmp_path: Path) -> None:
    assert text_layers(REST + LEFT + LAYERS * LAYER) == text_layers(10**12) == LAYERS
    assert text_layers(REST + LEFT + 2 * LAYER) == 2
    with pytest.raises(ValueError, match=r"has 20\.0 GB free.*--folder"):
        text_layers(20 * 10**9)
    data = sum(path.stat().st_size for path in dev.rglob("*.safetensors"))
    assert REST - LAYER / 2 < data - LAYER < REST
    (tmp_path / DONE).write_text('{"bytes": 7, "text_layers": 3}')
    assert build(tmp_path, "cpu") == {"bytes": 7, "text_layers": 3}


def test_a_step_is_as_much_arithmetic_as_its_matrix_products(dev: Path) -> None:
    """Per token and layer of FLUX.1-dev, from its published sizes; what is left are embeddings."""
    tokens, width = 4096 + 512, 3072
    block = 2 * tokens * 12 * width**2 + 4 * tokens**2 * width
    assert operations(dev, 1024, 512) == pytest.approx(57 * block, rel=0.005)


def test_all_ways_run_on_a_simulated_card(
    cards: Cards, sim: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cards(2**20)
    monkeypatch.setattr("sys.argv", ["gpu", "--tiny", "--json", str(tmp_path / "gpu.json")])
    gpu.main()
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "gpu.md").read_text() and printed.startswith("simulated card")
    found = {name: known for name, (known,) in json.loads((tmp_path / "gpu.json").read_text())["raw"].items()}
    assert list(found) == [way.name for way in WAYS]
    *others, last = found.values()
    assert {known["status"] for known in others} == {"made"} and all(len(known["steps"]) == 3 for known in others)
    assert last["status"] == "out of memory" and "| model offload, 16 GiB | - |" in printed
    step = {name: known["copied"]["per step"]["to card"] for name, known in found.items() if "copied" in known}
    resident, streamed = step["resident pipeline, no limit"], step["stages, 16 GiB"]
    weights = found["resident pipeline, no limit"]["peak"]
    assert resident < streamed < weights / 2 < step["sequential offload, 16 GiB"]
    assert "streamed" in found["stages, 16 GiB"]["placed"]["transformer"] and found["stages, 24 GiB"]["table"]
    assert found["stages, 24 GiB"]["peak"] < found["model offload, 24 GiB"]["peak"] <= 24 * gpu.TINY_UNIT
