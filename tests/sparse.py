"""Models with the configs and safetensors headers of the real ones, whose data are holes: nothing is on the disk.

Names and shard sizes follow the files of the hub, whose names are older than the library's module names.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from tests.tiny import clip_tokenizer, t5_tokenizer

SD3_LARGE = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "num_layers": 38, "attention_head_dim": 64,
    "num_attention_heads": 38, "joint_attention_dim": 4096, "caption_projection_dim": 2432,
    "pooled_projection_dim": 2048, "out_channels": 16, "pos_embed_max_size": 192, "qk_norm": "rms_norm",
}
QWEN_7B = {
    "text_config": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "rms_norm_eps": 1e-06,
    },
    "vision_config": {"hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584, "depth": 32},
    "tie_word_embeddings": False,
}

QWEN3_4B = {
    "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-06, "tie_word_embeddings": True,
}
KLEIN_4B = {
    "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680,
    "guidance_embeds": False,
}

Rename = Callable[[str], str]


def flux_dev(folder: Path, *, guidance: bool = True, text_layers: int = 24) -> Path:
    """FLUX.1-dev: a transformer of 23.80 GB, T5-XXL, CLIP-L and the VAE; `guidance=False` makes it FLUX.1-schnell.

    With fewer `text_layers` T5-XXL is smaller than the real one.
    """
    index = _index(folder, "FluxPipeline", scheduler=_scheduler(folder), vae=_vae(folder))
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=guidance)
    index["transformer"] = write(folder / "transformer", transformer, shard=9_990_000_000)
    index["text_encoder"] = _clip(folder / "text_encoder", CLIPTextModel)
    index["text_encoder_2"] = _t5(folder / "text_encoder_2", text_layers)
    return _finish(folder, index, {"tokenizer": "CLIPTokenizer", "tokenizer_2": "T5Tokenizer"})


def sd35_large(folder: Path) -> Path:
    """Stable Diffusion 3.5 Large: a transformer of 16.11 GB and a position table, two CLIPs, T5-XXL and the VAE."""
    index = _index(folder, "StableDiffusion3Pipeline", scheduler=_scheduler(folder), vae=_vae(folder))
    with torch.device("meta"):
        transformer = SD3Transformer2DModel(**SD3_LARGE)
    index["transformer"] = write(folder / "transformer", transformer, shard=9_990_000_000)
    index["text_encoder"] = _clip(folder / "text_encoder", CLIPTextModelWithProjection)
    index["text_encoder_2"] = _clip(
        folder / "text_encoder_2", CLIPTextModelWithProjection, hidden_size=1280, intermediate_size=5120,
        num_hidden_layers=32, num_attention_heads=20, projection_dim=1280, hidden_act="gelu",
    )
    index["text_encoder_3"] = _t5(folder / "text_encoder_3")
    names = {"tokenizer": "CLIPTokenizer", "tokenizer_2": "CLIPTokenizer", "tokenizer_3": "T5Tokenizer"}
    return _finish(folder, index, names)


def flux2_dev(folder: Path) -> Path:
    """FLUX.2-dev: a transformer of 64.45 GB, Mistral Small 3.2 of 48.02 GB and the VAE."""
    index = _index(folder, "Flux2Pipeline", scheduler=_scheduler(folder))
    with torch.device("meta"):
        transformer, vae = Flux2Transformer2DModel(), AutoencoderKLFlux2()
        encoder = Mistral3ForConditionalGeneration(Mistral3Config(tie_word_embeddings=False))
    index["transformer"] = write(folder / "transformer", transformer, shard=9_990_000_000)
    index["vae"] = write(folder / "vae", vae)
    index["text_encoder"] = write(folder / "text_encoder", encoder, shard=4_990_000_000, rename=_before_v5(
        ("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head."), ("model.", ""),
    ))
    index["tokenizer"] = ["transformers", "PixtralProcessor"]
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer" / "processor_config.json").write_text(json.dumps({"processor_class": "PixtralProcessor"}))
    return _finish(folder, index, {})


def qwen_image(folder: Path) -> Path:
    """Qwen-Image: a transformer of 40.86 GB, Qwen2.5-VL 7B of 16.58 GB and the VAE."""
    index = _index(folder, "QwenImagePipeline", scheduler=_scheduler(folder))
    with torch.device("meta"):
        transformer, vae = QwenImageTransformer2DModel(), AutoencoderKLQwenImage()
        encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**QWEN_7B))
    index["transformer"] = write(folder / "transformer", transformer, shard=4_990_000_000)
    index["vae"] = write(folder / "vae", vae)
    index["text_encoder"] = write(folder / "text_encoder", encoder, shard=4_990_000_000, rename=_before_v5(
        ("model.language_model.", "model."), ("model.visual.", "visual."),
    ))
    return _finish(folder, index, {"tokenizer": "Qwen2Tokenizer"})


def flux2_klein(folder: Path, *, distilled: bool = True) -> Path:
    """FLUX.2-klein-4B: a transformer of 7.75 GB, Qwen3 4B of 8.04 GB and the VAE; or the base model that it is of."""
    index = _index(folder, "Flux2KleinPipeline", scheduler=_scheduler(folder))
    with torch.device("meta"):
        transformer, vae = Flux2Transformer2DModel(**KLEIN_4B), AutoencoderKLFlux2()
        encoder = Qwen3ForCausalLM(Qwen3Config(**QWEN3_4B))
    index |= {"is_distilled": distilled}
    index["transformer"] = write(folder / "transformer", transformer)
    index["vae"] = write(folder / "vae", vae)
    index["text_encoder"] = write(folder / "text_encoder", encoder, shard=4_990_000_000)
    return _finish(folder, index, {"tokenizer": "Qwen2TokenizerFast"})


def z_image(folder: Path) -> Path:
    """Z-Image-Turbo: a transformer of 24.62 GB in float32, Qwen3 4B of 8.04 GB and the VAE of FLUX.1."""
    index = _index(folder, "ZImagePipeline", scheduler=_scheduler(folder), vae=_vae(folder))
    with torch.device("meta"):
        transformer, encoder = ZImageTransformer2DModel(), Qwen3Model(Qwen3Config(**QWEN3_4B))
    index["transformer"] = write(folder / "transformer", transformer, shard=9_990_000_000, dtype="F32")
    index["text_encoder"] = write(folder / "text_encoder", encoder, shard=4_990_000_000,
                                  rename=lambda name: f"model.{name}")
    return _finish(folder, index, {"tokenizer": "Qwen2Tokenizer"})


def write(
    folder: Path, model: Any, *, shard: int = 10**12, rename: Rename = str, dtype: str = "BF16"
) -> list[str]:
    """Write the model's config and its tensors as holes, in files of at most `shard` bytes; the index entry."""
    library = "diffusers" if hasattr(model, "save_config") else "transformers"
    if library == "diffusers":
        model.save_config(folder)
    else:
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
    stem = "diffusion_pytorch_model" if library == "diffusers" else "model"
    stored = model.state_dict(keep_vars=True)
    kept = {id(tensor): rename(name) for name, tensor in reversed(stored.items())}
    tensors = {kept[id(tensor)]: tensor for tensor in {id(tensor): tensor for tensor in stored.values()}.values()}
    files = list(_split(tensors, shard, dtype))
    names = [f"{stem}.safetensors"]
    if len(files) > 1:
        names = [f"{stem}-{at:05}-of-{len(files):05}.safetensors" for at in range(1, len(files) + 1)]
        weight_map = {tensor: name for name, file in zip(names, files, strict=True) for tensor in file}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for name, file in zip(names, files, strict=True):
        hollow(folder / name, file)
    return [library, type(model).__name__]


