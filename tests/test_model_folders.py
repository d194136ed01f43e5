"""Folders as people really have them: each runs as diffusers runs it, or is refused with the true cause at once."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from runner import Job, Plan, make_plan, run_all
from runner.request import requests_for
from stages.errors import ModelError
from stages.families import FAMILIES
from stages.models.checkpoint import Checkpoint, find
from tests import tiny_families
from tests.staging import run_whole

ROOT = Path(__file__).parent.parent
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
INPUTS = {"prompt": "a red circle", "width": 64, "height": 48, "num_inference_steps": 2, "seed": 7,
          "max_sequence_length": 64}


@pytest.fixture
def model(flux: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may change."""
    return shutil.copytree(flux, tmp_path / "model")


def planned(model: Path, family: str = "flux", guidance: float = 3.5) -> Plan:
    requests = requests_for("a red circle", FAMILIES[family], size=(64, 48), steps=2, guidance=guidance, seed=7,
                            text_tokens=64)
    return make_plan(Job(family, list(requests), model=model, dtype={"": torch.float32}, devices=["cpu"]))


def picture(model: Path, family: str = "flux", guidance: float = 3.5) -> torch.Tensor:
    return torch.from_numpy(run_all(planned(model, family, guidance)).pictures[0].pixels)


def rewrite(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def refused(model: Path, *words: str) -> None:
    """The model is refused by a look at its folder, in a line that has all the words."""
    with pytest.raises(ModelError) as caught:
        find(model)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


def test_hidden_files_are_passed_over(flux: Path, model: Path) -> None:
    """macOS writes them beside every file that it copies to a foreign disk."""
    plain = find(model)
    for path in [path for path in model.rglob("*") if path.is_file()]:
        (path.parent / f"._{path.name}").write_bytes(b"\0\5\x16\7Mac OS X")
        (path.parent / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (model / "vae" / "._code.py").write_bytes(b"\0\5\x16\7")
    (model / ".git").mkdir()
    found = find(model)
    assert (found.identity, found.components) == (plain.identity, plain.components)
    assert torch.equal(picture(model), picture(flux))


def test_notes_of_any_size_are_not_read(model: Path) -> None:
    before = find(model).identity
    with (model / "transformer" / "notes.txt").open("wb") as notes:
        notes.truncate(3 * 10**9)
    start = time.process_time()
    assert find(model).identity == before
    assert time.process_time() - start < 1


@pytest.mark.parametrize(("name", "size"), [("vae/config.json", 17 * 2**20), ("tokenizer_2/tokenizer.json", 3 * 10**9),
                                            ("tokenizer/merges.txt", 3 * 10**9), ("model_index.json", 3 * 10**9)])
def test_what_is_read_whole_is_no_larger_than_it_may_be(model: Path, name: str, size: int) -> None:
    with (model / name).open("ab") as file:
        file.truncate(size)
    refused(model, name, f"has {size} bytes, more than the")


def test_shards_without_their_index(tmp_path: Path) -> None:
    from tests.tiny import flux

    model = flux(tmp_path / "model", shard="200KB")
    (model / "transformer" / "diffusion_pytorch_model.safetensors.index.json").unlink()
    refused(model, "transformer has", "shards, first diffusion_pytorch_model-00001-of-0000",
            "but not diffusion_pytorch_model.safetensors.index.json", "hf download ID transformer/diff")


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.fp16-00001-of-00002.safetensors", "flux1-dev-Q4_0.gguf",
                                  "diffusion_pytorch_model-00001-of-00002.fp16.safetensors"])
def test_variants_and_foreign_formats_alone_are_named(model: Path, name: str) -> None:
    (model / WEIGHTS).rename(model / "transformer" / name)
    refused(model, f"transformer has {name} but no diffusion_pytorch_model.safetensors; only the plain variant is")


def test_a_variant_beside_the_plain_file_is_left_alone(flux: Path, model: Path) -> None:
    plain = find(model).components
    shutil.copy(model / WEIGHTS, model / WEIGHTS.replace(".safetensors", ".fp16.safetensors"))
    assert find(model).components == plain
    assert torch.equal(picture(model), picture(flux))


