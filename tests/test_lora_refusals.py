"""What a LoRA may not have is refused by name, with its number and the next step; what adds nothing may be there."""

import json
import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from runner.planning.planner import with_loras
from stages.errors import ModelError
from stages.loading.lora_merge import read_updates
from stages.models.checkpoint import find
from stages.models.lora import read_loras
from tests.lora_layouts import LAYOUTS, PEFT, Tensors, loha, lokr, low_rank, write

ATTENTION = "lora_unet_double_blocks_0_img_attn_proj"
Change = Callable[[Tensors], Any]


def kohya(flux: Path, row: str = "sd-scripts") -> Tensors:
    """A file of sd-scripts for the tiny FLUX."""
    return write(LAYOUTS[row, "flux"], sizes(flux))[0]


def sizes(flux: Path) -> Mapping[str, torch.Size]:
    from safetensors.torch import load_file

    return {name: weight.shape for path in find(flux).components["transformer"].files
            for name, weight in load_file(path).items()}


def reached(flux: Path, tensors: Tensors, folder: Path, config: Mapping[str, Any] | None = None) -> set[str]:
    """The weights that the file adds to, as far as a plan looks at it; ModelError where it is refused."""
    told = {} if config is None else {"lora_adapter_metadata": json.dumps(config)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "style.safetensors", told)
    checkpoint = with_loras(find(flux), read_loras([str(folder / "style.safetensors")]))
    return {name for part in checkpoint.components.values() for lora in part.loras
            for name in read_updates(lora, part)}


T5 = "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q"
ZERO = torch.zeros(32, 4)


def pair(name: str, value: float = 1.0) -> Tensors:
    return {f"{name}.lora_down.weight": torch.ones(4, 32), f"{name}.lora_up.weight": torch.full((32, 4), value),
            f"{name}.alpha": torch.tensor(4.0)}


def put(suffix: str, value: torch.Tensor) -> Change:
    """Give the layer a tensor, or another one."""
    return lambda tensors: tensors.update({ATTENTION + suffix: value})


