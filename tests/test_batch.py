"""Many prompts in one run: a bad line is told by its number, and no picture depends on the other lines."""

import io
import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from runner import Job, make_plan, run_all
from runner.artifacts import open_store
from runner.commands.batch import Batch, Defaults, batch
from runner.commands.cli import answer
from runner.commands.prompts import FILE_BYTES, LINES, Entry, read_prompts
from runner.engine.keys import artifact_keys
from runner.media.paths import Naming, Unnamed
from runner.request import requests_for
from stages.families import FAMILIES

FLUX = FAMILIES["flux"]
pytestmark = pytest.mark.usefixtures("elsewhere")
SMALL = ("--size", "32x32", "--steps", "1", "--device", "cpu")


def read(data: bytes | str, name: str = "p.jsonl") -> list[Entry]:
    Path(name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return read_prompts(name)


def asked(data: bytes | str, name: str = "p.jsonl", *, seeds: tuple[int, ...] = (100,), count: int = 1) -> Batch:
    return batch(read(data, name), FLUX, Defaults({}, seeds, count))


def seeds(found: Batch) -> list[tuple[int, int, int]]:
    return [(item.line, item.request.index, item.request.seed) for item in found.items]


def pixels(path: str | Path) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    with Image.open(path) as image:
        return np.asarray(image)


def test_a_text_file_is_a_prompt_a_line() -> None:
    found = asked("\ufeff# a comment\r\n a red circle \r\n\r\n  # one more\na \u732b\n\u2028x", "p.txt")
    assert [(item.line, item.request.prompt) for item in found.items] == [
        (2, "a red circle"), (5, "a \u732b"), (6, "\u2028x")]
    assert not found.refused and found.total == 3


def test_an_object_a_line_says_what_the_command_line_can_say() -> None:
    found = asked("\n".join(map(json.dumps, [
        {"prompt": "x", "size": "64x48", "steps": 3, "guidance": 2, "seed": 5, "count": 2, "id": "a.1", "out": "o"},
        {"prompt": "y", "seed": [9, 7], "id": 12, "guidance": None},
    ])))
    first, _, third, last = found.items
    assert (first.request.width, first.request.height, first.request.steps, first.request.guidance) == (64, 48, 3, 2.0)
    assert type(first.request.guidance) is float, "1 and 1.0 would be two artifacts"
    assert (first.id, first.out, third.id, last.request.guidance) == ("a.1", "o", "12", FLUX.guidance)
    assert seeds(found) == [(1, 0, 5), (1, 1, 6), (2, 2, 9), (2, 3, 7)]


BAD = [
    ('{"prompt": ""}', "empty prompt"), ('{"size": "64x64"}', "there is no prompt"), ("{}", "there is no prompt"),
    ('{"promt": "x"}', "unknown key 'promt' -> did you mean prompt?"),
    ('{"prompt": "x", "model": "y"}', "unknown key 'model' -> a line may say prompt, negative_prompt, id"),
    ('{"prompt": "x", "negative_prompt": "y"}', "flux reads no negative prompt"),
    ('{"prompt": "x", "prompt": "y"}', "a key appears twice"), ("[1]", "it is a JSON list"),
    ('"x"', "it is a JSON str"), ("a red circle", "it is no JSON object"), ('{"prompt": "x"', "it is no JSON object"),
    ('{"prompt": "x"} {"prompt": "y"}', "Extra data"),
    ('{"prompt": "x", "guidance": NaN}', "NaN is not JSON"), ('{"prompt": "x", "guidance": 1e999}', "got inf"),
    ('{"prompt": "x", "guidance": "3"}', "guidance must be"), ('{"prompt": "x", "guidance": 31}', "got 31.0"),
    ('{"prompt": "x", "seed": ' + "9" * 5000 + "}", "it is no JSON object"),
    ('{"prompt": "x", "seed": 18446744073709551616}', "seed must be"), ('{"prompt": "x", "seed": 1.0}', "got 1.0"),
    ('{"prompt": "x", "seed": true}', "got True"), ('{"prompt": "x", "seed": []}', "must list 1 to 64"),
    ('{"prompt": "x", "seed": [1, -1]}', "must list 1 to 64"), ('{"prompt": "x", "seed": [1, "2"]}', "must list"),
    ('{"prompt": "x", "seed": [1, 2], "count": 2}', "contradict"), ('{"prompt": "x", "count": 65}', "1 to 64, got 65"),
    ('{"prompt": "x", "count": 0}', "got 0"), ('{"prompt": "x", "steps": 2.5}', "got 2.5"),
    ('{"prompt": "x", "steps": 1001}', "got 1001"), ('{"prompt": "x", "size": [64, 64]}', "size must be text"),
    ('{"prompt": "x", "size": "64x"}', "WxH"), ('{"prompt": "x", "size": "9999x9999"}', "the limit is 4,194,304"),
    ('{"prompt": ["x"]}', "must be text, got list"), ('{"prompt": "a\\u0000b"}', "U+0000"),
    ('{"prompt": "\\ud800"}', "not valid UTF-8"), ('{"prompt": "\\u001b[2J"}', "U+001B"),
    ('{"prompt": "' + "x" * 16385 + '"}', "16,385 bytes"), ('{"prompt": "' + "x" * 140_000 + '"}', "131,072"),
    ("[" * 100_000, "nested too deeply"), ('{"prompt": ' * 2000, "nested too deeply"),
    ('{"prompt": "x", "id": "../x"}', "id must be"), ('{"prompt": "x", "id": ""}', "id must be"),
    ('{"prompt": "x", "id": -1}', "id must be"), ('{"prompt": "x", "id": "good"}', "is that of line 1"),
    ('{"prompt": "x", "out": 3}', "out must be text"),
]


@pytest.mark.parametrize(("line", "says"), BAD, ids=[line[:40] for line, _ in BAD])
def test_a_bad_line_is_told_by_its_number_and_the_others_stay(line: str, says: str) -> None:
    found = asked(f'{{"prompt": "a", "id": "good"}}\n\n{line}\n{{"prompt": "b"}}')
    [refused] = found.refused
    assert refused.line == 3 and says in str(refused) and len(str(refused)) < 450
    first, last = found.items
    assert (first.request.seed, last.line) == (100, 4)
    assert last.request.seed == 100 + last.request.index == 99 + found.total


def test_bytes_that_are_no_text_spoil_their_line_alone() -> None:
    found = asked(b"a\ncaf\xe9\nb", "p.txt")
    assert [str(line)[:40] for line in found.refused] == ["line 2: it is not valid UTF-8 at byte 3 "]
    assert seeds(found) == [(1, 0, 100), (3, 2, 102)]


@pytest.mark.parametrize(
    ("data", "name", "says"),
    [
        (b"", "p.txt", "has no prompt"), (b"\n \n# x\n", "p.txt", "has no prompt"),
        ("a\nb".encode("utf-16"), "p.txt", "line 1 has a NUL byte"), (b"a\nb\0", "p.jsonl", "line 2 has a NUL byte"),
        (b"\x7fELF\2\1\1\0\0", "p.txt", "NUL byte"), (b"x", "p.csv", "must end in .txt"), (b"x", "p", "must end in"),
        (b"x" * (FILE_BYTES + 1), "p.txt", "more than 10,485,760 bytes"),
        (b"x\n" * (LINES + 1), "p.txt", "10,001 prompts; the limit is 10,000"),
    ],
)
def test_a_file_that_is_none_of_ours_is_refused_whole(data: bytes, name: str, says: str) -> None:
    with pytest.raises(ValueError) as caught:
        read(data, name)
    assert says in str(caught.value)


def test_what_is_no_plain_file_is_refused_and_does_not_hang() -> None:
    Path("folder.txt").mkdir()
    os.mkfifo("fifo.txt")
    Path("zero.txt").symlink_to("/dev/zero")
    for name, says in (("folder.txt", "Is a directory"), ("fifo.txt", "plain file"), ("zero.txt", "plain file"),
                       ("gone.txt", "No such file")):
        with pytest.raises(ValueError, match=says):
            read_prompts(name)


def test_standard_input_is_text_or_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    for data, prompt in ((b"a cat\n", "a cat"), (b'\n{"prompt": "a dog"}\n', "a dog")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert [entry.options["prompt"] for entry in read_prompts("-")] == [prompt]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"x" * (FILE_BYTES + 1))))
    with pytest.raises(ValueError, match="more than 10,485,760 bytes"):
        read_prompts("-")


