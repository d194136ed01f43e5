"""Tiny random checkpoints of the real classes, built offline in a second.

The VAE has four levels, so that its scale factor is 8 as in the real one; `guidance=True` gives the guidance
embedding that FLUX.1-dev has and the demo checkpoint lacks.
"""

import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedTokenizerBase,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

SENTENCES = (
    "a red circle on a blue background",
    "a photo of a dog with a cat-like look",
    "two small green squares",
    "the quick brown fox jumps over the lazy dog",
)
# Of every kind: blocks, what a table is made of, and what is neither.
LORA_LAYERS = (
    "x_embedder", "time_text_embed.timestep_embedder.linear_1", "norm_out.linear", "transformer_blocks.0.norm1.linear",
    "transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.add_k_proj", "transformer_blocks.1.ff.net.0.proj",
    "single_transformer_blocks.0.norm.linear", "single_transformer_blocks.0.proj_mlp",
    "single_transformer_blocks.3.proj_out",
)


def clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """A byte-level BPE tokenizer without merges."""
    letters = list(bytes_to_unicode().values())
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def t5_tokenizer(folder: Path, sentences: Iterable[str] = SENTENCES) -> T5Tokenizer:
    """A real sentencepiece model of a handful of sentences."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(list(sentences) * 20), model_writer=model, vocab_size=80, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(model.getvalue())
    return T5Tokenizer.from_pretrained(folder)


def clip(tokenizer: PreTrainedTokenizerBase, width: int = 32) -> CLIPTextModel:
    """A CLIP text encoder with a pooled output of `width`."""
    size = len(tokenizer)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=size, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
            num_attention_heads=4, projection_dim=width, bos_token_id=size - 2, eos_token_id=size - 1,
            pad_token_id=size - 1,
        )
    ).eval()


def t5(tokenizer: PreTrainedTokenizerBase, width: int = 32, layers: int = 2) -> T5EncoderModel:
    """A T5 encoder with embeddings of `width`."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=2 * width, num_layers=layers, num_heads=4,
            feed_forward_proj="gated-gelu", dropout_rate=0.0,
        )
    ).eval()


def vae(latent_channels: int = 4) -> AutoencoderKL:
    """An AutoencoderKL with scale factor 8."""
    return AutoencoderKL(
        sample_size=32, block_out_channels=(4, 8, 8, 8), layers_per_block=1, latent_channels=latent_channels,
        norm_num_groups=1, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609,
        scaling_factor=1.5035, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    ).eval()


def flux_transformer(
    doubles: int = 2, singles: int = 4, heads: int = 2, guidance: bool = True, text: int = 32
) -> FluxTransformer2DModel:
    """A FLUX transformer; `heads` times 16 is its width."""
    return FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=doubles, num_single_layers=singles, attention_head_dim=16,
        num_attention_heads=heads, joint_attention_dim=text, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance,
    ).eval()


def flux(
    folder: Path, *, guidance: bool = True, doubles: int = 2, singles: int = 4, heads: int = 2,
    text: int = 32, text_layers: int = 2, seed: int = 0, shard: str = "10GB",
) -> Path:
    """A whole FLUX checkpoint at `folder`; `shard` is the largest safetensors file, such as "2MB"."""
    torch.manual_seed(seed)
    first, second = clip_tokenizer(folder / "tokenizer"), t5_tokenizer(folder / "tokenizer_2")
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae(),
        text_encoder=clip(first),
        tokenizer=first,
        text_encoder_2=t5(second, text, text_layers),
        tokenizer_2=second,
        transformer=flux_transformer(doubles, singles, heads, guidance, text),
    ).save_pretrained(folder, max_shard_size=shard)
    return folder


def lora(
    path: Path, model: Path, *, rank: int = 4, layers: Sequence[str] = LORA_LAYERS, seed: int = 0,
    alpha: float | None = None,
) -> Path:
    """A LoRA of a checkpoint's transformer, strong enough to show; with `alpha` it says one for each layer."""
    torch.manual_seed(seed)
    weights = load_file(model / "transformer" / "diffusion_pytorch_model.safetensors")
    tensors: dict[str, torch.Tensor] = {}
    for layer in layers:
        out, into = weights[f"{layer}.weight"].shape
        tensors[f"transformer.{layer}.lora_A.weight"] = torch.randn(rank, into) / 8
        tensors[f"transformer.{layer}.lora_B.weight"] = torch.randn(out, rank) / 8
        if alpha is not None:
            tensors[f"transformer.{layer}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path)
    return path