@pytest.mark.parametrize(("change", "said"), [
    (lambda t: t.update(pair("lora_te3_encoder_block_0_layer_0_SelfAttention_q")),
     r"adds to 'T5', and diffusers .* knows LoRA for text_encoder and transformer of this model \(3 tensors, first "
     r"'lora_te3_encoder_block_0_layer_0_SelfAttention_q.alpha'\) -> use one for those alone"),
    (lambda t: t.update(pair(T5)), "adds to 'T5', and .* -> use one"),
    (lambda t: t.update(pair("lora_te2_encoder_block_0_layer_0_SelfAttention_q")),
     r"adds to 'text_encoder_2' \(T5EncoderModel\), and"),
    (put(".dora_scale", torch.ones(32, 1)),
     "holds what is not run: 4 of [0-9]+ tensors are DoRA as LyCORIS writes it, such as .*dora_scale' -> use a"),
    (lambda t: t.update({f"{ATTENTION}.dora_scale": torch.zeros(32, 1), f"{ATTENTION}.lora_up.weight": ZERO}), "DoRA"),
    (lambda t: t.update({"diffusion_model.double_blocks.0.img_attn.norm.query_norm.scale": torch.ones(16)}),
     "1 of [0-9]+ tensors are weights that replace those of a norm, as in a control LoRA, such as"),
    (lambda t: t.update({"diffusion_model.double_blocks.0.img_attn.norm.query_norm.diff": torch.ones(16)}),
     "query_norm.weight, which is no linear layer of this model's Flux.* .1 tensor, first 'diffusion_model"),
    (lambda t: t.update({"lora_unet_double_blocks_0_img_attn_norm_key_norm.w_norm": torch.ones(16)}),
     "1 of [0-9]+ tensors are what is added to a norm"),
    (put(".lora_magnitude_vector", torch.ones(32)),
     "a DoRA for a part alone: it has (one|no) lora_magnitude_vector for .* -> use a whole one"),
    (lambda t: t.update(pair("text_encoder_3.encoder.block.0.layer.0.SelfAttention.q")), "adds to 'T5', and"),
    (lambda t: t.update(pair("text_encoder_2.encoder.block.0.layer.0.SelfAttention.q")), "'text_encoder_2' .T5Enc"),
    (put(".lokr_t2", torch.ones(4, 4, 3, 3)), "are for convolutions, such as .*lokr_t2"),
    (put(".hada_t1", torch.ones(4, 4, 3, 3)), "are for convolutions, such as .*hada_t1"),
    (put(".on_input", torch.ones(32)), "are IA3"),
    (put(".lora_mid.weight", torch.ones(4, 4, 3, 3)), "are for convolutions"),
    (put(".oft_blocks", torch.ones(2, 4, 4)), "are OFT"),
    (put(".lora_up.scale_weight", torch.ones(1)), "scales of quantized matrices"),
    (lambda t: t.update(pair("lora_prior_unet_x")), "lora_prior_unet_x.weight, which is no linear layer"),
    (lambda t: t.update(pair("lora_unet_\x1b[2J\nx")), r"adds to \\x1b\[2J\\nx.weight, which is no linear"),
    (lambda t: t.update({"emp_params": torch.ones(3, 3)}), "1 of .* are under names that no known .* 'emp_params'"),
    (lambda t: t.update({"lora_te1_text_model_embeddings_position_embedding.diff": torch.ones(4, 32)}),
     "position_embedding.weight, which is no linear layer of this model's CLIPTextModel"),
    (lambda t: t.pop(f"{ATTENTION}.lora_up.weight"), "2 of .* are without others that belong to them"),
    (lambda t: t.update({"lora_unet_single_blocks_0_linear2.alpha": torch.tensor(1.0)}), "1 of .* are without others"),
    (put(".alpha", torch.tensor(0.0)), "the alpha 0 for .*proj, which is nothing to some"),
    (put(".alpha", torch.tensor(torch.nan)), "has the alpha 'nan'"),
    (put(".alpha", torch.ones(2)), r"has \[2\] values for the alpha of"),
    (put(".lora_up.weight", torch.full((32, 4), torch.nan)), "not finite -> fetch it again"),
    (lambda t: t.update({f"{ATTENTION}.lora_up.weight": torch.zeros(32, 4), f"{ATTENTION}.lora_down.weight":
                         torch.full((4, 32), torch.inf)}), "not finite"),
    (put(".lora_up.weight", torch.ones(30, 4)),
     r"adds \[30, 32\] to transformer_blocks.0.attn.to_out.0.weight, which is \[32, 32\] in this model \(3 tensors"),
    (lambda t: t.update({"lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.ones(64, 4)}),
     r"adds \[64, 32\] to .*to_q.weight and .*to_k.weight and .*to_v.weight are \[96, 32\] in this model"),
    (put(".lora_up.weight", torch.ones(32, 4, 1, 1)), "use a LoRA of linear layers"),
    (put(".lora_up.weight", torch.ones(32, 3)), r"\[32, 3\] by \[4, 32\] for .*linear layers"),
    (lambda t: t.update({f"{ATTENTION}.lora_up.weight": torch.ones(32, 0), f"{ATTENTION}.lora_down.weight":
                         torch.ones(0, 32)}), "use a LoRA of linear layers"),
    (put(".lora_up.weight", torch.ones(32, 4).int()), "torch.int32 by .* in floating point"),
    (lambda t: t.update({"x": torch.ones(3).bool()}), "'x' in BOOL -> use a LoRA in floating point"),
    (lambda t: t.update(PEFT("transformer.transformer_blocks.0.attn.to_q", 32, 32)[0]), "says twice .*to_q.weight"),
    (lambda t: t.update(lokr()(ATTENTION, 32, 32)[0]), "without others that belong to them"),
    (lambda t: t.update(loha("lora_unet_double_blocks_1_img_attn_proj", 32, 30)[0]), r"adds \[32, 30\] to"),
    (put(".lora_A.weight", torch.ones(4, 32)), "says twice what is added to a layer: "),
    (lambda t: t.update({"lora_unet_img_in.diff_b": torch.ones(5)}),
     r"adds \[5\] to x_embedder.bias, which is \[32\]"),
])
def test_what_is_not_run_is_refused_by_name(flux: Path, tmp_path: Path, change: Change, said: str) -> None:
    tensors = kohya(flux)
    change(tensors)
    with pytest.raises(ModelError, match=said):
        reached(flux, tensors, tmp_path)


def test_the_page_says_what_is_refused() -> None:
    """Each ending and prefix of the page's second table is tried here."""
    page = (Path(__file__).parent.parent / "docs" / "loras.md").read_text()
    table = page[page.index("| what | why |") :].split("\n\n")[0]
    said = [name for line in table.splitlines() for name in re.findall(r"`([^`]+)`", line.split("|")[1])]
    source = "".join(Path(__file__).with_name(name).read_text() for name in ("test_lora_refusals.py",
                                                                             "test_lora_folders.py"))
    assert len(said) > 10 and not [name for name in said if name not in source]


@pytest.mark.parametrize("change", [
    lambda t: t.update(pair("lora_te3_encoder_block_0_layer_0_SelfAttention_q", 0.0)),
    lambda t: t.update(pair(T5, 0.0)),
    lambda t: t.update({f"{T5}.lora_down.weight": torch.zeros(4, 32), f"{T5}.lora_up.weight": torch.ones(32, 4)}),
    lambda t: t.update({"lora_te1_text_model_embeddings_position_embedding.diff": torch.zeros(4, 32)}),
    lambda t: t.update({"lora_unet_double_blocks_0_img_attn_norm_key_norm.diff": torch.zeros(16)}),
    lambda t: t.update({"lora_unet_double_blocks_0_img_attn_norm_key_norm.w_norm": torch.zeros(16)}),
    lambda t: t.update({"lora_te2_x.hada_w1_a": torch.zeros(4, 2), "lora_te2_x.hada_w1_b": torch.ones(2, 4)}),
    lambda t: t.update({"position_ids": torch.zeros(1, 77, dtype=torch.int64)}),
], ids=range(8))
def test_what_adds_nothing_may_be_there(flux: Path, tmp_path: Path, change: Change) -> None:
    tensors = kohya(flux)
    expected = reached(flux, tensors, tmp_path)
    change(tensors)
    assert reached(flux, tensors, tmp_path) == expected


def test_a_file_that_adds_nothing_at_all_is_refused(flux: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds nothing -> use another LoRA"):
        reached(flux, pair(T5, 0.0), tmp_path)


@pytest.mark.parametrize(("config", "said"), [
    ({"use_dora": True}, "a DoRA for a part alone: it has no lora_magnitude_vector for .* -> use a whole one"),
    ({"r": 8}, "says rank 8 for .*, and its matrices have 4"), ({"r": 0}, "says rank 0"),
    ({"r": None}, "has the alpha 'None'"),
    ({"init_lora_weights": "pissa"}, "trained from changed weights .*pissa.*, which are not in it -> convert it"),
    ({"use_qalora": True}, "has 'use_qalora' in its trainer's config, which is not run"),
    ({"layer_replication": [[0, 2]]}, "has 'layer_replication'"), ({"of_tomorrow": 1}, "has 'of_tomorrow'"),
    ({"rank_pattern": 3}, "no table .rank_pattern"),
])
def test_a_config_that_changes_what_matrices_mean_is_refused(
    flux: Path, tmp_path: Path, config: Mapping[str, Any], said: str
) -> None:
    tensors, _ = write(LAYOUTS["diffusers", "flux"], sizes(flux))
    told = {f"transformer.{name}": value for name, value in peft.LoraConfig(r=4, lora_alpha=4).to_dict().items()}
    assert reached(flux, tensors, tmp_path, told)
    with pytest.raises(ModelError, match=said):
        reached(flux, tensors, tmp_path, told | {f"transformer.{name}": value for name, value in config.items()})


def test_an_alpha_in_both_places_is_refused(flux: Path, tmp_path: Path) -> None:
    tensors, _ = write(LAYOUTS["alphas beside", "flux"], sizes(flux))
    with pytest.raises(ModelError, match=r"has two alphas for .*, one in its trainer's config"):
        reached(flux, tensors, tmp_path, {"transformer.r": 4, "transformer.lora_alpha": 4})


@pytest.mark.parametrize("text", ["{", "[" * 100_000, '{"transformer.r": NaN}', '{"a": 1, "a": 2}', "\ud83d\ude00"])
def test_a_config_that_is_no_json_is_refused(flux: Path, tmp_path: Path, text: str) -> None:
    tensors, _ = write(LAYOUTS["diffusers", "flux"], sizes(flux))
    save_file(tensors, tmp_path / "style.safetensors", {"lora_adapter_metadata": text.encode(
        "utf-16", "surrogatepass").decode("utf-16")})
    with pytest.raises(ModelError, match="a trainer's config that is not JSON"):
        with_loras(find(flux), read_loras([str(tmp_path / "style.safetensors")]))


WORDS = ["lora_unet_", "lora_te1_", "lora_te3_", "transformer.", "diffusion_model.", "lycoris_", "base_model.model.",
         "", "double_blocks_0_img_attn_qkv", "double_blocks.999999999.img_attn.qkv", "single_blocks.0.linear1",
         "x_embedder", ".lora_A.weight", ".lora_B.weight", ".lora_down.weight", ".lora_up.weight", ".alpha", ".diff",
         ".diff_b", ".lokr_w1", ".lokr_w2", ".lokr_w2_a", ".lokr_w2_b", ".hada_w1_a", ".dora_scale", "processor",
         ".", "default."]
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 4, 32, 96]), max_size=3)
VALUES = st.sampled_from([0.0, 1.0, -3.0, 1e38, float("nan"), float("-inf")])
TYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool])


