"""LoRA: the very picture that diffusers makes with it fused in, wherever the weights are, and nothing passed over."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from runner import Job, Plan, RunPolicy, make_plan, run_all, spawn
from runner.artifacts import FolderStore, MemoryStore
from runner.commands.cli import answer
from runner.engine.keys import artifact_keys
from runner.media.image import card_of, png, read_card
from runner.planning.planner import with_loras
from stages.errors import DoesNotFit, Fix, ModelError
from stages.loading.load import load
from stages.loading.lora_merge import LowRankUpdate, add_updates, read_updates
from stages.models.checkpoint import Component, find
from stages.models.lora import Lora, LoraRequest, find_lora, read_loras
from stages.models.skeleton import model_class, skeleton
from stages.placement.placement import Place, Placement, Resident
from stages.placement.streaming import Streamed
from tests import tiny, tiny_families
from tests.lora_layouts import FLUX_BLOCKS, difference, loha, lokr
from tests.test_cards import MIB, halved
from tests.test_modulation import asked, latents

Cards = Callable[..., list[str]]
Pixels = npt.NDArray[Any]
REQUEST = asked(("a red circle", 7))


@pytest.fixture(scope="module")
def style(tmp_path_factory: pytest.TempPathFactory, flux: Path) -> Path:
    """A LoRA of the tiny FLUX."""
    return tiny.lora(tmp_path_factory.mktemp("lora") / "style.safetensors", flux)


def plan(model: Path, *loras: str, **more: Any) -> Plan:
    options = {"devices": ["cpu"], "dtype": {"": torch.float32}} | more
    return make_plan(Job("flux", REQUEST, model=model, loras=loras, **options))


def fused(model: Path, loras: Mapping[Path, float]) -> Pixels:
    """The picture that diffusers' own pipeline makes with the LoRAs fused into its weights."""
    pipe = FluxPipeline.from_pretrained(model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    for path in loras:
        pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name=path.stem)
    pipe.set_adapters([path.stem for path in loras], list(loras.values()))
    pipe.fuse_lora(components=["transformer", "text_encoder"])
    (request,) = REQUEST
    images = pipe(request.prompt, width=request.width, height=request.height, num_inference_steps=request.steps,
                  guidance_scale=request.guidance, max_sequence_length=request.text_tokens,
                  generator=torch.Generator("cpu").manual_seed(request.seed)).images
    return np.asarray(images[0]).astype(int)


def gap(job: Plan, expected: Pixels) -> int:
    """How far the run's picture is from it, at most, of 255."""
    made = run_all(job, store=MemoryStore(warn=print)).pictures[0].pixels
    return int(abs(made.astype(int) - expected).max())


@pytest.mark.parametrize("table", [True, False], ids=["table", "no table"])
def test_a_picture_is_the_one_of_diffusers_own_fused_pipeline(flux: Path, style: Path, table: bool) -> None:
    job = plan(flux, f"{style}=0.8", modulation_table=table)
    assert bool(job.places["denoise", "transformer"].precomputed) is table
    expected = fused(flux, {style: 0.8})
    assert gap(job, expected) == 0
    # And it is another one without it, and with another scale.
    assert gap(plan(flux), expected) > 9
    assert gap(plan(flux, f"{style}=0.7"), expected) > 0


def test_two_at_once_are_added_one_after_the_other(flux: Path, style: Path, tmp_path: Path) -> None:
    other = tiny.lora(tmp_path / "other.safetensors", flux, rank=2, seed=1, layers=tiny.LORA_LAYERS[3:6])
    assert gap(plan(flux, f"{style}=-0.5", str(other)), fused(flux, {style: -0.5, other: 1.0})) == 0


def test_alphas_beside_the_matrices_count(flux: Path, tmp_path: Path) -> None:
    path = tiny.lora(tmp_path / "alphas.safetensors", flux, rank=4, alpha=2.0)
    assert gap(plan(flux, str(path)), fused(flux, {path: 1.0})) == 0
    assert {addition.scale for addition in read_updates(lora(path), transformer(flux)).values()} == {0.5}


