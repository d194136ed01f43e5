"""What the text encoders do not see or know of a prompt: upstream says so in a line of a log, or not at all."""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers import ModularPipeline
from torch import nn

from stages.state import Value

PROMPTS = ("prompt", "negative_prompt")
# A vocabulary of so few tokens is told word by word.
_SMALL_VOCABULARY = 200
# So many tokens of a prompt are found again in what an encoder reads.
_CLUE = 8


class PromptReader:
    """Listens to what the text encoders of a pipeline read."""

    def __init__(self, pipe: ModularPipeline) -> None:
        self._pipe = pipe
        self._tokenizers = [name for name, part in pipe.components.items()
                            if name.startswith("tokenizer") and part is not None]
        self._read: dict[str, list[list[int]]] = {name: [] for name in self._tokenizers}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note the tokens that the encoders are given in the block and that their masks let through."""
        with ExitStack() as hooks:
            for name in self._tokenizers:
                encoder = getattr(self._pipe, name.replace("tokenizer", "text_encoder"), None)
                if isinstance(encoder, nn.Module):
                    hook = encoder.register_forward_pre_hook(self._hook(name), with_kwargs=True)
                    hooks.callback(hook.remove)
            yield

    def unseen(self, inputs: Mapping[str, Value]) -> Iterator[str]:
        """A warning for each prompt of the inputs whose end no encoder saw."""
        for name in PROMPTS:
            ends = [self._unseen(tokenizer, inputs, str(inputs[name])) for tokenizer in self._tokenizers
                    if name in inputs]
            if ends and all(ends):
                yield (f"the {name.replace('_', ' ')} is too long for the model, which does not see its end: "
                       f"{min(ends, key=len)!r}")

    def unknown(self, inputs: Mapping[str, Value]) -> Iterator[str]:
        """A warning for each prompt of the inputs with words that an encoder has no token for."""
        for name, tokenizer in itertools.product(PROMPTS, self._tokenizers):
            reader = self._reader(tokenizer)
            words = _unknown_words(reader, str(inputs[name])) if name in inputs else ()
            if words:
                told = f"{tokenizer.replace('tokenizer', 'text_encoder')} does not know {', '.join(map(repr, words))} "
                known = _vocabulary(reader)
                yield (f"{told}of the {name.replace('_', ' ')}, so the picture will not show it"
                       + (f"; it knows: {', '.join(known)}" if known else ""))

    def _reader(self, tokenizer: str) -> Any:
        reader = getattr(self._pipe, tokenizer)
        return getattr(reader, "tokenizer", reader)  # FLUX.2 has a processor, which holds one.

    def _hook(self, name: str) -> Any:
        def heard(encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ids, mask = kwargs.get("input_ids", args[0] if args else None), kwargs.get("attention_mask")
            # A rehearsal has shapes alone, and an encoder without a mask reads what its tokenizer says.
            if isinstance(ids, torch.Tensor) and isinstance(mask, torch.Tensor) and not ids.is_meta:
                self._read[name] += [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)]

        return heard

    def _unseen(self, tokenizer: str, inputs: Mapping[str, Value], prompt: str) -> str:
        """The end of a prompt that a tokenizer's encoder does not see.

        CLIP reads what its tokenizer says (77 tokens), every other encoder as many tokens as the request gives it,
        less those of the template that its prompt stands in. In FLUX.1 the cut in CLIP is usual, and harmless while T5
        reads on.
        """
        reader = self._reader(tokenizer)
        limit = reader.model_max_length
        if "CLIP" not in type(reader).__name__ and isinstance(inputs.get("max_sequence_length"), int):
            limit = inputs["max_sequence_length"]
        tokens = reader(prompt, add_special_tokens=False, truncation=False)["input_ids"]
        # Where a whole template fits, it is the prompt's own length that counts; Qwen-Image cuts behind the encoder.
        seen = [found for read in self._read[tokenizer] if len(read) == limit and (found := _seen(tokens, read))]
        count = max(seen) if seen else limit - reader.num_special_tokens_to_add()
        return str(reader.decode(tokens[count:])) if len(tokens) > count else ""


def _unknown_words(reader: Any, prompt: str) -> list[str]:
    """The words, as the prompt has them, in which the tokenizer finds letters that it has no token for."""
    # CLIP calls the end of a text unknown; its tokens are bytes, so nothing is.
    if not getattr(reader, "is_fast", False) or reader.unk_token_id in (None, reader.eos_token_id):
        return []
    read = reader(prompt, add_special_tokens=False, truncation=False, return_offsets_mapping=True)
    spots = [spot for token, spot in zip(read["input_ids"], read["offset_mapping"], strict=True)
             if token == reader.unk_token_id]
    words = [word for word in re.finditer(r"\w+|[^\w\s]+", prompt)
             if any(first < word.end() and last > word.start() for first, last in spots)]
    return list(dict.fromkeys(word.group() for word in words))


def _vocabulary(reader: Any) -> list[str]:
    """The words that a tokenizer has tokens for, sorted, if they are few."""
    vocabulary = reader.get_vocab()
    words = {token.removeprefix("\u2581") for token in vocabulary if token.startswith("\u2581")}
    return sorted(word for word in words if word.isalpha()) if len(vocabulary) <= _SMALL_VOCABULARY else []


def _seen(tokens: Sequence[int], read: Sequence[int]) -> int:
    """How many tokens of a prompt are in what an encoder reads; 0 where the prompt is not found there.

    The first token may be another in a template, where what stands before it is a part of it.
    """
    for first in (0, 1):
        clue = list(tokens[first : first + _CLUE])
        for at in range(len(read) - len(clue) + 1) if clue else ():
            if read[at : at + len(clue)] == clue:
                same = next((number for number, (ours, theirs) in enumerate(
                    zip(tokens[first:], read[at:], strict=False)) if ours != theirs), len(read) - at)
                return first + min(same, len(tokens) - first)
    return 0
