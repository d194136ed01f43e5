"""What the text encoders do not see of a prompt: upstream cuts it with a line in a log, or with none."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers import ModularPipeline
from torch import nn

from stages.state import Value

PROMPTS = ("prompt", "negative_prompt")
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
        reader = getattr(self._pipe, tokenizer)
        reader = getattr(reader, "tokenizer", reader)  # FLUX.2 has a processor, which holds one.
        limit = reader.model_max_length
        if "CLIP" not in type(reader).__name__ and isinstance(inputs.get("max_sequence_length"), int):
            limit = inputs["max_sequence_length"]
        tokens = reader(prompt, add_special_tokens=False, truncation=False)["input_ids"]
        # Where a whole template fits, it is the prompt's own length that counts; Qwen-Image cuts behind the encoder.
        seen = [found for read in self._read[tokenizer] if len(read) == limit and (found := _seen(tokens, read))]
        count = max(seen) if seen else limit - reader.num_special_tokens_to_add()
        return str(reader.decode(tokens[count:])) if len(tokens) > count else ""


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
