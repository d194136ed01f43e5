"""The demo's two tokenizers and text encoders, in FLUX's layout: CLIP with BPE, T5 with sentencepiece."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

TEXT_TOKENS = 32
"""Tokens that T5 sees of a prompt."""
CLIP_TOKENS = 77
"""Tokens that CLIP sees of a prompt."""
CLIP_WIDTH = 64
T5_WIDTH = 192
# T5's buckets of distances: one, two and three tokens back and ahead.
NEIGHBORS = (1, 17, 2, 18, 3, 19)


def build_clip_tokenizer(folder: Path, words: Sequence[str]) -> CLIPTokenizer:
    """A byte-level BPE in which each of the words is one token; CLIP's two files of it are written to the folder.

    Merges that are as frequent come in another order each time, so for the same words those of the folder stay.
    """
    start, end = "<|startoftext|>", "<|endoftext|>"
    known, merges = folder / "words.json", folder / "merges.txt"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if not known.exists() or json.loads(known.read_text()) != [*words]:
        folder.mkdir(parents=True, exist_ok=True)
        _trained_bpe(words, alphabet).model.save(str(folder))
        known.write_text(json.dumps([*words]))
    # CLIP's vocabulary holds every byte twice, inside a word and at its end, so that no text is unknown.
    singles = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    pairs = [line for line in merges.read_text().splitlines() if line and not line.startswith("#")]
    tokens = [*singles, *("".join(pair.split()) for pair in pairs), start, end]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=[tuple(p.split()) for p in pairs], model_max_length=CLIP_TOKENS)


def _trained_bpe(words: Sequence[str], alphabet: list[str]) -> Tokenizer:
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.train_from_iterator(
        [*words, ",", "."] * 10,
        trainers.BpeTrainer(
            vocab_size=2000, min_frequency=2, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
        ),
    )
    return bpe


def build_t5_tokenizer(folder: Path, words: Sequence[str]) -> T5Tokenizer:
    """A sentencepiece model of these words, blind to case, written to the folder; all other letters are unknown."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([", ."] * 100),
        model_writer=written,
        user_defined_symbols=["\u2581" + word for word in words],
        vocab_size=160,
        hard_vocab_limit=False,
        normalization_rule_name="nmt_nfkc_cf",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(written.getvalue())
    return T5Tokenizer.from_pretrained(folder, extra_ids=0, model_max_length=TEXT_TOKENS)


def build_clip_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """One layer of CLIP text: only its pooled output is used."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=CLIP_WIDTH,
            intermediate_size=4 * CLIP_WIDTH,
            projection_dim=CLIP_WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=CLIP_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_t5_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """Four layers of T5: its last hidden state is the prompt's embedding. Six heads begin at a neighbor each."""
    model = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=T5_WIDTH,
            d_kv=32,
            d_ff=512,
            num_layers=4,
            num_heads=12,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )
    # From its small random start the bias takes very long to learn that words have an order.
    with torch.no_grad():
        bias = position_bias(model)
        for head, bucket in enumerate(NEIGHBORS):
            bias[bucket, head] += 2
    return model


def position_bias(t5: T5EncoderModel) -> torch.nn.Parameter:
    """What each head adds to attention by the distance of two tokens [buckets, heads]; all layers share it."""
    bias: torch.nn.Parameter = t5.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    return bias