@pytest.mark.parametrize("name", [
    "proj_out.weight_scale", "proj_out.scale_weight", "scaled_fp8", "proj_out.input_scale", "proj_out.scale_input",
    "proj_out.weight_scale_inv", "proj_out.SCB", "proj_out.weight.absmax", "proj_out.weight.quant_map",
    "proj_out.weight.quant_state.bitsandbytes__nf4", "proj_out.qweight", "proj_out.weight_packed",
    "proj_out.weight._scale", "proj_out.comfy_quant", "proj_out.wscales",
])
def test_weights_with_companions_are_refused_by_name_before_anything_heavy(model: Path, name: str) -> None:
    def quantize(tensors: dict[str, torch.Tensor]) -> None:
        tensors["proj_out.weight"] = tensors["proj_out.weight"].to(torch.float8_e4m3fn)
        tensors[name] = torch.ones(1)

    edit(model / WEIGHTS, quantize)
    refused(model, WEIGHTS, "holds quantized weights", name, "use a model in bfloat16")


def test_what_is_like_a_scale_and_unknown_to_the_class_is_refused(model: Path) -> None:
    edit(model / WEIGHTS, lambda tensors: tensors.update({"proj_out.my_scales": torch.ones(1)}))
    with pytest.raises(ModelError, match=r"transformer holds quantized weights \(proj_out\.my_scales belongs to them"):
        planned(model)


def test_fp8_without_scales_is_cast_as_diffusers_does(model: Path) -> None:
    def quantize(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(".weight") and "transformer_blocks" in name]:
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)

    edit(model / WEIGHTS, quantize)
    whole, _ = run_whole(model, INPUTS | {"guidance_scale": 3.5})
    assert torch.equal(picture(model), whole)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
def test_whole_numbers_in_place_of_weights_are_refused_before_anything_is_loaded(
    model: Path, dtype: torch.dtype
) -> None:
    edit(model / WEIGHTS, lambda tensors: tensors.update(
        {"proj_out.weight": (tensors["proj_out.weight"] * 100).to(dtype)}))
    with pytest.raises(ModelError, match=r"holds whole numbers in place of weights, proj_out\.weight \([IU]\d+\)"):
        planned(model)


@pytest.mark.parametrize("changes", [
    {"quantization_config": {"quant_method": "gguf"}}, {"text_config": {"quantization_config": {"bits": 4}}},
    {"compression_config": {"format": "pack"}},
])
def test_configs_that_tell_of_quantization(model: Path, changes: dict[str, object]) -> None:
    rewrite(model / "text_encoder" / "config.json", **changes)
    refused(model, "text_encoder holds quantized weights")


def without_t5(folder: Path) -> Path:
    """Stable Diffusion 3 as many save it: its largest encoder is left out."""
    model = tiny_families.sd3(folder)
    rewrite(model / "model_index.json", text_encoder_3=[None, None], tokenizer_3=[None, None])
    for name in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(model / name)
    return model


def test_stable_diffusion_3_without_t5_runs_as_diffusers_runs_it(tmp_path: Path) -> None:
    model = without_t5(tmp_path / "model")
    staged = picture(model, "sd3", 5.0)
    whole, _ = run_whole(model, INPUTS | {"guidance_scale": 5.0, "negative_prompt": ""})
    assert torch.equal(staged, whole)
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(model, text_encoder_3=None, tokenizer_3=None)
    inputs = {name: value for name, value in INPUTS.items() if name != "seed"}
    images = pipe(**inputs, guidance_scale=5.0, output_type="pt", generator=torch.Generator("cpu").manual_seed(7))
    assert (images.images[0].permute(1, 2, 0) * 255 - staged).abs().max() <= 1


def test_an_encoder_that_has_no_tokenizer_is_not_left_unused_without_a_word(tmp_path: Path) -> None:
    model = tiny_families.sd3(tmp_path / "model")
    rewrite(model / "model_index.json", tokenizer_3=[None, None])
    with pytest.raises(ModelError, match="names no tokenizer_3, which StableDiffusion3Pipeline needs for encode"):
        planned(model, "sd3")


