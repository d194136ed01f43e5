"""A LoRA in a folder of PEFT's: the config beside its file counts, as PEFT counts it, or it is refused by name."""

import json
import random
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file

from runner import Job, Request, make_plan
from runner.engine.keys import artifact_keys
from runner.planning.planner import with_loras
from stages.errors import ModelError
from stages.loading.load import load
from stages.loading.lora_file import read_lora_file
from stages.loading.lora_patterns import LayerPatterns, Unreadable, matches_whole
from stages.models.checkpoint import find
from stages.models.lora import LoraRequest, find_lora, read_loras
from stages.models.skeleton import model_class
from stages.placement.placement import Place, Resident

TARGETS = ["to_q", "to_k", "x_embedder", "attn.to_out.0"]
CONFIGS: Mapping[str, peft.PeftConfig] = {
    "plain": peft.LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS),
    "usual": peft.LoraConfig(target_modules=TARGETS, fan_in_fan_out=True, lora_dropout=0.5,
                             init_lora_weights="gaussian"),
    "rslora and a bias": peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, lora_bias=True, target_modules=TARGETS),
    "names": peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, rank_pattern={"0.attn.to_q": 2, "to_q": 3},
                             alpha_pattern={"^x_embedder": 5, "to_k": 7}),
    "expressions": peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=r".*\.(to_q|to_k)|x_embedder", exclude_modules=r"single_.*\.[^0]\..*",
        rank_pattern={r"transformer_blocks\.\d+\.attn\.to_q": 2},
        alpha_pattern={r".*blocks\.0\.attn\.(to_k|to_q)": 9}),
    "some blocks": peft.LoraConfig(r=2, lora_alpha=3, target_modules=TARGETS, layers_to_transform=[0],
                                   layers_pattern=["transformer_blocks"]),
    "DoRA": peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=TARGETS),
    "LoKr": peft.LoKrConfig(r=2, alpha=3, target_modules=TARGETS, alpha_pattern={"to_k": 7}),
    "LoHa": peft.LoHaConfig(r=2, alpha=3, target_modules=TARGETS),
}


