"""What we lean on in diffusers, fact by fact: how it behaves, and that our guard holds.

An upgrade that changes one of these facts fails here, by name. The numbers are those of the design's list.
"""

import importlib.util
import inspect
import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers import ModularPipeline
from diffusers.hooks import tensor_parallel
from diffusers.modular_pipelines.helios import encoders as helios_encoders
from diffusers.modular_pipelines.modular_pipeline import (
    MODULAR_PIPELINE_MAPPING,
    ModularPipelineBlocks,
    PipelineState,
    SequentialPipelineBlocks,
)
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam
from diffusers.modular_pipelines.wan import encoders as wan_encoders
from diffusers.pipelines.auto_pipeline import SUPPORTED_TASKS_MAPPINGS, _get_model
from transformers.utils import import_utils

from runner import Job, Request, make_plan
from runner.artifacts import FolderStore, MemoryStore, key_of
from runner.engine.keys import artifact_keys
from stages.errors import BadResult, ModelError
from stages.families import FAMILIES
from stages.library_remarks import REMARKS
from stages.models.checkpoint import find
from stages.pipeline.split import _chosen, _groups, require, split
from stages.pipeline.stage import Stage
from stages.placement.placement import Place, Resident
from stages.state import State, Value
from tests import tiny_families as tiny
from tests.staging import on_host, run_staged, run_whole

TAG = "denoiser_input_fields"
INPUTS: dict[str, Value] = {
    "prompt": "a red circle", "width": 64, "height": 48, "num_inference_steps": 2, "max_sequence_length": 32,
    "seed": 7,
}


@pytest.fixture(scope="module")
def z_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.z_image(tmp_path_factory.mktemp("z-image") / "model")


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.sd3(tmp_path_factory.mktemp("sd3") / "model")


def stages_of(model: Path) -> tuple[Stage, Stage, Stage]:
    return split(find(model), list(INPUTS))


def encoded(stages: Sequence[Stage], inputs: dict[str, Value] = INPUTS) -> State:
    """The artifact of encode."""
    with stages[0].loaded(on_host(stages)) as loaded:
        return loaded.run(State(), inputs)


def test_1_a_component_that_fails_to_load_is_none_and_no_exception(flux: Path, tmp_path: Path) -> None:
    model = shutil.copytree(flux, tmp_path / "flux")
    stages = stages_of(model)
    (model / "scheduler" / "scheduler_config.json").write_text("{")
    pipe = ModularPipeline.from_pretrained(str(model))
    pipe.load_components(names=["scheduler"])
    assert pipe.scheduler is None
    with pytest.raises(ModelError, match=r"scheduler_config\.json is not valid JSON"):
        stages[1].loaded(on_host(stages)).__enter__()


def test_2_a_dict_is_read_as_one_value_per_component_and_a_value_reaches_tokenizers(flux: Path) -> None:
    pipe = ModularPipeline.from_pretrained(str(flux))
    pipe.load_components(names=["transformer"], device_map={"": "no such device"})
    assert pipe.transformer.device.type == "cpu"
    pipe.load_components(names=["tokenizer"], device_map="cpu")
    assert pipe.tokenizer.init_kwargs["device_map"] == "cpu"
    stages = stages_of(flux)
    with stages[0].loaded(on_host(stages)) as loaded:
        for tokenizer in (loaded.pipe.tokenizer, loaded.pipe.tokenizer_2):
            assert not {"device_map", "dtype", "torch_dtype"} & set(tokenizer.init_kwargs)


@pytest.mark.parametrize("levels", [1, 2])
def test_3_geometry_falls_back_to_constants_without_a_vae(levels: int, tmp_path: Path) -> None:
    model = tiny.z_image(tmp_path / "model", levels=levels)
    inputs = INPUTS | {"width": 16, "height": 32}
    stages = stages_of(model)
    assert stages[1].blocks.init_pipeline(str(model)).vae_scale_factor == 8
    assert stages[1].scale_factor == 2 ** (levels - 1)
    pixels, _ = run_whole(model, inputs)
    assert torch.equal(run_staged(model, [inputs])["decode"][0].tensors()["pixels"], pixels)
    small = State({"latents": torch.randn(1, 4, 4, 2)})
    with stages[2].loaded(on_host(stages)) as loaded, pytest.raises(BadResult, match="asked for 16x32"):
        loaded.run(small, inputs)