def test_a_whole_clip_in_the_place_of_its_text_half(flux: Path, model: Path) -> None:
    tensors = {"logit_scale": torch.ones(()), "visual_projection.weight": torch.ones(2, 2),
               "vision_model.layer_scale": torch.ones(2)}
    edit(model / "text_encoder" / "model.safetensors", lambda there: there.update(tensors))
    assert torch.equal(picture(model), picture(flux))


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "scheduler", "tokenizer_2", "vae"])
def test_a_model_without_what_it_cannot_do_without(model: Path, part: str) -> None:
    rewrite(model / "model_index.json", **{part: [None, None]})
    with pytest.raises(ModelError, match=f"names no {part}, which FluxPipeline needs for"):
        planned(model)
    index = json.loads((model / "model_index.json").read_text())
    del index[part]
    (model / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=f"names no {part}, which FluxPipeline needs for"):
        planned(model)


@pytest.mark.parametrize(("path", "changes", "words"), [
    ("text_encoder/config.json", {"attn_implementation": "kernels-community/flash-attn@main"},
     ("attn_implementation 'kernels-community/flash-attn@main'", "write eager or sdpa there")),
    ("text_encoder/config.json", {"_attn_implementation": "flash_attention_2"}, ("write eager or sdpa there",)),
    ("text_encoder/config.json", {"text_config": {"attn_implementation": {"": "sdpa", "vision_config": "a/b:c"}}},
     ("attn_implementation 'a/b:c'",)),
    ("text_encoder/config.json", {"experts_implementation": "sonicmoe"}, ("write eager or batched_mm or grouped_mm",)),
    ("text_encoder/config.json", {"_experts_implementation_internal": ["x"]}, ("_experts_implementation_internal",)),
    ("text_encoder/config.json", {"text_config": {"auto_map": {"AutoConfig": "a.B"}}}, ("its auto_map",)),
    ("text_encoder/config.json", {"vision_config": [{"transformers_weights": "../x"}]}, ("its transformers_weights",)),
    ("tokenizer/tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["a.B", None]}}, ("its auto_map",)),
    ("tokenizer/tokenizer_config.json", {"trust_remote_code": True}, ("its trust_remote_code",)),
    ("scheduler/scheduler_config.json", {"auto_map": {"AutoScheduler": "a.B"}}, ("its auto_map",)),
])
def test_fields_by_which_code_would_be_imported_are_refused_by_name(
    model: Path, path: str, changes: dict[str, object], words: tuple[str, ...]
) -> None:
    rewrite(model / path, **changes)
    refused(model, path, "is refused for its", *words)


def test_attention_that_needs_no_code_is_allowed(flux: Path, model: Path) -> None:
    rewrite(model / "text_encoder" / "config.json", attn_implementation="sdpa", _attn_implementation=None)
    assert torch.equal(picture(model), picture(flux))


def test_blocks_of_a_model_that_are_code_are_refused(model: Path) -> None:
    (model / "modular_config.json").write_text(json.dumps({"auto_map": {"ModularPipelineBlocks": "evil.Blocks"}}))
    refused(model, "modular_config.json", "auto_map")


@pytest.mark.parametrize(("path", "changes", "words"), [
    ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**6}, "num_train_timesteps is 1000000"),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**9}, "num_train_timesteps is 1000000000"),
    ("tokenizer/tokenizer_config.json", {"model_max_length": 10**6}, "model_max_length is 1000000"),
    ("tokenizer/tokenizer_config.json", {"model_max_length": 10**9}, "model_max_length is 1000000000"),
    ("tokenizer_2/tokenizer_config.json", {"extra_ids": 10**6}, "extra_ids is 1000000"),
    ("tokenizer_2/tokenizer_config.json", {"extra_ids": 10**9}, "extra_ids is 1000000000"),
])
def test_counts_of_what_has_no_weights(model: Path, path: str, changes: dict[str, object], words: str) -> None:
    rewrite(model / path, **changes)
    refused(model, path, words, "more than 50000 is refused")


@pytest.mark.parametrize("length", [131072, 10**9, int(1e30)])
def test_tokenizers_that_are_told_how_much_to_read_may_say_what_they_like(
    flux: Path, model: Path, length: int
) -> None:
    """That of Qwen-Image has 131072, and 10^30 is how transformers says that there is no limit."""
    rewrite(model / "tokenizer_2" / "tokenizer_config.json", model_max_length=length)
    assert torch.equal(picture(model), picture(flux))