def lora(path: Path, scale: float = 1.0) -> Lora:
    return find_lora(LoraRequest(str(path), scale), "FluxPipeline")


def transformer(model: Path) -> Component:
    return find(model).components["transformer"]


def test_a_trainers_config_counts(flux: Path, tmp_path: Path) -> None:
    """Rank, alpha and their exceptions in the file's own words, as diffusers' trainers write them."""
    plain = tiny.lora(tmp_path / "plain.safetensors", flux, rank=4)
    config = {"r": 4, "lora_alpha": 8, "rank_pattern": {}, "alpha_pattern": {"transformer_blocks.0.attn.to_q": 2},
              "target_modules": list(tiny.LORA_LAYERS)}
    told = {f"transformer.{name}": value for name, value in config.items()}
    path = tmp_path / "config.safetensors"
    save_file(load_file(plain), path, metadata={"lora_adapter_metadata": json.dumps(told), "format": "pt"})
    assert gap(plan(flux, str(path)), fused(flux, {path: 1.0})) == 0
    scales = {name: addition.scale for name, addition in read_updates(lora(path), transformer(flux)).items()}
    assert scales.pop("transformer_blocks.0.attn.to_q.weight") == 0.5 and set(scales.values()) == {2.0}


@pytest.mark.parametrize(("config", "said"), [
    ({"lora_alpha": "much"}, "the alpha 'much'"), ({"lora_alpha": None}, "the alpha 'None'"),
    ({"lora_alpha": 1, "alpha_pattern": {"(a+)+$": 2}}, r"the pattern '\(a\+\)\+\$' for layers"),
    ({"lora_alpha": 1, "use_dora": True}, "a DoRA for a part alone"), ([1], "a trainer's config that is no table"),
    ({"lora_alpha": 1, "alpha_pattern": [1]}, "a trainer's config that is no table"),
])
def test_an_odd_config_is_refused(flux: Path, style: Path, tmp_path: Path, config: Any, said: str) -> None:
    told = {f"transformer.{name}": value for name, value in config.items()} if isinstance(config, dict) else config
    path = tmp_path / "odd.safetensors"
    save_file(load_file(style), path, metadata={"lora_adapter_metadata": json.dumps(told)})
    with pytest.raises(ModelError, match=said):
        plan(flux, str(path))