class Collects(ModularPipelineBlocks):
    """A pipeline block that reads every value with the tag, as several denoise loops do."""

    model_name = "test"

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Collects":
        return self

    @property
    def inputs(self) -> list[InputParam]:
        return [InputParam(kwargs_type=TAG)]

    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        self.names = {name for name, value in state.get_by_kwargs(TAG).items() if value is not None}
        return components, state


def test_4_a_value_that_is_passed_by_name_loses_its_tag(z_image: Path, tmp_path: Path) -> None:
    block = Collects()
    named = SequentialPipelineBlocks.from_blocks_dict({"named": Named(), "collects": block}).init_pipeline()
    named(prompt_embeds=1)
    assert block.names == set()
    named(state=PipelineState({"prompt_embeds": 1}, {TAG: ["prompt_embeds"]}))
    assert block.names == {"prompt_embeds"}

    stages = stages_of(z_image)
    inputs = INPUTS | {"guidance_scale": 4.0}
    state = encoded(stages, inputs)
    key = key_of({"test": 4})
    for store in (MemoryStore(warn=print), FolderStore(tmp_path / "store", warn=print)):
        store.put(key, "encode", state, {})
        stored = store.get(key)
        assert stored is not None and stored.tags == {TAG: ("prompt_embeds", "negative_prompt_embeds")}
    # Not at 0: the first block chooses the class of the pipeline, and with it the geometry.
    stages[1].blocks.sub_blocks.insert("collects", block, 1)
    with stages[1].loaded(on_host(stages)) as loaded:
        loaded.run(stored, inputs)
    assert block.names == {"prompt_embeds", "negative_prompt_embeds"}


