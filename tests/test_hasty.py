"""What a hasty user types in Python: it works, or is refused in one line with the next step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import stagerun
from runner import Job, Plan, Report, Request, RunPolicy, make_plan, run_all, run_on_ray, run_stage, spawn
from runner.artifacts import MemoryStore, open_store
from stages.errors import StagerunError
from stages.state import State

STAR = Request("a small green star in the center on a white background", 64, 64, 1, seed=3)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan("demo", STAR, devices="cpu")


@pytest.fixture(scope="module")
def report(plan: Plan) -> Report:
    return run_all(plan)


def test_a_prompt_is_a_request_and_the_family_says_the_rest() -> None:
    assert Request("a fox").width is None and Request("a fox") == Request("a fox", None, None, guidance=None)
    job = Job("sd3", Request("a fox", seed=7, height=512))
    assert job.requests == (Request("a fox", 1024, 512, 28, 3.5, 7, 256),) == Job("sd3", job.requests).requests
    for asked in ("a star", ["a star"], Request("a star"), [Request("a star")], {"prompt": "a star"},
                  iter([{"prompt": "a star", "steps": 16}])):
        (request,) = Job("demo", asked).requests
        assert (request.prompt, request.width, request.steps, request.text_tokens) == ("a star", 128, 16, 32)
    first, second, third = Job("flux", ["a", "b", Request("c", seed=1)]).requests
    assert second.seed == first.seed + 1 and third.seed == 1 and [first.index, third.index] == [0, 2]
    assert Job("flux", "a").requests[0].seed != Job("flux", "a").requests[0].seed
    # As the record of a run has it, which is to lead to the same artifacts.
    assert repr(Request("a", guidance=3).guidance) == "3.0"


def test_a_plan_is_made_of_what_a_job_is_made_of(plan: Plan) -> None:
    assert plan.job == make_plan(Job("demo", [STAR], devices=["cpu"])).job
    made = make_plan("demo", "a star", devices="cpu", dtype={"": "bf16"}, place={"decode": "cpu"})
    assert made.job.dtype == {"": "bfloat16"} and str(made.job.place[0]) == "decode=cpu"
    assert made.requests[0].height == 128


def test_a_folder_is_a_store_wherever_one_is_taken(plan: Plan, tmp_path: Path) -> None:
    folder = tmp_path / "store"
    (embeddings,) = run_stage(plan, "encode", store=str(folder))
    (latents,) = run_stage(plan, "denoise", store=folder)
    report = run_all(plan, store=f"file://{folder}")
    assert [stage.ran for stage in report.stages] == [0, 0, 1] and "latents" in latents
    assert embeddings["prompt_embeds"].shape == (1, 32, 192)
    assert repr(open_store(folder)) == f"FolderStore('{folder}')" and open_store(store := MemoryStore()) is store
    assert stagerun.Memory(folder, report.run).run == stagerun.Charts(str(folder), "last").run == report.run
    assert repr(store) == "MemoryStore(0 artifacts in memory, 0 B)"
    # Without one, a first stage needs none, and a later one says what is missing.
    assert torch.equal(run_stage(plan, "encode")[0]["prompt_embeds"], embeddings["prompt_embeds"])


def test_a_type_may_be_said_in_any_way(plan: Plan) -> None:
    kinds: list[Any] = ["float32", "fp32", torch.float32, {"": "float32"}, ["float32"], {"": torch.float32}]
    assert all(Job("demo", STAR, dtype=kind).dtype == {"": "float32"} for kind in kinds)
    assert run_all(make_plan("demo", STAR, devices="cpu", dtype={"": "bfloat16"})).pictures


Typed = Callable[[Plan, Report], Any]
JOB = Job("demo", STAR)
REFUSED: list[tuple[Typed, str]] = [
    (lambda plan, report: make_plan(Request("a")), "a Request is no job -> make_plan"),
    (lambda plan, report: make_plan("demo", []), "requests are none -> say what to draw"),
    (lambda plan, report: make_plan("demo"), "requests are none -> say what to draw"),
    (lambda plan, report: make_plan([]), "a list is no job"),
    (lambda plan, report: make_plan(plan), "a Plan is no job"),
    (lambda plan, report: make_plan("flx", "a"), r"no family 'flx' -> did you mean flux\? choose from flux, "),
    (lambda plan, report: make_plan("demo", None), "requests is 'None' -> give a list"),
    (lambda plan, report: make_plan("demo", "a", dtyp="x"), r"'dtyp' -> did you mean dtype=\? it takes model, "),
    (lambda plan, report: make_plan("demo", "a", steps=3), "a request says it: Request"),
    (lambda plan, report: make_plan("demo", "a", machine=2), "an int is no machine -> such as machine="),
    (lambda plan, report: make_plan(JOB, "a"), "a Job says all of it, and requests stands beside it"),
    (lambda plan, report: make_plan(JOB, lanes=2), "a Job says all of it, and lanes stands beside it"),
    (lambda plan, report: Job("demo", ""), "empty prompt -> say what to draw"),
    (lambda plan, report: Job("demo", [["a"]]), "requests has .*a.* -> a prompt, or Request"),
    (lambda plan, report: Job("demo", {"promt": "a"}), "a request has no 'promt' -> did you mean prompt"),
    (lambda plan, report: Job("demo", Request("a", guidance=3.5)), "demo takes no guidance -> leave guidance out"),
    (lambda plan, report: Job("z-image", Request("a", guidance=3.5)), "z-image takes no guidance"),
    (lambda plan, report: Job("flux", Request("a", negative_prompt="b")), "flux reads no negative prompt"),
    (lambda plan, report: Job("sd3", Request("a", negative_prompt="b", guidance=1)), "guidance is 1.0 -> guid"),
    (lambda plan, report: Job("sd3", Request("a", text_tokens=999)), "the text encoder of sd3 takes at most 512"),
    (lambda plan, report: Job("flux", Request("a", width=16384)), "16384x1024 is .* the limit is"),
    (lambda plan, report: Job("demo", "a", dtype="float23"), "dtype 'float23': choose one of float32"),
    (lambda plan, report: Job("demo", "a", place="sharded"), "place 'sharded': write STAGE=WHERE"),
    (lambda plan, report: Job("demo", "a", place={"denoiser": "sharded"}), "there is no stage 'denoiser'"),
    (lambda plan, report: Job("demo", "a", max_memory="lots"), "is no amount of memory"),
    (lambda plan, report: Job("demo", "a", allow_offload="gpu"), "allow_offload is 'gpu' -> choose from None"),
    (lambda plan, report: run_stage(JOB, "encoder"), r"'encoder' -> did you mean encode\? choose from encode"),
    (lambda plan, report: run_stage(plan, "decoder"), r"'decoder' -> did you mean decode\? choose from encode"),
    (lambda plan, report: run_stage(plan, "vae"), "'vae' -> choose from encode, denoise, decode"),
    (lambda plan, report: run_stage(JOB, "encode"), "a Job is no plan -> make_plan"),
    (lambda plan, report: run_stage(plan, "denoise"), "denoise needs the artifacts of encode: run that stage first"),
    (lambda plan, report: run_stage(plan, "denoise", states=5), "states must be a list of states"),
    (lambda plan, report: run_stage(plan, "denoise", states=State()), "states must be a list of states"),
    (lambda plan, report: run_stage(plan, "encode", emit=None), r"emit is None -> a function of \(kind, data\)"),
    (lambda plan, report: run_all(JOB), "a Job is no plan -> make_plan"),
    (lambda plan, report: run_all(plan, done=5), r"done is an int -> a function of \(picture\)"),
    (lambda plan, report: run_all(plan, RunPolicy(stop_after="decoder")), "stop_after is 'decoder' -> choose from"),
    (lambda plan, report: run_all(plan, "decode"), "policy must be RunPolicy"),
    (lambda plan, report: run_all(plan, store=5), "store is an int -> a folder, a URL"),
    (lambda plan, report: run_all(plan, store=""), "store is empty -> a folder, a URL"),
    (lambda plan, report: run_all(plan, store="/no/such/folder/store"), "/no/such/folder does not exist, make it"),
    (lambda plan, report: open_store(None), "store is None -> a folder, a URL"),
    (lambda plan, report: report.pictures[0].save(5), "an int is no path of a picture"),
    (lambda plan, report: report.pictures[0].save("star.bmp"), "path 'star.bmp' must end in .png"),
    (lambda plan, report: State({"latents": None})["latent"], "the state has no 'latent' -> did you mean latents"),
    (lambda plan, report: State({"a": 1}).__setitem__("a", 2), r"stays as it is -> states\[0\] = .*changed\(a=...\)"),
    (lambda plan, report: spawn(plan), "a Plan is no job -> Job"),
    (lambda plan, report: run_on_ray("demo"), "a str is no job -> Job"),
    (lambda plan, report: stagerun.Memory("/no/such/store", "last"), "there is no artifact store"),
    (lambda plan, report: stagerun.Pipeline("demo").to("cuda"), "a pipeline has no to -> leave it out: the plan"),
    (lambda plan, report: stagerun.Pipeline("demo").enable_sequential_cpu_offload(), "allow_offload=.* of the pipel"),
    (lambda plan, report: Request(), r"Request lacks prompt -> it takes prompt, width, height, steps, "),
    (lambda plan, report: Request("a", stps=3), r"Request takes no 'stps' -> did you mean steps=\? it takes prompt, "),
    (lambda plan, report: Request("a", guidance_scale=3), r"'guidance_scale' -> did you mean guidance=\? it takes"),
    (lambda plan, report: Job("demo", "a", max_memry="1GiB"), r"Job takes no 'max_memry' -> did you mean max_memory="),
    (lambda plan, report: Job(), "Job lacks family -> it takes family, requests"),
    (lambda plan, report: RunPolicy(stop="encode"), "RunPolicy takes no 'stop' -> it takes stop_after, from_s"),
    (lambda plan, report: run_all(plan, progress=True), r"run_all\(\) takes no 'progress' -> it takes plan, policy"),
    (lambda plan, report: run_all(), r"run_all\(\) lacks plan -> it takes plan, policy"),
    (lambda plan, report: run_stage(plan), r"run_stage\(\) lacks stage -> it takes plan, stage, store"),
    (lambda plan, report: run_stage(plan, "encode", "store"), r"run_stage\(\) has 3 values without a name -> it takes "
     "plan, stage; by their names store=, emit="),
    (lambda plan, report: run_stage(plan, "encode", plan=plan), r"run_stage\(\) has plan twice -> leave one"),
    (lambda plan, report: spawn(JOB, rank=2), r"spawn\(\) takes no 'rank' -> did you mean ranks=\? it takes job"),
    (lambda plan, report: open_store("memory", read_only=True), r"'read_only' -> did you mean readonly="),
    (lambda plan, report: report.pictures[0].save("a.png", force=True), r"save\(\) takes no 'force' -> it takes path"),
    (lambda plan, report: stagerun.gather(3), "an int cannot be split or gathered -> a list, a tuple, a tensor or a"),
    (lambda plan, report: stagerun.split_between_ranks({"a": [1], "b": []}).__enter__(), "must be equally long: .*->"),
    (lambda plan, report: stagerun.Memory("store"), "Memory lacks run -> it takes store, run"),
    (lambda plan, report: run_all(plan, emit=lambda: None), r"emit cannot be called with \(kind, data\) -> def emit"),
    (lambda plan, report: run_all(plan, done=lambda a, b: None), r"done cannot be called with \(picture\) -> def"),
    (lambda plan, report: Request("a", width=4000, height=4000), "-> width=2048, height=2048"),
    (lambda plan, report: report.pictures[0].save(__file__), "must end in .png, .webp, .jpg or .jpeg$"),
    (lambda plan, report: Job("demo", "a", devices=[None]), "devices has 'None' -> such as"),
    (lambda plan, report: Job("demo", "a", place={"denoise": None}), "place of 'denoise' is 'None' -> such as"),
    (lambda plan, report: Job("demo", "a", max_memory={"cpu": None}), "max_memory of cpu is None -> leave cpu out wh"),
    (lambda plan, report: Job("demo", "a", max_memory={"gpu": "1GiB"}), "max_memory names the device 'gpu' -> a card"),
    (lambda plan, report: Job("demo", "a", max_memory=-1), "max_memory is '-1' -> bytes as a whole number from 1 on"),
    (lambda plan, report: Job("demo", "a", max_memory={0: 1.5}), "max_memory of 0 is '1.5' -> bytes as a whole"),
    (lambda plan, report: stagerun.Pipeline("demo").load_lora_weights("x"), "loras=.* of the pipeline"),
]


@pytest.mark.parametrize(("typed", "says"), REFUSED, ids=[says[:40] for _, says in REFUSED])
def test_a_mistake_is_a_line_that_says_what_to_do(typed: Typed, says: str, plan: Plan, report: Report) -> None:
    with pytest.raises(StagerunError, match=says) as caught:
        typed(plan, report)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