@pytest.mark.parametrize(("path", "changes", "words"), [
    ("scheduler/scheduler_config.json", {"num_train_timesteps": 0}, "num_train_timesteps=0 in scheduler/schedule"),
    ("scheduler/scheduler_config.json", {"base_image_seq_len": "many"}, r"scheduler_config\.json \(base_image_seq_"),
    ("scheduler/scheduler_config.json", {"max_shift": [1]}, r"scheduler_config\.json \(max_shift=\[1\]"),
    ("transformer/config.json", {"axes_dims_rope": [4, 4, 4]}, r"transformer/config\.json"),
    ("vae/config.json", {"scaling_factor": "big"}, r"vae/config\.json: scaling_factor is 'big'"),
    ("vae/config.json", {"latents_mean": 3}, r"vae/config\.json: latents_mean is 3"),
])
def test_fields_that_only_a_run_reads_are_told_by_the_plan(
    model: Path, path: str, changes: dict[str, object], words: str
) -> None:
    rewrite(model / path, **changes)
    with pytest.raises(ModelError, match=words):
        planned(model)


@pytest.mark.parametrize("text", ["{}", '{"version": "1.0", "truncation": nu', "[]", '{"model": {"type": "BPE"}}'])
def test_a_damaged_tokenizer_is_refused_by_the_plan(model: Path, text: str) -> None:
    (model / "tokenizer_2" / "tokenizer.json").write_text(text)
    with pytest.raises(ModelError, match=r"tokenizer_2 cannot be read as T5Tokenizer\w* \(.+\); fetch it again: hf"):
        planned(model)


def test_a_tokenizer_of_another_model_is_refused_by_the_plan(model: Path) -> None:
    """Its encoder would be asked for a row that it does not have."""
    rewrite(model / "tokenizer" / "tokenizer_config.json", pad_token="float32")
    with pytest.raises(ModelError, match=r"tokenizer pads with token \d+, but its encoder knows \d+"):
        planned(model)


def test_an_empty_tokenizer_is_refused_at_once(model: Path) -> None:
    (model / "tokenizer_2" / "tokenizer.json").write_text("")
    refused(model, "tokenizer_2/tokenizer.json has 0 bytes; fetch it again")


LOOK = """
import sys
from stages.models.checkpoint import find
from stages.errors import ModelError
try:
    print(find(sys.argv[1], weights=False).identity)
except ModelError as error:
    print("refused", error)
"""


def looked_at_by_a_user(model: str, **env: str) -> str:
    """What comes of a model where permissions count: root may read and write everything else."""
    bare = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    if bare and shutil.which("setpriv") is None:
        pytest.skip("root may read everything, and there is no setpriv here")
    done = subprocess.run([*bare, sys.executable, "-c", LOOK, model], env={**os.environ, **env}, cwd=ROOT,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", [".", "vae", "transformer/config.json", WEIGHTS])
def test_a_folder_that_may_not_be_entered(model: Path, name: str) -> None:
    path = model / name
    mode = path.stat().st_mode
    path.chmod(0)
    try:
        text = looked_at_by_a_user(str(model))
    finally:
        path.chmod(mode)
    assert text.startswith("refused") and "Permission denied" in text and str(path.resolve()) in text


def test_a_cache_that_cannot_be_written(flux: Path, tmp_path: Path) -> None:
    """As on a mounted disk that others fill: where nothing is missing, nothing is written."""
    home = tmp_path / "home"
    snapshot = home / "hub" / "models--org--open" / "snapshots" / ("a" * 40)
    shutil.copytree(flux, snapshot)
    (home / "hub" / "models--org--open" / "refs").mkdir()
    (home / "hub" / "models--org--open" / "refs" / "main").write_text("a" * 40)
    before = sorted(home.rglob("*"))
    folders = [home, *(path for path in before if path.is_dir())]
    for path in folders:
        path.chmod(0o555)
    try:
        assert looked_at_by_a_user("org/open", HF_HOME=str(home), HF_HUB_OFFLINE="1") == f"org/open@{'a' * 40}"
    finally:
        for path in folders:
            path.chmod(0o755)
    assert sorted(home.rglob("*")) == before


def test_a_cache_of_links_has_the_identity_of_its_files(flux: Path, tmp_path: Path) -> None:
    blobs, model = tmp_path / "blobs", tmp_path / "model"
    blobs.mkdir()
    for index, path in enumerate(path for path in flux.rglob("*") if path.is_file()):
        shutil.copy(path, blobs / str(index))
        link = model / path.relative_to(flux)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / str(index), link.parent))
    found: Checkpoint = find(model)
    assert found.identity == find(flux).identity