def test_the_names_of_other_trainers_are_known(flux: Path, tmp_path: Path) -> None:
    """A file of sd-scripts: its names, and alphas that its reader has taken in already."""
    layer, rank = "transformer_blocks.0.attn.to_out.0", 4
    weight = load_file(transformer(flux).files[0])[f"{layer}.weight"]
    torch.manual_seed(0)
    up, down = torch.randn(weight.shape[0], rank), torch.randn(rank, weight.shape[1])
    path = tmp_path / "kohya.safetensors"
    name = "lora_unet_double_blocks_0_img_attn_proj"
    save_file({f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": torch.tensor(2.0)},
              path)
    ((named, addition),) = read_updates(lora(path), transformer(flux)).items()
    assert named == f"{layer}.weight"
    merged = weight.clone()
    add_updates(merged, [addition])
    torch.testing.assert_close(merged, weight + up @ down * (2.0 / rank))
    assert gap(plan(flux, str(path)), fused(flux, {path: 1.0})) == 0


@pytest.mark.parametrize("level", ["", "text_model."])
def test_it_is_merged_into_clip_too(flux: Path, tmp_path: Path, level: str) -> None:
    """With names as CLIP's layers have now, and as they had when most LoRAs were trained."""
    path = tiny.lora(tmp_path / "both.safetensors", flux)
    tensors = load_file(path)
    weights = load_file(find(flux).components["text_encoder"].files[0])
    for name in (name for name in weights if name.endswith(("0.self_attn.q_proj.weight", "1.mlp.fc1.weight"))):
        layer = f"text_encoder.{level}{name.removeprefix('text_model.').removesuffix('.weight')}"
        out, into = weights[name].shape
        tensors |= {f"{layer}.lora_A.weight": torch.randn(4, into), f"{layer}.lora_B.weight": torch.randn(out, 4)}
    save_file(tensors, path)
    assert len(tensors) == 2 * len(tiny.LORA_LAYERS) + 4
    job = plan(flux, f"{path}=0.8")
    assert [sorted(names) for names in job.checkpoint.loras.values()] == [["text_encoder", "transformer"]]
    expected = fused(flux, {path: 0.8})
    assert gap(job, expected) == 0
    # Both parts show, and the embeddings are others than without it.
    assert gap(plan(flux, f"{tiny.lora(tmp_path / 'one.safetensors', flux)}=0.8"), expected) > 0
    assert artifact_keys(job)["encode"] != artifact_keys(plan(flux))["encode"]


@pytest.mark.parametrize("build", [tiny_families.flux2, tiny_families.klein, tiny_families.qwen_image,
                                   tiny_families.sd3, tiny_families.z_image], ids=lambda build: build.__name__)
def test_every_family_takes_one(build: Callable[[Path], Path], tmp_path: Path) -> None:
    """The transformer is what diffusers makes of it."""
    model = build(tmp_path / "model")
    component = find(model).components["transformer"]
    layers = [name for name, layer in skeleton(component).named_modules() if isinstance(layer, torch.nn.Linear)]
    path = tiny.lora(tmp_path / "style.safetensors", model, layers=layers[::3])
    theirs: Any = model_class(component).from_pretrained(component.folder)
    before = {name: weight.clone() for name, weight in theirs.state_dict().items()}
    theirs.load_lora_adapter(load_file(path), prefix="transformer")
    theirs.fuse_lora(lora_scale=0.5)
    theirs.unload_lora()
    checkpoint = with_loras(find(model), read_loras([f"{path}=0.5"]))
    ours = load(checkpoint.components["transformer"], Place(Resident("cpu"), torch.float32))
    expected = theirs.state_dict()
    assert expected.keys() == ours.state_dict().keys()
    assert all(torch.equal(expected[name], weight) for name, weight in ours.state_dict().items())
    changed = {name for name, weight in expected.items() if not torch.equal(weight, before[name])}
    assert changed == {f"{layer}.weight" for layer in layers[::3]}


@pytest.mark.parametrize("other", [False, True], ids=["pairs", "other forms"])
def test_it_is_merged_wherever_the_weights_are(
    flux: Path, style: Path, tmp_path: Path, cards: Cards, other: bool
) -> None:
    """On two cards, with a block that waits on the host and one on the disk, with the table and without."""
    style = other_forms(flux, tmp_path / "other.safetensors") if other else style
    first, second = devices = cards(40 * MIB, 40 * MIB)
    whole = halved(first, second)
    waiting = Streamed(first, whole.devices, whole.rest, cpu_blocks=frozenset(["transformer_blocks.0"]),
                       disk_blocks=frozenset(["transformer_blocks.1", "single_transformer_blocks.0"]))
    others: dict[str, Placement] = {name: Resident(first) for name in ("text_encoder", "text_encoder_2", "vae")}
    found = {}
    placements: dict[str, Placement] = {"one card": Resident(first), "two cards": whole, "waiting": waiting}
    for name, placement in placements.items():
        for table in (True, False):
            job = plan(flux, f"{style}=0.8", devices=devices, modulation_table=table)
            precomputed = job.places["denoise", "transformer"].precomputed
            places = {part: Place(others.get(part[1], placement), torch.float32) for part in job.places}
            places["denoise", "transformer"] = Place(placement, torch.float32, precomputed)
            found[name, table] = latents(dataclasses.replace(job, places=places))[0]
    plain = found.pop(("one card", False))
    assert {key: (made - plain).abs().max().item() for key, made in found.items()} == dict.fromkeys(found, 0.0)
    assert not torch.equal(latents(plan(flux))[0], plain)


def other_forms(flux: Path, path: Path) -> Path:
    """LoKr, LoHa and differences, of fused layers and of biases, for all blocks."""
    sizes = {name: weight.shape for name, weight in load_file(transformer(flux).files[0]).items()}
    tensors: dict[str, torch.Tensor] = {}
    for number, single in ((0, 0), (1, 2)):
        names = {name.replace(".0.", f".{number}.").replace(".2.", f".{single}."): tuple(
            layer.replace("transformer_blocks.0.", f"transformer_blocks.{number}.").replace(
                "transformer_blocks.2.", f"transformer_blocks.{single}.") for layer in layers)
            for name, layers in FLUX_BLOCKS.items()}
        for count, (name, layers) in enumerate(names.items()):
            rows = sum(sizes[f"{layer}.weight"][0] for layer in layers)
            form = (lokr(rows=2), loha, difference)[count % 3]
            tensors |= form(f"diffusion_model.{name}", rows, sizes[f"{layers[0]}.weight"][1])[0]
            tensors[f"diffusion_model.{name}.diff_b"] = torch.randn(rows) / 8
    save_file(tensors, path)
    return path


def test_it_takes_no_memory_of_a_card_once_it_is_merged(flux: Path, style: Path, cards: Cards) -> None:
    (card,) = cards(40 * MIB)
    peaks = {}
    for loras in ([], [str(style)]):
        job = plan(flux, *loras, devices=[card])
        (denoise,) = (stage for stage in run_all(job).stages if stage.stage == "denoise")
        peaks[len(loras)] = denoise.peak[card], job.needs["denoise"][card].total
    assert peaks[0] == peaks[1] and peaks[0][0] <= peaks[0][1]


@pytest.mark.parametrize("made", ["rank 256", "many forms"])
def test_a_card_of_just_the_planned_size_is_enough_to_merge_on(
    flux: Path, tmp_path: Path, cards: Cards, made: str
) -> None:
    """What merging takes besides the weights may be more than all of the activations."""
    path = tmp_path / "large.safetensors"
    if made == "rank 256":
        tiny.lora(path, flux, rank=256)
    else:
        other_forms(flux, path)
    (card,) = cards(40 * MIB)
    need = plan(flux, str(path), devices=[card]).needs["denoise"][card]
    assert made != "rank 256" or need.total > plan(flux, devices=[card]).needs["denoise"][card].total
    (card,) = cards(need.total)
    tight = plan(flux, str(path), devices=[card], place=["denoise=resident"])
    run = run_all(tight, RunPolicy(degrade=False))
    assert run.changes == () and max(stage.peak[card] for stage in run.stages) <= need.total


def test_a_weight_is_rounded_once() -> None:
    """In bfloat16 as near to the sum of float32 as can be, also where it is added to in parts."""
    torch.manual_seed(0)
    weight, up, down = (torch.randn(*shape).bfloat16() for shape in ((3000, 700), (3000, 8), (8, 700)))
    merged = weight.clone()
    add_updates(merged, [LowRankUpdate(down, up, 0.3), LowRankUpdate(down, up, -0.1)])
    exact = weight.double() + up.double() @ down.double() * (0.3 - 0.1)
    assert merged.dtype == torch.bfloat16
    # Half of the last of its 8 bits: rounding twice would be more.
    torch.testing.assert_close(merged.double(), exact, rtol=2**-8, atol=1e-5)


def test_the_files_of_the_model_stay_as_they_are(flux: Path, style: Path) -> None:
    """Weights on the host are windows on them."""
    before = {path: path.read_bytes() for path in find(flux).components["transformer"].files}
    latents(plan(flux, str(style)))
    assert {path: path.read_bytes() for path in before} == before


def test_embeddings_are_kept_and_latents_are_not(flux: Path, style: Path, tmp_path: Path) -> None:
    copied = tmp_path / "elsewhere.safetensors"
    copied.write_bytes(style.read_bytes())
    other = tiny.lora(tmp_path / "other.safetensors", flux, seed=1)
    plain, one, same, scaled, another = (
        artifact_keys(plan(flux, *loras))
        for loras in ([], [str(style)], [str(copied)], [f"{style}=0.5"], [str(other)]))
    assert len({keys["encode"] for keys in (plain, one, same, scaled, another)}) == 1
    assert one == same
    assert len({keys["denoise"] for keys in (plain, one, scaled, another)}) == 4


def test_a_picture_says_which(flux: Path, style: Path, tmp_path: Path) -> None:
    job = make_plan(Job("flux", REQUEST, model=flux, devices=["cpu"], loras=[LoraRequest(str(style), 1)]))
    (picture,) = run_all(job, store=MemoryStore(warn=print)).pictures
    digest = find_lora(LoraRequest(str(style)), "FluxPipeline").digest
    assert picture.facts["loras"] == [{"source": str(style), "sha256": digest, "scale": 1.0}]
    (tmp_path / "styled.png").write_bytes(png(picture.pixels, card_of(picture.request, picture.facts)))
    assert read_card(tmp_path / "styled.png").loras == (LoraRequest(str(style), 1.0, digest),)


def command(flux: Path, *more: str) -> list[str]:
    return ["flux", "--model", str(flux), "--prompt", "a red circle", "--seed", "7", "--steps", "2", "--size", "64x48",
            "--device", "cpu", "--dtype", "float32", "--artifacts", "store", "-q", *more]


def pixels(path: str) -> Pixels:
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.mark.usefixtures("elsewhere")
def test_the_command_line_merges_it_and_a_picture_takes_it_along(
    flux: Path, style: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(style, "style.safetensors")
    assert answer(command(flux, "--out", "plain.png")) == 0
    assert answer(command(flux, "--lora", "style.safetensors=0.8", "--out", "styled.png")) == 0
    assert not np.array_equal(pixels("plain.png"), pixels("styled.png"))
    # From another store, so that all of it is made again.
    again = ["flux", "--like", "styled.png", "--device", "cpu", "-q", "--artifacts", "memory"]
    assert answer([*again, "--out", "again.png"]) == 0
    assert np.array_equal(pixels("again.png"), pixels("styled.png"))
    assert answer([*again, "--lora", "none", "--out", "without.png"]) == 0
    assert np.array_equal(pixels("without.png"), pixels("plain.png"))
    with Image.open("styled.png") as image:
        assert 'LoRA: "style:0.8"' in image.info["parameters"]
    capsys.readouterr()
    assert answer(["runs", "show", "last", "--artifacts", "store"]) == 0
    assert "LoRA style.safetensors x 0.8\n" in capsys.readouterr().out
    # Another file of that name does not pass for it.
    tiny.lora(Path("style.safetensors"), flux, seed=1)
    assert answer([*again, "--out", "other.png"]) == 3
    assert "was used then -> bring that file back" in capsys.readouterr().err
    assert not Path("other.png").exists()


@pytest.mark.usefixtures("elsewhere")
def test_a_run_is_resumed_with_it(flux: Path, style: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(command(flux, "--lora", str(style), "--stop-after", "encode")) == 0
    record = FolderStore(Path("store"), readonly=True)
    name = record.runs()[-1]
    (lora,) = Job.from_json(record.load_run(name)["job"]).loras
    assert (lora.source, lora.scale, len(lora.digest or "")) == (str(style), 1.0, 64)
    assert answer(command(flux, "--lora", str(style), "--out", "styled.png")) == 0
    before = pixels("styled.png")
    Path("styled.png").unlink()
    assert answer(["resume", "last", "--from", "denoise", "--artifacts", "store", "-q"]) == 0
    assert np.array_equal(pixels("styled.png"), before)
    capsys.readouterr()
    assert answer(["plan", "flux", "--model", str(flux), "--device", "cpu", "--lora", str(style)]) == 0
    assert f"LoRA {style} x 1: merged into transformer where" in " ".join(capsys.readouterr().out.split())


def test_ranks_merge_it_too(flux: Path, style: Path, tmp_path: Path) -> None:
    report = spawn(Job("flux", asked(("a red circle", 7), ("two small green squares", 8)), model=flux,
                       store=tmp_path / "store", dtype={"": torch.float32}, devices=["cpu"],
                       loras=[LoraRequest(str(style), 0.8)]), ranks=2)
    assert int(abs(report.pictures[0].pixels.astype(int) - fused(flux, {style: 0.8})).max()) == 0


@pytest.mark.parametrize(("text", "source", "scale"), [
    ("style.safetensors", "style.safetensors", 1.0), ("style.safetensors=0.8", "style.safetensors", 0.8),
    ("user/repo=-1", "user/repo", -1.0), ("a=b.safetensors", "a=b.safetensors", 1.0), ("a=b=.5", "a=b", 0.5),
])
def test_a_lora_is_read_from_text(text: str, source: str, scale: float) -> None:
    assert read_loras([text]) == read_loras([LoraRequest(source, scale)]) == (LoraRequest(source, scale),)


def test_a_path_is_a_lora_and_one_text_is_no_list_of_them() -> None:
    assert read_loras([Path("a") / "b.safetensors"]) == (LoraRequest("a/b.safetensors"),)
    for one in ("style.safetensors=0.8", Path("style.safetensors")):
        with pytest.raises(ValueError, match=r"which is one -> loras=\['style.safetensors"):
            read_loras(one)  # type: ignore[arg-type]


@pytest.mark.parametrize(("text", "said"), [
    ("", "names no file"), ("=0.5", "names no file"), ("a=0", "not 0"), ("a=11", "from -10 to 10"),
    ("a=-10.5", "from -10 to 10"),
])
def test_a_text_that_is_no_lora_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_loras([text])


def spoiled(style: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(style)
    change(tensors)
    return tensors


def rename(tensors: dict[str, torch.Tensor], old: str, new: str) -> None:
    for name in [name for name in tensors if old in name]:
        tensors[name.replace(old, new)] = tensors.pop(name)


Q = "transformer.transformer_blocks.0.attn.to_q"


@pytest.mark.parametrize(("change", "said"), [
    (lambda t: rename(t, "transformer.", "text_encoder_2."), r"adds to 'text_encoder_2' \(T5E.*\), and .* for text_e"),
    (lambda t: rename(t, "transformer.", "text_encoder."), "weight, which is no linear layer of this model's CLIP"),
    (lambda t: rename(t, "attn.to_q", "attn.to_x"), r"to_x.weight, which is no linear layer of this model's Flux"),
    (lambda t: rename(t, "attn.to_q", "norm1"), "norm1.weight, which is no linear layer"),
    (lambda t: t.update({f"{Q}.lora_B.weight": torch.zeros(7, 4)}), r"adds \[7, \d+\] to .* which is \["),
    (lambda t: t.update({f"{Q}.lora_B.weight": torch.zeros(32, 3)}), "for a? ?.*linear layers"),
    (lambda t: t.pop(f"{Q}.lora_B.weight"), "1 of 19 tensors are without others .*to_q.lora_A"),
    (lambda t: t.update({f"{Q}.lora_A.bias": torch.ones(4)}), "1 of 21 tensors are under names that .*lora_A.bias"),
    (lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.zeros(32)}), "a DoRA for a part alone: it has no"),
    (lambda t: t.update({f"{Q}.dora_scale": torch.zeros(32)}), "DoRA"),
    (lambda t: t.update({f"{Q}.alpha": torch.tensor(2.0)}), "an alpha for other layers"),
    (lambda t: t.update({f"{Q}.lora_B.weight": torch.full((32, 4), torch.inf)}), "to .*to_q.weight that are not fin"),
    (lambda t: t.update({name: tensor.to(torch.int8) for name, tensor in t.items()}), "torch.int8 by .* in float"),
    (lambda t: rename(t, "lora_A", "lokr_w1"), "10 of 20 tensors are under names .*lokr"),
    (lambda t: (t.clear(), t.update({"weight": torch.zeros(3)})), "holds nothing"),
])
def test_what_would_be_passed_over_is_refused(
    flux: Path, style: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None], said: str
) -> None:
    path = tmp_path / "bad.safetensors"
    save_file(spoiled(style, change), path)
    with pytest.raises(ModelError, match=said):
        plan(flux, str(path))


def test_a_file_that_is_none_is_refused(flux: Path, style: Path, tmp_path: Path) -> None:
    (tmp_path / "style.bin").write_bytes(b"pickle")
    (tmp_path / "bare").write_bytes(style.read_bytes())
    (tmp_path / "cut.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    (tmp_path / "empty").mkdir()
    for name, said in (("style.bin", "pickle refused"), ("cut.safetensors", "cut off"), ("empty", "no safetensors"),
                       ("missing.safetensors", "no LoRA at"), ("bare", "does not end in .safetensors -> rename it"),
                       ("x" * 300, "cannot be looked at .* -> check its name")):
        with pytest.raises(ModelError, match=said):
            plan(flux, str(tmp_path / name))


def test_a_damaged_one_of_the_hub_is_fetched_again_from_there(tmp_path: Path) -> None:
    folder = tmp_path / "models--user--style" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (folder / "cut.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    with pytest.raises(ModelError, match=r"again: hf download user/style cut\.safetensors --revision abc --force"):
        find_lora(LoraRequest(str(folder)), "FluxPipeline")


def test_a_folder_with_one_file_is_enough(flux: Path, style: Path, tmp_path: Path) -> None:
    one = tiny.lora(tmp_path / "one.safetensors", flux)
    assert [lora.path for lora in plan(flux, str(tmp_path)).checkpoint.loras] == [one]
    tiny.lora(tmp_path / "two.safetensors", flux)
    with pytest.raises(ModelError, match=r"2 safetensors files: one.safetensors, two.safetensors -> name the one"):
        plan(flux, str(tmp_path))


def test_a_file_that_changed_is_refused_where_it_was_used(flux: Path, style: Path) -> None:
    with pytest.raises(ModelError, match="was used then -> bring that file back"):
        make_plan(Job("flux", REQUEST, model=flux, loras=[LoraRequest(str(style), 1.0, "0" * 64)]))


def test_a_file_that_changes_after_it_was_planned_with_is_refused(flux: Path, tmp_path: Path) -> None:
    """What is made of it would be kept under the hash of the file that was there."""
    path = tiny.lora(tmp_path / "style.safetensors", flux)
    job = plan(flux, str(path))
    tiny.lora(path, flux, rank=3)
    with pytest.raises(ModelError, match="was changed or taken away since the run was planned -> run"):
        run_all(job, store=MemoryStore(warn=print))
    path.unlink()
    with pytest.raises(ModelError, match="was changed or taken away since the run was planned -> run"):
        run_all(job, store=MemoryStore(warn=print))


def test_one_that_is_named_twice_is_refused(flux: Path, style: Path) -> None:
    with pytest.raises(ValueError, match="twice -> name it once, with the sum of its scales"):
        plan(flux, str(style), str(style))


def test_a_denoiser_cut_over_cards_takes_none(flux: Path, style: Path, cards: Cards) -> None:
    """And what is proposed instead was planned, and fits."""
    says = r"into whole ones -> leave what place says of denoise or loras out$"
    with pytest.raises(DoesNotFit, match=says) as refused:
        make_plan(Job("flux", REQUEST, model=flux, loras=[str(style)], devices=cards(40 * MIB, 40 * MIB),
                      place=["denoise=tensor_parallel"]))
    assert refused.value.fixes == (Fix("place", None, "denoise"),)