def test_count_and_seeds_of_the_command_line_hold_for_every_line() -> None:
    lines = '{"prompt": "a"}\n{"prompt": "b", "seed": 7}\n{"prompt": "c", "count": 1}\n{"prompt": "d"}'
    assert seeds(asked(lines, count=2)) == [
        (1, 0, 100), (1, 1, 101), (2, 2, 7), (2, 3, 8), (3, 4, 104), (4, 5, 105), (4, 6, 106)]
    several = asked(lines, seeds=(5, 9))
    assert seeds(several) == [(1, 0, 5), (1, 1, 9), (2, 2, 7), (4, 4, 5), (4, 5, 9)]
    assert [line.line for line in several.refused] == [3]


def test_too_many_pictures_are_refused_with_how_many() -> None:
    with pytest.raises(ValueError, match="64,000 pictures; the limit is 10,000"):
        asked("x\n" * 1000, "p.txt", count=64)
    with pytest.raises(ValueError, match="have 20,480,000 bytes; the limit is 16,777,216"):
        asked("\n".join(["x" * 16384] * 50), "p.txt", count=25)


@given(st.lists(st.sampled_from([line for line, _ in BAD[:30]] + ['{"prompt": "a"}', '{"prompt": "b", "count": 3}']),
                min_size=1, max_size=8), st.data())