class Named(ModularPipelineBlocks):
    """A pipeline block that reads one value by its name."""

    model_name = "test"

    @property
    def inputs(self) -> list[InputParam]:
        return [InputParam("prompt_embeds")]

    def __call__(self, components: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        return components, state


def test_4_some_values_reach_the_denoiser_by_their_tag_alone() -> None:
    by_tag = {}
    for family, choose in MODULAR_PIPELINE_MAPPING.items():
        groups = _groups(getattr(diffusers, choose())().blocks, list(INPUTS))
        read = groups["denoise"].inputs
        names, tags = {param.name for param in read}, {param.kwargs_type for param in read if not param.name}
        outputs = groups["encode"].intermediate_outputs
        by_tag[family] = {output.name for output in outputs if output.kwargs_type in tags - {None}} - names
    assert {family: names for family, names in by_tag.items() if names} == {
        "wan-animate-2": {"encoder_hidden_states_image"},
        "wan-animate-2-distilled": {"encoder_hidden_states_image"},
        "wan-vace": {"control_hidden_states", "control_hidden_states_scale"},
    }


def test_5_blocks_do_not_cast_what_comes_in(flux: Path) -> None:
    stages = stages_of(flux)
    state = encoded(stages)
    assert state.tensors()["prompt_embeds"].dtype == torch.float32
    places = dict(on_host(stages)) | {"transformer": Place(Resident("cpu"), torch.bfloat16)}
    inputs = INPUTS | {"num_inference_steps": 1, "width": 16, "height": 16}
    with stages[1].loaded(places) as loaded:
        with pytest.raises(RuntimeError, match="must have the same dtype"):
            loaded.pipe(state=PipelineState(dict(state.values)), width=16, height=16, num_inference_steps=1)
        assert loaded.run(state, inputs).tensors()["latents"].dtype == torch.bfloat16


def test_6_guidance_is_a_component_that_families_ship_on_or_off(z_image: Path) -> None:
    shipped = {}
    for family, choose in MODULAR_PIPELINE_MAPPING.items():
        for spec in getattr(diffusers, choose())().blocks.expected_components:
            if spec.name == "guider":
                shipped[family] = spec.config.get("enabled", True)
    assert shipped["qwenimage"] and shipped["stable-diffusion-3"] and not shipped["z-image"]
    assert not {"flux", "flux2", "flux2-klein"} & set(shipped)

    stages = stages_of(z_image)
    with stages[0].loaded(on_host(stages)) as loaded:
        for scale, negative in ((None, False), (4.0, True), (1.0, False), (0.0, False), (2.0, True)):
            state = loaded.run(State(), INPUTS if scale is None else INPUTS | {"guidance_scale": scale})
            assert (state.values["negative_prompt_embeds"] is not None) == negative, scale
    assert "guidance_scale" in stages[0].inputs & stages[1].inputs


def test_6_stable_diffusion_3_guides_by_nothing_without_a_negative_prompt(sd3: Path) -> None:
    plain, kept = run_whole(sd3, INPUTS)
    guided, _ = run_whole(sd3, INPUTS | {"guidance_scale": 5.0})
    assert torch.equal(plain, guided) and "negative_prompt_embeds" not in kept["encode"].values
    ours = run_staged(sd3, [INPUTS, INPUTS | {"guidance_scale": 5.0}])["decode"]
    assert torch.equal(ours[0].tensors()["pixels"], plain)
    assert not torch.equal(ours[1].tensors()["pixels"], guided)


def test_7_a_pipeline_has_copies_of_its_blocks_and_takes_no_revision(flux: Path) -> None:
    assert "revision" not in inspect.signature(ModularPipelineBlocks.init_pipeline).parameters
    denoise = stages_of(flux)[1]
    copies = denoise.blocks.init_pipeline(str(flux)).blocks
    (loop,) = [name for name, block in denoise.blocks.sub_blocks.items() if "step_events" in block.sub_blocks]
    ours, theirs = (blocks.sub_blocks[loop].sub_blocks for blocks in (denoise.blocks, copies))
    assert list(ours) == list(theirs)
    assert not [name for name in ours if ours[name] is theirs[name]]
    assert ours["step_events"].hook is theirs["step_events"].hook is denoise.hook
    loops = [blocks.sub_blocks[loop] for blocks in (denoise.blocks, copies)]
    assert [one.loop_step.__self__ for one in loops] == loops and loops[0] is not loops[1]
    assert denoise.checkpoint.path == flux.resolve()


def test_8_there_is_no_callback_per_step(flux: Path) -> None:
    for choose in MODULAR_PIPELINE_MAPPING.values():
        names = getattr(diffusers, choose())().blocks.input_names
        assert not [name for name in names if name and "callback" in name]
    stages = stages_of(flux)
    told: list[Any] = []
    with stages[1].loaded(on_host(stages)) as loaded:
        state = encoded(stages)
        loaded.run(state, INPUTS | {"num_inference_steps": 3}, lambda kind, data: told.append((kind, dict(data))))
    steps = [(data["step"], data["steps"]) for kind, data in told if kind == "step"]
    assert steps == [(1, 3), (2, 3), (3, 3)]


def test_9_libraries_remark_on_what_no_stage_uses_and_on_what_is_done_on_purpose() -> None:
    """Which are left out in every process, and nothing else of these loggers."""
    for name, remark in REMARKS.items():
        module = import_module(name)
        assert module.logger.name == name and remark in inspect.getsource(module)
        made = [logging.LogRecord(name, logging.WARNING, "", 0, f"{said} more", None, None)
                for said in (remark, "other")]
        assert [bool(logging.getLogger(name).filter(record)) for record in made] == [False, True]


def test_9_every_level_of_blocks_logs_the_traceback(flux: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("diffusers.modular_pipelines.modular_pipeline")
    heard: list[logging.LogRecord] = []
    listener = logging.Handler()
    monkeypatch.setattr(listener, "emit", heard.append)
    stages = stages_of(flux)
    state = encoded(stages)
    broken = State({**state.values, "prompt_embeds": state.tensors()["prompt_embeds"][..., :-1]}, state.tags)
    logger.addHandler(listener)
    try:
        with stages[1].loaded(on_host(stages)) as loaded:
            with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
                loaded.run(broken, INPUTS)
            assert heard == []
            monkeypatch.setattr(logger, "filters", [])
            with pytest.raises(RuntimeError):
                loaded.run(broken, INPUTS)
    finally:
        logger.removeHandler(listener)
    # At the level of errors, so that diffusers' verbosity "error" would not hide them.
    assert [record.levelno for record in heard] == [logging.ERROR] * 3
    assert sum("Traceback" in record.getMessage() for record in heard) == 2


def test_10_the_layout_of_a_border_belongs_to_a_version(flux: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert diffusers.__version__.startswith("0.42.")
    assert set(encoded(stages_of(flux)).values) == {"prompt_embeds", "pooled_prompt_embeds"}
    asked = Request("a red circle", 64, 48, steps=2, guidance=3.5, seed=7, text_tokens=32)
    job = make_plan(Job("flux", [asked], model=flux))
    before = artifact_keys(job)
    monkeypatch.setattr(diffusers, "__version__", "0.43.0")
    after = artifact_keys(job)
    assert all(before[stage] != after[stage] for stage in ("encode", "denoise", "decode"))


@pytest.mark.parametrize("encoders", [wan_encoders, helios_encoders], ids=["wan", "helios"])
def test_11_an_optional_package_is_called_without_having_been_imported(
    encoders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(encoders, "ftfy", raising=False)
    with pytest.raises(NameError, match="ftfy"):
        encoders.basic_clean("text")


def test_11_packages_are_asked_for_before_anything_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    require(["json"])
    needy = replace(FAMILIES["flux"], requires=("no_such_package",), repo="nobody/nothing")
    monkeypatch.setitem(FAMILIES, "flux", needy)
    asked = Request("a red circle", 64, 48, steps=2, guidance=3.5, seed=7, text_tokens=32)
    with pytest.raises(ModelError, match="pip install no_such_package"):
        make_plan(Job("flux", [asked]))


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision is installed")
def test_11_the_processor_of_flux_2_asks_for_torchvision_even_to_read_text() -> None:
    from transformers import PixtralProcessor

    with pytest.raises(ImportError, match="Torchvision"):
        PixtralProcessor()
    assert FAMILIES["flux2"].requires == ("torchvision",)


def test_12_wan_forgets_its_negative_embeddings_without_guidance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.wan(tmp_path / "wan")
    monkeypatch.setattr(wan_encoders, "ftfy", SimpleNamespace(fix_text=str), raising=False)
    blocks = ModularPipeline.from_pretrained(str(model)).blocks
    pipe = _groups(blocks, ["prompt"])["encode"].init_pipeline(str(model))
    pipe.load_components()
    assert pipe(prompt="a red circle", max_sequence_length=8).get("negative_prompt_embeds") is not None
    pipe.update_components(guider=pipe.guider.new(enabled=False))
    with pytest.raises(UnboundLocalError, match="negative_prompt_embeds"):
        pipe(prompt="a red circle", max_sequence_length=8)
    with pytest.raises(ModelError, match="WanPipeline makes videos"):
        stages_of(model)


def test_13_tensor_parallelism_takes_the_card_with_the_ranks_number_and_refuses_a_cpu() -> None:
    assert "device = torch.device(device_type, rank % torch.accelerator.device_count())" in inspect.getsource(
        diffusers.ModelMixin._resolve_parallel_config)
    config = diffusers.TensorParallelConfig(tp_degree=2)
    config.setup(0, 2, torch.device("cpu"), mesh=SimpleNamespace(size=lambda: 2, device_type="cpu"))
    with pytest.raises(ValueError, match="not supported on device type 'cpu'"):
        tensor_parallel.apply_tensor_parallel(torch.nn.Linear(2, 2), config, {})
    assert {"cuda", "xpu"} <= set(tensor_parallel._SUPPORTED_TP_DEVICES)


def test_13_the_plans_of_tensor_parallelism_name_no_layer_that_the_table_replaces() -> None:
    cut = {cls for cls in vars(diffusers).values() if isinstance(cls, type) and getattr(cls, "_tp_plan", None)}
    known = {"FluxTransformer2DModel", "Flux2Transformer2DModel", "QwenImageTransformer2DModel"}
    assert known <= {cls.__name__ for cls in cut}
    names = [name for cls in cut for name in cls._tp_plan]
    assert names and not any("norm" in name or "mod" in name or "embed" in name for name in names)


def test_the_table_of_pipelines_names_them_as_from_pretrained_does() -> None:
    """It takes the long way, through all pipelines that there are; ours goes by names, and only where they agree."""
    names = {pipeline.__name__ for task in SUPPORTED_TASKS_MAPPINGS for pipeline in task.values()}
    found = 0
    for name in names:
        theirs = MODULAR_PIPELINE_MAPPING.get(_get_model(name))
        for index in ({}, {"is_distilled": True}, {"boundary_ratio": 0.9}, {"sample_sigmas": [1.0]}):
            chosen = _chosen(name, index)
            assert chosen is None or (theirs is not None and chosen == theirs(index)), name
        found += chosen is not None
    assert found > 15 and {_chosen(family.pipeline, {}) for family in FAMILIES.values()} >= {"FluxModularPipeline"}


def test_transformers_lists_its_models_twice_and_finds_the_same() -> None:
    """Once for itself, by their folder, and once for `transformers.models`, by the file in it; we import them with one
    list. It keeps fewer lists than it has models, so it never finds one of them again."""
    scan = import_utils.create_import_structure_from_path
    assert scan.cache_parameters()["maxsize"] == 128
    folder = Path(str(transformers.__file__)).parent / "models"
    assert scan(folder) == scan.__wrapped__(str(folder / "__init__.py")) and len(scan(folder)) > 128
