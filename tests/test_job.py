"""One type for what a run is asked for: the same from a shell, from Python, from JSON and in another process."""

import ast
import inspect
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runner import Job, Request, RunPolicy, make_plan, run_all
from runner.artifacts import MemoryStore
from runner.commands.options import FamilyOptions
from runner.job import Label, Origin, Output, RefusedLine
from runner.job_fields import DTYPES
from runner.placement_options import MemoryLimits, PlaceRequest
from stages.errors import InvalidInput
from stages.families import FAMILIES
from stages.models.lora import LoraRequest

FOX = Request("a fox", 64, 48, 2, 3.5, 7, 32)
TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20).filter(str.strip)
PLACES = ("denoise=sharded", "encode.text_encoder=1", "denoise=0:9,1:10", "decode=cpu", "denoise=tensor_parallel:2")


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    """Jobs with all of their fields."""
    count, family = draw(st.integers(1, 3)), draw(st.sampled_from(sorted(FAMILIES)))
    requests = [replace(FOX, prompt=draw(TEXT), seed=draw(st.integers(0, 2**64 - 1)), index=at,
                        guidance=None if FAMILIES[family].guidance is None else draw(st.none() | st.floats(0, 30)))
                for at in range(count)]
    return Job(
        family, [replace(one, text_tokens=8) for one in requests],
        model=draw(st.none() | TEXT), revision=draw(st.none() | TEXT),
        loras=draw(st.lists(st.sampled_from([LoraRequest("a.safetensors", 0.5), LoraRequest("u/r", 1.0, 64 * "a")]))),
        scheduler=draw(st.sampled_from([None, "UniPCMultistepScheduler,use_flow_sigmas=true", "shift=3,name=x"])),
        dtype=draw(st.dictionaries(st.sampled_from(["", "vae", "transformer"]), st.sampled_from(DTYPES))),
        devices=draw(st.lists(st.sampled_from(["cpu", "cuda:0", "1"]))),
        max_memory=draw(st.sampled_from(["", "14GiB", "80%", "-2GiB", "0=14GiB,cpu=24GiB"])),
        place=draw(st.lists(st.sampled_from(PLACES))), allow_offload=draw(st.sampled_from([None, "cpu", "disk"])),
        lanes=draw(st.none() | st.integers(1, 16)), modulation_table=draw(st.booleans()),
        peer_copies=draw(st.booleans()), store=draw(st.sampled_from(["", "memory", "store", "s3://a/b"])),
        run=draw(st.sampled_from(["", "r1"])),
        policy=RunPolicy(**draw(st.sampled_from([{}, {"stop_after": "denoise"}, {"from_stage": "decode"},
                                                 {"stop_after": "denoise", "from_stage": "encode"}])),
                         step_every=draw(st.floats(0, 1e6)),
                         degrade=draw(st.booleans()), preview=draw(st.integers(0, 9)), strict=draw(st.booleans())),
        output=Output(tuple(f"{at}.png" for at in range(count)), overwrite=draw(st.booleans())),
        labels=[Label(at + 1, draw(st.none() | TEXT)) for at in range(count)],
        refused=[RefusedLine(9, draw(TEXT))] if draw(st.booleans()) else [],
        origin=draw(st.none() | st.just(Origin("the picture", "sha256:0", "bring it back"))),
        resumed=draw(st.booleans()),
    )


@given(jobs())
def test_a_job_is_the_same_after_a_trip_through_json(job: Job) -> None:
    said = json.loads(json.dumps(job.to_json()))
    assert Job.from_json(said) == job and said["version"] == 2
    assert said.keys() == {"version"} | {field.name for field in fields(Job)}


