"""In a tokenizer's place, where only the number of tokens matters."""

from typing import Any

import torch


class FakeTokenizer:
    """Answers as tokenizers and processors do, with as many tokens as the caller has room for."""

    model_max_length = 77

    def __call__(self, text: Any = None, max_length: int | None = None, **options: Any) -> "Tokens":
        count = 1 if isinstance(text, str) else len(text)
        return Tokens.of(count, max_length or self.model_max_length)

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
        """One text for each row."""
        return [""] * len(tokens)


class Tokens(dict[str, torch.Tensor]):
    """Tokens and their mask, by key or by attribute."""

    @classmethod
    def of(cls, rows: int, length: int) -> "Tokens":
        """Rows of `length` tokens, none of them padding."""
        ones = torch.ones((rows, length), dtype=torch.int64)
        return cls(input_ids=ones, attention_mask=ones.clone())

    def __getattr__(self, name: str) -> torch.Tensor:
        if name not in self:
            raise AttributeError(name)
        return self[name]

    def to(self, device: Any) -> "Tokens":
        """The tokens on `device`."""
        return Tokens({name: tensor.to(device) for name, tensor in self.items()})
