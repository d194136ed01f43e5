"""In a tokenizer's place, where only the number of tokens matters."""

from typing import Any

import torch
from transformers import BatchEncoding


class FakeTokenizer:
    """Answers as tokenizers and processors do, with as many tokens as there is room for, none of them padding."""

    model_max_length = 77

    def __call__(self, text: Any = None, max_length: int | None = None, **options: Any) -> BatchEncoding:
        rows, length = 1 if isinstance(text, str) else len(text), max_length or self.model_max_length
        ones = torch.ones((rows, length), dtype=torch.int64)
        return BatchEncoding({"input_ids": ones, "attention_mask": ones.clone()})

    def apply_chat_template(self, messages: Any, tokenize: bool = True, **options: Any) -> Any:
        """The messages as tokens, or as they are."""
        return self(messages, **options) if tokenize else str(messages)

    def num_special_tokens_to_add(self) -> int:
        """None."""
        return 0

    def decode(self, tokens: torch.Tensor) -> str:
        """No text."""
        return ""

    def batch_decode(self, tokens: torch.Tensor, **options: Any) -> list[str]:
        """No text for each row."""
        return [""] * len(tokens)
