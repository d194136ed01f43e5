"""Tiny random checkpoints of further families: real classes, built offline in about a second each.

The VAEs have four levels, so that their scale factor is 8 as in the real ones, and `levels` makes them odd.
"""

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    UMT5Config,
    UMT5EncoderModel,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tests import tiny

WIDTH = 32
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content if message.content is string else message.content[0].text }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen_tokenizer(folder: Path) -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer without merges, with the marks of a chat."""
    words = [*bytes_to_unicode().values(), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = Qwen2Tokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHAT
    return tokenizer


def qwen3_config(vocabulary: int, layers: int) -> Qwen3Config:
    """A Qwen3 of width `WIDTH`."""
    return Qwen3Config(
        vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, max_position_embeddings=512,
    )


def z_image(folder: Path, *, levels: int = 4) -> Path:
    """A Z-Image checkpoint; the VAE's scale factor is 2 to the power of `levels` - 1."""
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer(folder / "tokenizer")
    ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(levels),
        text_encoder=Qwen3Model(qwen3_config(len(tokenizer), 3)).eval(),
        tokenizer=tokenizer,
        transformer=ZImageTransformer2DModel(
            in_channels=4, dim=WIDTH, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=WIDTH,
            axes_dims=[4, 6, 6], axes_lens=[512, 64, 64],
        ).eval(),
    ).save_pretrained(folder)
    return folder


def tiny_vae(levels: int, channels: int = 4) -> AutoencoderKL:
    """An AutoencoderKL with scale factor 2 to the power of `levels` - 1."""
    return AutoencoderKL(
        block_out_channels=(4, *(8,) * (levels - 1)), layers_per_block=1, latent_channels=channels,
        norm_num_groups=1, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1159,
        scaling_factor=0.3611, down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
    ).eval()


def qwen_image(folder: Path) -> Path:
    """A Qwen-Image checkpoint: its VAE is one for video, and its config has no block_out_channels."""
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer(folder / "tokenizer")
    QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02,
        ),
        vae=AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.1] * 4,
            latents_std=[2.0] * 4,
        ).eval(),
        text_encoder=qwen_vl(len(tokenizer)),
        tokenizer=tokenizer,
        transformer=QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=WIDTH, axes_dims_rope=(4, 6, 6),
        ).eval(),
    ).save_pretrained(folder)
    return folder


def qwen_vl(vocabulary: int) -> Qwen2_5_VLForConditionalGeneration:
    """A Qwen2.5-VL whose text part has the width `WIDTH`."""
    text = {
        "vocab_size": vocabulary, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": None,
        "eos_token_id": 0,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()


def sd3(folder: Path) -> Path:
    """A Stable Diffusion 3 checkpoint with its three text encoders."""
    torch.manual_seed(0)
    first, second, third = (
        tiny.clip_tokenizer(folder / "tokenizer"), tiny.clip_tokenizer(folder / "tokenizer_2"),
        tiny.t5_tokenizer(folder / "tokenizer_3"),
    )
    StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(4),
        text_encoder=projected_clip(first, 16),
        tokenizer=first,
        text_encoder_2=projected_clip(second, 16),
        tokenizer_2=second,
        text_encoder_3=tiny.t5(third, WIDTH),
        tokenizer_3=third,
        transformer=SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=WIDTH, caption_projection_dim=32, pooled_projection_dim=32,
            pos_embed_max_size=16, dual_attention_layers=(0,), qk_norm="rms_norm",
        ).eval(),
    ).save_pretrained(folder)
    return folder


def projected_clip(tokenizer: CLIPTokenizer, width: int) -> CLIPTextModelWithProjection:
    """A CLIP text encoder with a projected output of `width`."""
    size = len(tokenizer)
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=size, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
            num_attention_heads=2, projection_dim=width, bos_token_id=size - 2, eos_token_id=size - 1,
            pad_token_id=size - 1,
        )
    ).eval()


def klein(folder: Path, *, distilled: bool = True) -> Path:
    """A FLUX.2 klein checkpoint, distilled or base; of its text encoder the layers 9, 18 and 27 are read."""
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer(folder / "tokenizer")
    Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=flux2_vae(),
        text_encoder=Qwen3ForCausalLM(qwen3_config(len(tokenizer), 27)).eval(),
        tokenizer=tokenizer,
        transformer=flux2_transformer(guidance=False),
        is_distilled=distilled,
    ).save_pretrained(folder)
    return folder


def flux2(folder: Path) -> Path:
    """A FLUX.2 dev checkpoint; of its text encoder the layers 10, 20 and 30 are read.

    A plain tokenizer stands where the real model has a PixtralProcessor, which needs torchvision also for text.
    """
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer(folder / "tokenizer")
    Flux2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=flux2_vae(),
        text_encoder=mistral3(len(tokenizer), 30),
        tokenizer=tokenizer,
        transformer=flux2_transformer(guidance=True),
    ).save_pretrained(folder)
    return folder


def mistral3(vocabulary: int, layers: int) -> Mistral3ForConditionalGeneration:
    """A Mistral 3 whose text part has the width `WIDTH`."""
    text = {
        "model_type": "mistral", "vocab_size": vocabulary, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": layers, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
        "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": 0,
    }
    vision = {
        "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "head_dim": 8, "image_size": 32, "patch_size": 8,
    }
    return Mistral3ForConditionalGeneration(
        Mistral3Config(text_config=text, vision_config=vision, image_token_index=0)
    ).eval()


def flux2_vae() -> AutoencoderKLFlux2:
    """The VAE of FLUX.2, with scale factor 8 and statistics of its latents."""
    return AutoencoderKLFlux2(
        block_out_channels=(4, 8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=1,
        mid_block_add_attention=False,
    ).eval()


def flux2_transformer(guidance: bool) -> Flux2Transformer2DModel:
    """A FLUX.2 transformer that reads three layers of a text encoder of width `WIDTH`."""
    return Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=3 * WIDTH, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=guidance,
    ).eval()


def wan(folder: Path) -> Path:
    """A Wan text-to-video checkpoint."""
    torch.manual_seed(0)
    tokenizer = tiny.t5_tokenizer(folder / "tokenizer")
    WanPipeline(
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0,
        ),
        vae=AutoencoderKLWan(
            base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.1] * 4,
            latents_std=[2.0] * 4,
        ).eval(),
        text_encoder=UMT5EncoderModel(
            UMT5Config(vocab_size=len(tokenizer), d_model=WIDTH, d_kv=8, d_ff=2 * WIDTH, num_layers=2, num_heads=4)
        ).eval(),
        tokenizer=tokenizer,
        transformer=WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=WIDTH,
            freq_dim=16, ffn_dim=64, num_layers=2, rope_max_seq_len=32,
        ).eval(),
    ).save_pretrained(folder)
    return folder