def saved(flux: Path, folder: Path, config: peft.PeftConfig) -> Path:
    """The folder that PEFT saves of a transformer that was trained."""
    component = find(flux).components["transformer"]
    model = peft.get_peft_model(model_class(component).from_pretrained(component.folder), config)
    torch.manual_seed(0)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = torch.randn_like(weight) / 4
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain(flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an alpha that is not its rank; copy it, do not change it."""
    return saved(flux, tmp_path_factory.mktemp("plain") / "style", CONFIGS["plain"])


def read(flux: Path, source: Path) -> None:
    """What a plan does with it."""
    with_loras(find(flux), read_loras([str(source)]))


def merged(flux: Path, source: Path) -> Mapping[str, torch.Tensor]:
    """The weights that a stage computes with."""
    checkpoint = with_loras(find(flux), read_loras([str(source)]))
    place = Place(Resident("cpu"), torch.float32)
    return load(checkpoint.components["transformer"], place).state_dict()


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_a_folder_is_what_peft_makes_of_it(flux: Path, tmp_path: Path, kind: str) -> None:
    folder = saved(flux, tmp_path / "style", CONFIGS[kind])
    component = find(flux).components["transformer"]
    own = model_class(component).from_pretrained(component.folder)
    plain = {name: weight.clone() for name, weight in own.state_dict().items()}
    expected = peft.PeftModel.from_pretrained(own, folder).merge_and_unload().state_dict()
    changed = [name for name, weight in expected.items() if not torch.equal(weight, plain[name])]
    for source in (folder, folder / "adapter_model.safetensors"):
        ours = merged(flux, source)
        assert changed and ours.keys() == expected.keys()
        for name, weight in expected.items():
            torch.testing.assert_close(ours[name], weight, rtol=1e-5, atol=1e-5)


def changed(folder: Path, **config: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


@pytest.mark.parametrize(("config", "said"), [
    ({"use_dora": True}, "a DoRA for a part alone: it has no lora_magnitude_vector"),
    ({"use_dora": "no"}, "has 'no' for use_dora in its trainer's config"), ({"use_rslora": 1}, "has 1 for use_rslora"),
    ({"r": 8}, "says rank 8 for .*, and its matrices have 4"), ({"r": 0}, "says rank 0"),
    ({"lora_alpha": "much"}, "the alpha 'much'"), ({"rank_pattern": [4]}, "no table .rank_pattern"),
    ({"alpha_pattern": {"to_q": [1]}}, r"the alpha '\[1\]'"), ({"target_modules": 3}, "has 3 for target_modules"),
    ({"peft_type": "VERA"}, "of the type 'VERA' by its trainer's config, and LORA, LOHA, LOKR are run -> use one"),
    ({"init_lora_weights": "pissa_niter_4"}, "trained from changed weights"),
    ({"target_parameters": ["x"]}, "has 'target_parameters'"),
    ({"layer_replication": [[0, 1]]}, "'layer_replication'"),
    ({"target_modules": ["to_k"]}, r"matrices for .*, which its adapter_config.json leaves out .* -> use"),
    ({"exclude_modules": ".*attn.*"}, "which its adapter_config.json leaves out"),
    ({"alpha_pattern": {"(a+)+$": 2}}, r"the pattern '\(a\+\)\+\$' for layers .* could run for ever -> use a LoRA"),
    ({"alpha_pattern": {"(?!to_q)": 2}}, r"the pattern '\(\?!to_q\)'"),
    ({"rank_pattern": {".*" * 501: 2}}, "the pattern"),
    ({"target_modules": "(" * 21 + "a" + ")" * 21}, "the pattern"), ({"target_modules": "(x"}, "the pattern"),
])
def test_a_config_that_is_not_run_is_refused_by_name(
    flux: Path, plain: Path, tmp_path: Path, config: Mapping[str, Any], said: str
) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "style"))
    changed(folder, **config)
    with pytest.raises(ModelError, match=said) as caught:
        read(flux, folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "said"), [
    ("{", "is not valid JSON"), ("[1]", "holds a JSON list"), ("[" * 100_000, "is not valid JSON"),
    ("", "has 0 bytes"),
    ('{"r": NaN}', "NaN is not JSON"), (" " * (16 * 2**20 + 1), "more than the 16777216 that it may have -> use"),
])
def test_a_config_that_cannot_be_read_is_refused(
    flux: Path, plain: Path, tmp_path: Path, text: str, said: str
) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "style"))
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(ModelError, match=said):
        read(flux, folder)


def test_a_config_that_is_gone_or_no_file_is_refused(flux: Path, plain: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "style"))
    config = folder / "adapter_config.json"
    config.unlink()
    with pytest.raises(ModelError, match=r"its alpha in adapter_config.json, which is not beside it -> put it there"):
        read(flux, folder)
    config.symlink_to(config)
    with pytest.raises(ModelError, match="a link that leads nowhere"):
        read(flux, folder)
    config.unlink()
    config.mkdir()
    with pytest.raises(ModelError, match="is not a regular file"):
        read(flux, folder)


@pytest.mark.parametrize(("config", "cause"), [
    (peft.LoraConfig(target_modules=["to_q"], modules_to_save=["x_embedder"]),
     "base_model.model.x_embedder.(weight|bias)"),
    (peft.LoraConfig(target_modules=["to_q"], bias="all"), r"base_model.model.*\.bias"),
    (peft.LoraConfig(target_modules=["to_q"], bias="lora_only"), r"base_model.model.*to_q\.base_layer\.bias"),
])
def test_weights_that_replace_the_models_are_refused(
    flux: Path, tmp_path: Path, config: peft.PeftConfig, cause: str
) -> None:
    folder = saved(flux, tmp_path / "style", config)
    with pytest.raises(ModelError, match=f"whole weights that replace the model's, .* such as '{cause}"):
        read(flux, folder)


def test_a_dora_is_taken_whole_and_without_a_scale(flux: Path, tmp_path: Path) -> None:
    """Also as diffusers writes one, without a config."""
    folder = saved(flux, tmp_path / "style", CONFIGS["DoRA"])
    expected, path = merged(flux, folder), tmp_path / "style.safetensors"
    tensors = {name.replace("base_model.model.", "transformer."): tensor
               for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    # Without a config alpha is the rank.
    save_file({name: tensor * (1.5 if "lora_B" in name else 1) for name, tensor in tensors.items()}, path)
    for name, weight in merged(flux, path).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-5)
    with pytest.raises(ModelError, match=r"is a DoRA with the scale 0.5, and programs differ .* -> leave the"):
        with_loras(find(flux), read_loras([f"{folder}=0.5"]))
    changed(folder, use_dora=False)
    with pytest.raises(ModelError, match="a DoRA for a part alone: it has one lora_magnitude_vector"):
        read(flux, folder)
    first = next(name for name in tensors if "magnitude" in name)
    save_file(tensors | {first: torch.ones(3)}, path)
    with pytest.raises(ModelError, match=r"has \[3\] by .* -> use a LoRA of linear layers"):
        read(flux, path)


def test_the_config_is_looked_for_beside_any_file(flux: Path, plain: Path, tmp_path: Path) -> None:
    """Under another name, with one in the file as well, and for a component that it does not speak of."""
    folder = Path(shutil.copytree(plain, tmp_path / "style"))
    expected, path = merged(flux, folder), folder / "mine.safetensors"
    tensors = load_file((folder / "adapter_model.safetensors").rename(path))
    assert all(torch.equal(weight, expected[name]) for name, weight in merged(flux, path).items())
    config = json.loads((folder / "adapter_config.json").read_text())
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(config)})
    assert all(torch.equal(weight, expected[name]) for name, weight in merged(flux, path).items())
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(config | {"lora_alpha": 1})})
    with pytest.raises(ModelError, match=r"a trainer's config in the file and another one beside it .* -> take away"):
        read(flux, path)
    layer = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    pair = {f"{layer}.lora_A.weight": torch.ones(4, 32), f"{layer}.lora_B.weight": torch.ones(32, 4)}
    save_file(tensors | pair, path)
    with pytest.raises(ModelError, match=r"no alpha for .*q_proj of 'text_encoder', and its adapter_config.json"):
        read(flux, path)


def test_another_config_is_another_lora(flux: Path, plain: Path, tmp_path: Path) -> None:
    """In the key, in what a picture says, and between the plan and the run."""
    folder = Path(shutil.copytree(plain, tmp_path / "style"))
    asked = Request("a red circle", 64, 48, 1, 3.5, 7, 32)
    plans = [make_plan(Job("flux", asked, model=flux, loras=[folder], devices="cpu"))]
    before = find_lora(LoraRequest(str(folder)), "FluxPipeline")
    changed(folder, lora_alpha=8)
    plans.append(make_plan(Job("flux", asked, model=flux, loras=[folder], devices="cpu")))
    assert len({artifact_keys(plan)["denoise"][0] for plan in plans}) == 2
    with pytest.raises(ModelError, match=r"has the sha256 .* was used then"):
        find_lora(LoraRequest(str(folder), 1.0, before.digest), "FluxPipeline")
    with pytest.raises(ModelError, match="was changed or taken away since the run was planned"):
        read_lora_file(before)


def test_patterns_mean_what_they_mean_to_peft() -> None:
    """Made up of what regular expressions are made of; what is not read is refused."""
    luck, tried = random.Random(0), 0
    names = ["transformer_blocks.0.attn.to_q", "transformer_blocks.10.attn.to_out.0", "x_embedder", "a.b", "to_q"]
    words = ["t", "o", "_", "q", r"\.", r"\d", r"\w", "[0-9]", "[^0]", ".*", "t*", "o?", r"\w+", "(", "|", ")", "(?:",
             "^", "$", "attn", "to_", "blocks"]
    for _ in range(4000):
        text = "".join(luck.choice(words) for _ in range(luck.randint(1, 7)))
        try:
            ours = LayerPatterns([text])
        except Unreadable:
            continue
        tried += 1
        for name in names:
            assert (ours.first(name) or name) == get_pattern_key([text], name), (text, name)
            assert matches_whole(text, name) is bool(re.fullmatch(text, name)), (text, name)
    assert tried > 1000