def added(flux: Path, tensors: Tensors, folder: Path) -> Tensors:
    """All that a file adds, by weight."""
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "style.safetensors")
    checkpoint = with_loras(find(flux), read_loras([str(folder / "style.safetensors")]))
    return {f"{part.name}.{name}": update.to(torch.device("cpu")).rows(slice(None))
            for part in checkpoint.components.values() for lora in part.loras
            for name, update in read_updates(lora, part).items()}


def refused_or_added(flux: Path, tensors: Tensors, folder: Path) -> Tensors | None:
    """The same; None where the file is refused."""
    try:
        return added(flux, tensors, folder)
    except ModelError as error:
        assert " -> " in str(error) or "fetch it again" in str(error)
        return None


def differ(first: Tensors, second: Tensors | None) -> bool:
    return second is None or first.keys() != second.keys() or any(
        not torch.equal(first[name], second[name]) for name in first)


def without_effect(name: str, tensors: Tensors) -> bool:
    """Whether something that goes with a tensor is all zeros, or it is the alpha of a LoKr without products."""
    layer = re.sub(r"\.(lora|lokr|hada|down|up|alpha|diff|default).*", "", name)
    mates = {other: tensor for other, tensor in tensors.items() if re.sub(
        r"\.(lora|lokr|hada|down|up|alpha|diff|default).*", "", other) == layer}
    return (any(not tensor.float().any() for other, tensor in mates.items() if not other.endswith("alpha"))
            or (name.endswith("alpha") and f"{layer}.lokr_w1" in mates and f"{layer}.lokr_w2" in mates))