def test_python_may_say_what_a_shell_says() -> None:
    job = Job("flux", [FOX], model=Path("models/flux"), dtype=torch.bfloat16, devices="cpu", place="denoise=sharded",
              max_memory={"0": "14GiB", "cpu": "24GiB"}, loras=["style.safetensors=0.8"], store=Path("store"))
    assert job == Job(
        "flux", (FOX,), model="models/flux", dtype={"": "bfloat16"}, devices=("cpu",), store="store",
        place=(PlaceRequest("denoise", "sharded"),), max_memory=MemoryLimits.read("0=14GiB,cpu=24GiB"),
        loras=(LoraRequest("style.safetensors", 0.8),))
    assert Job("flux", [FOX], dtype={"vae": torch.float32}).dtype == {"vae": "float32"}


def test_what_gives_its_values_one_at_a_time_is_taken_once() -> None:
    kept = Job("flux", [FOX, FOX], place=["denoise=sharded"], loras=["a=0.5"], devices=["cpu"], labels=[Label(1)] * 2)
    assert kept == Job("flux", iter([FOX, FOX]), place=iter(["denoise=sharded"]), loras=iter(["a=0.5"]),
                       devices=iter(["cpu"]), labels=iter([Label(1)] * 2))


def test_type_checkers_see_every_field_of_a_job_in_its_order() -> None:
    tree = ast.parse(Path(inspect.getsourcefile(Job) or "").read_text())
    seen = [[argument.arg for argument in node.args.args[1:]] for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
    assert seen == [[field.name for field in fields(Job)]]


@pytest.mark.parametrize(("change", "says"), [
    ({"family": "fluks"}, r"there is no family 'fluks' -> did you mean flux\? choose from flux, "),
    ({"requests": []}, "requests are none"),
    ({"requests": [3]}, "requests has '3' -> a prompt, or Request"), ({"requests": [{"seed": 1}]}, "without a prompt"),
    ({"requests": {"prompt": "a", "sead": 1}}, "has no 'sead' -> did you mean seed"),
    ({"requests": [Request("a", guidance=3.5)], "family": "demo"}, "demo takes no guidance -> leave guidance out"),
    ({"requests": [Request("a", negative_prompt="b")]}, "flux reads no negative prompt"),
    ({"requests": [""]}, "empty prompt"), ({"family": "FLX"}, r"there is no family 'FLX' -> did you mean flux\? "),
    ({"requests": 3}, "requests is '3' -> give a list"), ({"requests": None}, "requests is 'None' -> give a list"),
    ({"place": 1}, "place is '1'"), ({"devices": 1.5}, "devices is '1.5'"),
    ({"devices": {"0": 1}}, "devices is .{'0'"),
    ({"loras": 1.5}, "loras is '1.5'"), ({"loras": None}, "loras is 'None'"), ({"labels": Label(1)}, "labels is"),
    ({"dtype": "fp8"}, "dtype 'fp8': choose one of float32"), ({"dtype": {"vae": "int8"}}, "of vae: choose"),
    ({"lanes": 0}, "lanes must be"), ({"lanes": True}, "lanes must be"), ({"lanes": 2.0}, "lanes must be"),
    ({"allow_offload": "gpu"}, "allow_offload is 'gpu' -> choose from"), ({"place": ["denoise"]}, "write"),
    ({"place": ["paint=0"]}, "paint"), ({"max_memory": "lots"}, "write"), ({"max_memory": {"0": "1"}}, None),
    ({"loras": ["a=99"]}, "from -10 to 10"),
    ({"labels": [Label(1), Label(2)]}, "1 request and 2 labels"),
    ({"output": Output(("a.png", "b.png"))}, "1 request and 2 output paths"),
    ({"family": ["flux"]}, "family must be text"), ({"store": None}, "store must be text"),
    ({"store": b"x"}, "store must be text"), ({"revision": 3}, "revision must be text"),
    ({"modulation_table": "no"}, "modulation_table must be bool"), ({"peer_copies": None}, "peer_copies must be bool"),
    ({"labels": ["a"]}, "labels must be Label"), ({"origin": "x"}, "origin must be Origin"),
    ({"policy": None}, "policy must be RunPolicy"), ({"policy": {}}, "policy must be RunPolicy"),
    ({"output": None}, "output must be Output"), ({"run": "../x"}, "no name of a run"),
    ({"run": 3}, "run must be text"), ({"run": "x" * 300}, "no name of a run"),
    ({"run": "last"}, "no name of a run"), ({"run": "-x"}, "no name of a run"),
    ({"model": "/x\udcff"}, "model is not valid UTF-8"), ({"max_memory": 0}, "no memory at all"),
    ({"max_memory": {"0": 0}}, "no memory at all"), ({"max_memory": 1.5}, "max_memory is '1.5' -> bytes as a"),
    ({"requests": [replace(FOX, index=3), replace(FOX, index=3)]}, "two of the requests have the index 3"),
    ({"dtype": ["vae=float32", "vae=bfloat16"]}, "type of a component twice"), ({"lanes": "many"}, "lanes must be"),
    ({"requests": [replace(FOX, text_tokens=513)]}, "512"),
])
def test_what_cannot_be_is_refused_by_its_name(change: dict[str, Any], says: str | None) -> None:
    fields: dict[str, Any] = {"family": "flux", "requests": [FOX], **change}
    if says is None:
        assert Job(**fields)
        return
    with pytest.raises(InvalidInput, match=says):
        Job(**fields)


@pytest.mark.parametrize(("change", "says"), [
    ({"stop_after": "lunch"}, "stop_after is 'lunch' -> choose from None, encode, denoise, decode"),
    ({"from_stage": "lunch"}, "from_stage is 'lunch'"), ({"step_every": float("nan")}, "step_every must be seconds"),
    ({"step_every": -1}, "step_every must be seconds"), ({"step_every": "x"}, "step_every must be seconds"),
    ({"preview": "2"}, "preview must be a whole number"), ({"preview": -1}, "preview must be"),
    ({"strict": 1}, "strict must be bool"), ({"degrade": None}, "degrade must be bool"),
    ({"stop_after": "encode", "from_stage": "decode"}, "from_stage='decode' comes after stop_after='encode'"),
])
def test_a_policy_that_cannot_be_is_refused_by_its_name(change: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        RunPolicy(**change)


@pytest.mark.parametrize(("change", "says"), [
    ({"paths": "x.png"}, "paths is .*x.png.* -> give a list"), ({"paths": [3]}, "paths must be text"),
    ({"paths": ["/x\udcff.png"]}, "not valid UTF-8"), ({"overwrite": "yes"}, "overwrite must be bool"),
    ({"folder": 3}, "folder must be text"),
])
def test_an_output_that_cannot_be_is_refused_by_its_name(change: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        Output(**change)


def test_what_python_gives_is_kept_in_one_form() -> None:
    assert Output(["x.png"]) == Output((Path("x.png"),)) == Output(("x.png",))  # type: ignore[arg-type]
    assert Job("flux", [FOX, FOX]).requests == (FOX, replace(FOX, index=1))
    assert Job("flux", [FOX], dtype="vae=float32").dtype == {"vae": "float32"}
    assert Job("flux", [FOX], dtype=["bfloat16", "vae=float32"]).dtype == {"": "bfloat16", "vae": "float32"}
    assert Job("flux", [FOX], devices="0,1").devices == ("0", "1") and Job("flux", [FOX], lanes="2").lanes == 2
    assert Job("flux", [FOX], loras="a.safetensors=0.5").loras == (LoraRequest("a.safetensors", 0.5),)
    assert Job("flux", [FOX], place=["denoise=auto", "decode=0"]).place == (PlaceRequest("decode", "0"),)
    # As in accelerate, a number is bytes.
    limits = MemoryLimits.read(f"0={14 * 2**30}B,cpu=24GiB")
    assert Job("flux", [FOX], max_memory={0: 14 * 2**30, "cpu": "24GiB"}).max_memory == limits
    assert limits.by_device["0"].amount == 14 * 2**30 and len({Job("flux", [FOX]), Job("flux", [FOX])}) == 1
    assert replace(FOX, guidance=3.0, negative_prompt="").negative_prompt is None


@pytest.mark.parametrize("document", [
    [1], None, "x", {"version": 2, 3: 1, "foo": 2}, {"version": True}, {"version": 2.0}, {"version": 2, "model": b"x"},
])
def test_what_is_no_document_of_a_job_is_refused(document: Any) -> None:
    with pytest.raises(InvalidInput):
        Job.from_json(document)


@pytest.mark.parametrize(("change", "says"), [
    ({"foo": 1}, "foo: no field"), ({"policy": {"foo": 1}}, "policy.foo: no field"),
    ({"requests": [{**FOX.__dict__, "foo": 1}]}, "requests.0.foo: no field"),
    ({"policy": {"step_every": float("nan")}}, "step_every"), ({"policy": {"preview": -3}}, "preview"),
    ({"max_memory": {"by_device": {"": {"text": "1GiB", "kind": "bytes", "amount": -5.0}}}}, "'1GiB' is not -5"),
])
def test_nothing_in_a_document_is_passed_over(change: dict[str, Any], says: str) -> None:
    document = Job("flux", [FOX]).to_json()
    with pytest.raises(InvalidInput, match=says):
        Job.from_json({**document, **change})


def test_a_part_of_a_job_keeps_what_belongs_to_its_requests() -> None:
    requests = [replace(FOX, index=index) for index in (4, 5, 6)]
    job = Job("flux", requests, output=Output(("4.png", "5.png", "6.png")), labels=[Label(1), Label(2), Label(3)])
    some = job.only([0, 2])
    assert [one.index for one in some.requests] == [4, 6] and some.output.paths == ("4.png", "6.png")
    assert [label.line for label in some.labels] == [1, 3] and some.positions == {4: 0, 6: 1}
    left = job.without({5: "too large"})
    assert left.refused == (RefusedLine(2, "too large"),) and left.listed and left.requests == some.requests
    with pytest.raises(InvalidInput, match="no line is left: too large"):
        job.without(dict.fromkeys((4, 5, 6), "too large"))


def test_a_job_for_another_folder_has_whole_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    job = Job("flux", [FOX], model="model", store="store", output=Output(("x.png",)), loras=["user/repo"]).absolute()
    assert (job.model, job.store) == (f"{tmp_path}/model", f"{tmp_path}/store")
    assert job.output.paths == (f"{tmp_path}/x.png",)
    assert job.loras[0].source == "user/repo"
    assert Job("flux", [FOX], model="user/repo", store="s3://a/b").absolute().store == "s3://a/b"


def test_no_option_of_the_command_line_is_lost() -> None:
    """Each is a field of the job or its policy, or of how a picture is asked for, or of what is said meanwhile."""
    there = {field.name for kind in (Job, RunPolicy, Output, Request) for field in fields(kind)}
    known = {"device": "devices", "gpus": "devices", "no_p2p": "peer_copies", "lora": "loras", "artifacts": "store",
             "no_modulation_table": "modulation_table", "no_degrade": "degrade", "size": "width", "count": "requests",
             "prompt_file": "requests", "like": "origin", "out": "paths", "no_metadata": "metadata",
             "words": "prompt", "prompts": "prompt"}
    # Who does the job, and what is said of it.
    beside = {"ctx", "engine", "ranks", "rank_timeout", "json", "log", "quiet", "verbose", "print_config"}
    options = {field.name for field in fields(FamilyOptions)} - beside
    assert {known.get(name, name) for name in options} <= there


def test_a_run_goes_by_the_policy_that_it_is_given_or_its_job_s(flux: Path) -> None:
    job = Job("flux", [FOX], model=flux, devices=["cpu"], policy=RunPolicy(stop_after="encode"), run="mine")
    plan, store = make_plan(job), MemoryStore(warn=print)
    report = run_all(plan, store=store)
    assert [stage.stage for stage in report.stages] == ["encode"] and report.run == "mine" and not report.pictures
    assert Job.from_json(store.load_run("mine")["job"]).policy == job.policy
    whole = run_all(plan, RunPolicy(), store=store)
    assert [stage.ran for stage in whole.stages] == [0, 1, 1] and len(whole.pictures) == 1
    assert whole.job.policy == RunPolicy() and plan.job.policy == job.policy