def hollow(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...], int]]) -> None:
    """A safetensors file with a true header and a hole for its data; `tensors` gives dtype, shape and bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)


def _split(
    tensors: Mapping[str, torch.Tensor], shard: int, dtype: str
) -> Iterator[dict[str, tuple[str, tuple[int, ...], int]]]:
    file: dict[str, tuple[str, tuple[int, ...], int]] = {}
    full = 0
    for name, tensor in tensors.items():
        kind, wide = (dtype, {"BF16": 2, "F32": 4}[dtype]) if tensor.is_floating_point() else ("I64", 8)
        size = wide * math.prod(tensor.shape)
        if full + size > shard and file:
            yield file
            file, full = {}, 0
        file[name] = (kind, tuple(tensor.shape), size)
        full += size
    yield file


def _before_v5(*pairs: tuple[str, str]) -> Rename:
    def rename(name: str) -> str:
        new, old = next(((new, old) for new, old in pairs if name.startswith(new)), ("", ""))
        return old + name.removeprefix(new)
    return rename


def _index(folder: Path, pipeline: str, **parts: list[str]) -> dict[str, object]:
    folder.mkdir(parents=True, exist_ok=True)
    return {"_class_name": pipeline, "_diffusers_version": "0.42.1", **parts}


def _finish(folder: Path, index: dict[str, object], tokenizers: Mapping[str, str]) -> Path:
    for name, class_name in tokenizers.items():
        make = t5_tokenizer if class_name == "T5Tokenizer" else clip_tokenizer
        make(folder / name).save_pretrained(folder / name)
        index[name] = ["transformers", class_name]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def _scheduler(folder: Path) -> list[str]:
    FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True).save_config(folder / "scheduler")
    return ["diffusers", "FlowMatchEulerDiscreteScheduler"]


def _vae(folder: Path) -> list[str]:
    with torch.device("meta"):
        model = AutoencoderKL(
            sample_size=1024, latent_channels=16, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False,
        )
    return write(folder / "vae", model)


def _clip(folder: Path, cls: type[nn.Module], **config: object) -> list[str]:
    large = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
             "projection_dim": 768, "eos_token_id": 2}
    with torch.device("meta"):
        model = cls(CLIPTextConfig(**{**large, **config}))
    prefix = "text_model." if cls is CLIPTextModel else ""
    return write(folder, model, rename=lambda name: prefix + name)


def _t5(folder: Path, layers: int = 24) -> list[str]:
    config = T5Config(
        d_model=4096, d_ff=10240, d_kv=64, num_layers=layers, num_heads=64, vocab_size=32128,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = T5EncoderModel(config)
    return write(folder, model, shard=4_995_000_000)