@pytest.mark.parametrize("row", sorted({row for row, family in LAYOUTS if family == "flux"}))
def test_every_tensor_of_a_file_matters(flux: Path, tmp_path: Path, row: str) -> None:
    """Whichever one is changed, what is added changes."""
    tensors = kohya(flux, row)
    before = added(flux, tensors, tmp_path)
    for name, tensor in tensors.items():
        assert differ(before, added(flux, tensors | {name: tensor * 2}, tmp_path)), name


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), row=st.sampled_from(sorted({row for row, family in LAYOUTS if family == "flux"})),
       kinds=st.lists(st.sampled_from(["rename", "drop", "shape", "add", "swap"]), max_size=3),
       name=st.lists(st.sampled_from(WORDS), min_size=1, max_size=3).map("".join), shape=SHAPES, value=VALUES,
       dtype=TYPES)
def test_a_changed_file_is_used_whole_or_refused(
    flux: Path, tmp_path: Path, seed: int, row: str, kinds: list[str], name: str, shape: list[int], value: float,
    dtype: torch.dtype
) -> None:
    """Each tensor matters, or has no effect beside zeros, or there is a ModelError, and never another error."""
    tensors, luck = kohya(flux, row), random.Random(seed)
    for kind in kinds:
        first, second = luck.choice(sorted(tensors)), luck.choice(sorted(tensors))
        if kind == "rename":
            tensors[name or "x"] = tensors.pop(first)
        if kind == "drop":
            tensors.pop(first)
        if kind in ("shape", "add"):
            tensors[first if kind == "shape" else name or "x"] = torch.full(shape, value).to(dtype)
        if kind == "swap":
            tensors[first], tensors[second] = tensors[second], tensors[first]
    before = refused_or_added(flux, tensors, tmp_path)
    if before is not None:
        chosen = luck.choice(sorted(tensors))
        other = (tensors[chosen].float() * 0.5 + 1).to(tensors[chosen].dtype)
        after = refused_or_added(flux, tensors | {chosen: other}, tmp_path)
        assert differ(before, after) or without_effect(chosen, tensors) or torch.equal(other, tensors[chosen])


def test_a_negative_alpha_turns_the_sign_around(flux: Path, tmp_path: Path) -> None:
    """diffusers' reader would not end."""
    tensors = low_rank(".lora_down.weight", ".lora_up.weight", -2.0)(ATTENTION, 32, 32)[0]
    save_file(tensors, tmp_path / "style.safetensors")
    part = with_loras(find(flux), read_loras([str(tmp_path / "style.safetensors")])).components["transformer"]
    (update,) = read_updates(part.loras[0], part).values()
    product = tensors[f"{ATTENTION}.lora_up.weight"] @ tensors[f"{ATTENTION}.lora_down.weight"]
    torch.testing.assert_close(update.rows(slice(None)), product * -0.5)
