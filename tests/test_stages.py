"""Staged equals monolithic, bit for bit, and nothing is left behind."""

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, ModularPipeline

from runner import Job, Request, RunPolicy, make_plan, run_all, run_stage
from runner.artifacts import FolderStore, MemoryStore
from stages.errors import BadResult, ModelError
from stages.pipeline.split import split
from stages.placement.placement import Place, Resident
from stages.state import State

STEPS, TOKENS = 3, 32
SMALL = {"width": 64, "height": 64, "num_inference_steps": 3, "seed": 1}


def request(prompt: str = "a red circle", seed: int = 7, size: tuple[int, int] = (64, 48), **more: Any) -> Request:
    return Request(prompt, *size, **({"steps": STEPS, "guidance": 3.5, "seed": seed, "text_tokens": TOKENS} | more))


def whole(flux: Path, dtype: torch.dtype, asked: Request) -> np.ndarray:
    """The unsplit modular pipeline's picture, uint8 [height, width, 3]."""
    pipe = ModularPipeline.from_pretrained(str(flux))
    pipe.load_components(dtype=dtype)
    images = pipe(
        prompt=asked.prompt, width=asked.width, height=asked.height, num_inference_steps=asked.steps,
        guidance_scale=asked.guidance, max_sequence_length=asked.text_tokens,
        generator=torch.Generator("cpu").manual_seed(asked.seed), output="images",
    )
    return np.asarray(images[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["memory", "folder"])
def test_staged_equals_the_unsplit_modular_pipeline(
    flux: Path, tmp_path: Path, dtype: torch.dtype, kind: str
) -> None:
    job = make_plan(Job("flux", [request()], model=flux, dtype={"": dtype}))
    store = MemoryStore(warn=print) if kind == "memory" else FolderStore(tmp_path / "store", warn=print)
    fresh = run_all(job, store=store)
    assert np.array_equal(fresh.pictures[0].pixels, whole(flux, dtype, job.requests[0]))
    again = run_all(job, store=store)
    assert [stage.ran for stage in again.stages] == [0, 0, 0]
    assert np.array_equal(again.pictures[0].pixels, fresh.pictures[0].pixels)
    decoded = run_all(job, RunPolicy(from_stage="decode"), store=store)
    assert [stage.ran for stage in decoded.stages] == [0, 0, 1]
    assert np.array_equal(decoded.pictures[0].pixels, fresh.pictures[0].pixels)


def test_staged_equals_the_classic_pipeline_in_float32(flux: Path) -> None:
    """Only in float32: in bfloat16 the classic pipeline rounds the timestep before dividing, the modular does not."""
    asked = request(seed=3)
    pipe = FluxPipeline.from_pretrained(flux, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        asked.prompt, width=asked.width, height=asked.height, num_inference_steps=asked.steps,
        guidance_scale=asked.guidance, max_sequence_length=asked.text_tokens,
        generator=torch.Generator("cpu").manual_seed(asked.seed),
    ).images
    assert np.array_equal(run_all(make_plan(Job("flux", [asked],
                                                model=flux))).pictures[0].pixels, np.asarray(images[0]))


def test_each_stage_loads_only_its_own_components(flux: Path) -> None:
    loaded: dict[str, list[str]] = {}

    def emit(kind: str, data: Any) -> None:
        if kind == "load":
            loaded.setdefault(data["stage"], []).append(data["component"])

    run_all(make_plan(Job("flux", [request()], model=flux)), emit=emit)
    assert loaded == {"encode": ["text_encoder", "text_encoder_2"], "denoise": ["transformer"], "decode": ["vae"]}


def test_only_what_later_stages_read_crosses_a_border(flux: Path) -> None:
    job, store = make_plan(Job("flux", [request()], model=flux)), MemoryStore(warn=print)
    (encoded,) = run_stage(job, "encode", store=store)
    assert set(encoded.values) == {"prompt_embeds", "pooled_prompt_embeds"}
    (denoised,) = run_stage(job, "denoise", store=store)
    assert set(denoised.values) == {"latents"}
    (decoded,) = run_stage(job, "decode", store=store)
    assert set(decoded.values) == {"pixels"}
    assert all(tensor.device.type == "cpu" for state in (encoded, denoised) for tensor in state.tensors().values())


def test_a_stage_alone_needs_the_one_before(flux: Path) -> None:
    with pytest.raises(ValueError, match="denoise needs the artifacts of encode"):
        run_stage(make_plan(Job("flux", [request()], model=flux)), "denoise", store=MemoryStore(warn=print))


def test_other_steps_reuse_the_embeddings(flux: Path) -> None:
    store = MemoryStore(warn=print)
    run_all(make_plan(Job("flux", [request()], model=flux)), store=store)
    report = run_all(make_plan(Job("flux", [request(steps=2)], model=flux)), store=store)
    assert [stage.ran for stage in report.stages] == [0, 1, 1]


def test_one_prompt_many_seeds_is_encoded_once(flux: Path) -> None:
    seen: list[str] = []
    requests = [request(seed=seed, index=seed) for seed in range(3)]

    def emit(kind: str, data: Any) -> None:
        seen.append(f"{kind} {data.get('stage')}")

    report = run_all(make_plan(Job("flux", requests, model=flux)), emit=emit)
    assert seen.count("item encode") == 1 and seen.count("item denoise") == 3
    pictures = [picture.pixels for picture in report.pictures]
    assert not np.array_equal(pictures[0], pictures[1])


def test_noise_does_not_depend_on_the_other_pictures_of_a_run(flux: Path) -> None:
    together = run_all(make_plan(Job("flux", [request(seed=1), request(seed=2, index=1)], model=flux))).pictures[1]
    alone = run_all(make_plan(Job("flux", [request(seed=2)], model=flux))).pictures[0]
    assert np.array_equal(together.pixels, alone.pixels)


def test_another_guidance_makes_another_picture(flux: Path) -> None:
    jobs = [make_plan(Job("flux", [request(guidance=guidance)], model=flux)) for guidance in (1.0, 9.0)]
    first, second = (run_all(job).pictures[0].pixels for job in jobs)
    assert not np.array_equal(first, second)


def test_a_stage_gives_up_its_models_also_after_an_exception(flux: Path) -> None:
    job = make_plan(Job("flux", [request()], model=flux))
    for stage in job.stages:
        models = []
        with pytest.raises(ZeroDivisionError), stage.loaded(job.places_of(stage.name)) as loaded:
            models += [weakref.ref(getattr(loaded.pipe, component.name)) for component in stage.components]
            assert all(model() is not None for model in models)
            raise ZeroDivisionError
        gc.collect()
        assert [model() for model in models] == [None] * len(models)
        assert loaded.leftovers() == []


def test_an_exception_inside_the_pipeline_frees_the_model(flux: Path) -> None:
    """The frames of a kept traceback would hold the transformer, as they do in a notebook."""
    job, store = make_plan(Job("flux", [request()], model=flux, modulation_table=False)), MemoryStore(warn=print)
    models: list[Any] = []
    (state,) = run_stage(job, "encode", store=store)
    embeds = state.tensors()["prompt_embeds"][..., :-1]
    with pytest.raises(RuntimeError) as kept, job.stages[1].loaded(job.places_of("denoise")) as loaded:
        models.append(weakref.ref(loaded.pipe.transformer))
        loaded.run(State({**state.values, "prompt_embeds": embeds}, state.tags), SMALL)
    gc.collect()
    assert kept.value is not None and models[0]() is None


def test_a_non_finite_embedding_stops_the_run_by_name(flux: Path) -> None:
    job, store = make_plan(Job("flux", [request()], model=flux, modulation_table=False)), MemoryStore(warn=print)
    (state,) = run_stage(job, "encode", store=store)
    poisoned = state.tensors()["prompt_embeds"].clone()
    poisoned[0, 0, 0] = float("nan")
    loading = job.stages[1].loaded(job.places_of("denoise"))
    with loading as loaded, pytest.raises(BadResult, match=r"not finite after step 1\b"):
        loaded.run(State({**state.values, "prompt_embeds": poisoned}, state.tags), SMALL)


def test_a_constant_picture_is_refused(flux: Path) -> None:
    job, store = make_plan(Job("flux", [request()], model=flux)), MemoryStore(warn=print)
    run_stage(job, "encode", store=store)
    (state,) = run_stage(job, "denoise", store=store)
    with job.stages[2].loaded(job.places_of("decode")) as loaded, pytest.raises(BadResult, match="every pixel"):
        for parameter in loaded.pipe.vae.parameters():
            parameter.data.zero_()
        loaded.run(state, {"width": 64, "height": 48})


def test_an_input_that_no_stage_reads_is_refused(flux: Path) -> None:
    job = make_plan(Job("flux", [request()], model=flux))
    with pytest.raises(ValueError, match="no use for eta"):
        split(job.checkpoint, ["prompt", "eta"])


def test_a_missing_tensor_is_not_replaced_by_noise(tmp_path: Path) -> None:
    """transformers loads a T5 with missing weights and a warning; a picture made with it would be wrong."""
    from safetensors.torch import load_file, save_file

    from stages.loading.load import load
    from tests.tiny import flux

    model = flux(tmp_path / "flux")
    job = make_plan(Job("flux", [request()], model=model))
    file = model / "text_encoder_2" / "model.safetensors"
    tensors = load_file(file)
    del tensors["encoder.block.1.layer.1.DenseReluDense.wo.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="not in the files"):
        load(job.checkpoint.components["text_encoder_2"], Place(Resident("cpu"), torch.float32))


def test_the_end_of_a_prompt_that_no_encoder_sees_is_told(flux: Path) -> None:
    told: list[str] = []

    def emit(kind: str, data: Any) -> None:
        if kind == "warning":
            told.append(str(data["text"]))

    store = MemoryStore(warn=print)
    long = "a red circle " * 40 + "and a small zebra"
    run_all(make_plan(Job("flux", [request()], model=flux)), RunPolicy(stop_after="encode"), store=store, emit=emit)
    assert told == []
    report = run_all(make_plan(Job("flux", [request(long)],
                                   model=flux)), RunPolicy(stop_after="encode"), store=store, emit=emit)
    (text,) = told
    assert "zebra" in text and store.load_run(report.run)["warnings"] == [text]