def test_a_picture_depends_on_no_other_line_being_good(lines: list[str], data: st.DataObject) -> None:
    """A line that is mended changes nothing of the others, as long as it asks for as many pictures."""
    at = data.draw(st.integers(0, len(lines) - 1))
    entries = {index: _entry(index, line) for index, line in enumerate(lines)}
    defaults = Defaults({}, (100,), 2)
    before = batch(list(entries.values()), FLUX, defaults)
    broken = replace(entries[at], fault="broken")
    after = batch(list((entries | {at: broken}).values()), FLUX, defaults)
    assert [item for item in before.items if item.line != at + 1] == list(after.items)
    assert before.total == after.total
    indices = [item.request.index for item in before.items]
    assert len(set(indices)) == len(indices) and max(indices, default=0) <= before.total


def _entry(index: int, line: str) -> Entry:
    from runner.commands.prompts import _object

    return _object(index + 1, line)


def test_pictures_of_a_batch_are_numbered_and_named_by_their_lines() -> None:
    requests = requests_for("A Fox", FLUX, seed=3, count=12)
    naming = Naming(None, run="r", total=12)
    assert str(naming.path(requests[0])) == "00-a-fox-3.png"
    assert str(naming.path(requests[11])) == "11-a-fox-14.png"
    by_id = Naming("out/{id}.png", run="r", total=12)
    assert str(by_id.path(requests[0], "Fox.1")) == "out/Fox.1.png"
    with pytest.raises(Unnamed, match="there is no id"):
        by_id.path(requests[1])
    with pytest.raises(ValueError, match=r"two pictures cannot both be out/Fox\.1\.png"):
        by_id.path(requests[1], "Fox.1")
    assert str(by_id.path(requests[1], None, "deep/{seed}.png")) == "out/deep/4.png"
    Path("out").mkdir()
    Path("out/away").symlink_to("..")
    for own in ("/tmp/x.png", "../x.png", "a/../../x.png", "away/x.png", "x.gif", "", "{sed}.png", "a\0.png"):
        with pytest.raises(Unnamed, match=r"^out "):
            by_id.path(requests[2], None, own)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--prompt", "x", "--prompt-file", "p.txt"], "both say what to draw"),
        (["--prompt-file", "gone.txt"], "No such file"), (["--prompt-file", "p.txt", "--count", "65"], "1 to 64"),
        (["--prompt-file", "p.txt", "--out", "x.png"], "two pictures cannot both be x.png"),
        (["--prompt-file", "p.txt", "--out", "{id}.png"], "no good line: line 1: --out has the field {id}"),
        (["--prompt-file", "bad.jsonl"], "has no good line: line 1: empty prompt"),
        (["--prompt", "x", "--seed", "1,2", "--count", "2"], "contradict"),
        (["--prompt", "x", "--seed", "1,-1"], "seed must be a whole number from 0"),
        (["--prompt", "x", "--seed", "1,,2"], "seed must be"), (["--prompt", "x", "--seed", ",".join("1" * 65)], "64"),
        (["--prompt", "x", "--out", "{id}.png"], "there is no id"),
    ],
)
def test_a_bad_order_is_refused_before_anything_runs(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("p.txt").write_text("a\nb")
    Path("bad.jsonl").write_text('{"prompt": ""}\n{"promt": "x"}')
    assert answer(["flux", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and says in err


@pytest.fixture(scope="module")
def mixed() -> str:
    """Six lines, two of them bad, one only for this model."""
    return "\n".join([
        '{"prompt": "a red circle", "id": "one"}', '{"prompt": "a red circle", "size": "40x32"}',
        '{"prompt": "two squares", "seed": [4, 5], "size": "48x32", "steps": 2}', '{"promt": "x"}',
        '{"prompt": "a dog", "out": "dogs/{id}.png", "id": "rex"}', '{"prompt": "a red circle"}',
    ])


def test_a_batch_with_bad_lines_gives_the_pictures_of_the_others(
    flux: Path, mixed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("p.jsonl").write_text(mixed)
    words = ["flux", "--model", str(flux), *SMALL]
    assert answer([*words, "--seed", "100", "--prompt-file", "p.jsonl", "--out", "new/", "--artifacts", "store"]) == 1
    out, err = capsys.readouterr()
    paths = ["new/0-a-red-circle-100.png", "new/2-two-squares-4.png", "new/3-two-squares-5.png", "new/dogs/rex.png",
             "new/6-a-red-circle-106.png"]
    assert out.splitlines() == paths
    assert err.splitlines()[:2] == [
        "error: line 2: --size 40x32: this model makes multiples of 16; nearest are 48x32 and 32x32",
        "error: line 4: it has the unknown key 'promt' -> did you mean prompt?"]
    assert "5 pictures in" in err and pixels(paths[1]).shape == (32, 48, 3)
    # Three distinct prompts are encoded three times, and every picture is the one that it would be alone.
    assert sum('"stage": "encode"' in path.read_text() for path in Path("store/stages").iterdir()) == 3
    for more, path in ((["two squares", "--seed", "5", "--size", "48x32", "--steps", "2"], paths[2]),
                       (["a red circle", "--seed", "106"], paths[4])):
        alone = answer([*words, "--prompt", *more, "--artifacts", "memory", "--out", "alone.png", "--overwrite", "-q"])
        assert alone == 0 and np.array_equal(pixels("alone.png"), pixels(path))


def test_a_batch_as_json_is_a_line_for_each_thing_that_happened(
    flux: Path, mixed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(mixed.encode())))
    assert answer(["flux", "--model", str(flux), *SMALL, "--prompt-file", "-", "--json", "--artifacts", "memory"]) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["kind"], line.get("line")) for line in lines] == [
        ("failed", 2), ("failed", 4), ("picture", 1), ("picture", 3), ("picture", 3), ("picture", 5), ("picture", 6),
        ("run", None)]
    assert [line.get("id") for line in lines[2:7]] == ["one", None, None, "rex", None]
    assert [line["index"] for line in lines[2:7]] == [0, 2, 3, 5, 6] and lines[2]["steps"] == 1
    assert [stage["made"] for stage in lines[-1]["stages"]] == [5, 5, 5] and len(lines[-1]["artifacts"]["decode"]) == 5


def test_a_name_that_is_taken_meanwhile_costs_that_picture_alone(
    flux: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two names that lead to one file: the first picture stays, the second is told, the third is there."""
    Path("real").mkdir()
    Path("alias").symlink_to("real")
    Path("p.jsonl").write_text("\n".join(
        f'{{"prompt": "a {word}", "out": "{out}"}}' for word, out in
        (("dog", "real/x.png"), ("cat", "alias/x.png"), ("fox", "real/y.png"))))
    words = ["flux", "--model", str(flux), *SMALL, "--seed", "1", "--prompt-file", "p.jsonl", "--artifacts", "store"]
    assert answer([*words, "--json"]) == 1
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert [(line["kind"], line.get("line")) for line in lines] == [
        ("picture", 1), ("picture", 3), ("failed", 2), ("run", None)]
    assert "alias/x.png is there already" in lines[2]["text"] and "failed: line 2: alias/x.png is there" in err
    assert "error: 1 of 3 pictures failed -> python -m runner resume " in err.splitlines()[-1]
    assert not list(Path().glob("**/.*.part"))


def test_a_plan_is_for_the_largest_line(flux: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("p.jsonl").write_text('{"prompt": "a", "size": "32x32"}\n{"prompt": "b", "size": "512x512"}\n{"x": 1}')
    decode = []
    for more in (["--prompt-file", "p.jsonl"], ["--size", "512x512"], ["--size", "32x32"]):
        assert answer(["plan", "flux", "--model", str(flux), "--machine", "2GB", "--json", *more]) == 0
        out, err = capsys.readouterr()
        decode.append(json.loads(out)["stages"]["decode"]["cuda:0"]["activations"])
        assert ("error: line 3" in err) == ("p.jsonl" in more)
    assert decode[0] == decode[1] > decode[2]


def test_planning_ten_thousand_requests_takes_seconds(flux: Path) -> None:
    Path("p.txt").write_text("\n".join(f"a red circle {index}" for index in range(LINES)))
    found = batch(read_prompts("p.txt"), FLUX, Defaults({"size": (32, 32)}, (5,), 1))
    requests = [item.request for item in found.items]
    few = make_plan(Job("flux", requests[:2], model=flux, devices=["cpu"]))
    # Seconds of the processor, as the machine may be busy with other work.
    begin = time.process_time()
    make_plan(Job("flux", requests[:2], model=flux, devices=["cpu"]))
    short = time.process_time() - begin
    begin = time.process_time()
    many = make_plan(Job("flux", requests, model=flux, devices=["cpu"]))
    assert time.process_time() - begin < short + 5
    begin = time.process_time()
    keys = artifact_keys(many)
    assert time.process_time() - begin < 15
    assert len(set(keys["decode"])) == LINES and keys["decode"][:2] == artifact_keys(few)["decode"]


def test_a_long_run_takes_no_more_memory_than_a_short_one(flux: Path, tmp_path: Path) -> None:
    """Pages of this process while 60 pictures go through each stage: flat behind the first 20."""
    requests = [request for index in range(20) for request in
                requests_for(f"a red circle {index}", FLUX, size=(32, 32), steps=1, seed=index, count=3,
                             index=3 * index)]
    job = make_plan(Job("flux", requests, model=flux, devices=["cpu"]))
    pages: dict[str, list[int]] = {"denoise": [], "decode": []}

    def emit(kind: str, data: Mapping[str, object]) -> None:
        if kind == "item" and data["stage"] in pages:
            pages[str(data["stage"])].append(_resident())

    done: list[int] = []
    report = run_all(job, store=open_store(str(tmp_path / "store")), emit=emit, done=lambda picture: done.append(
        int(picture.read().sum())))
    assert len(done) == len(report.pictures) == 60
    for stage, sizes in pages.items():
        grown = max(sizes[20:]) - sizes[20]
        assert len(sizes) == 60 and grown < 6 * 2**20, f"{stage} grew by {grown / 2**20:.1f} MiB in 40 pictures"


def _resident() -> int:
    """Bytes that are this process's own, in memory or swapped out; pages of mapped files come and go."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon:", "VmSwap:")))
