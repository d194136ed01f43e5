"""The simulated cards themselves: what they promise to the tests that run on them."""

import pytest
import torch


def test_limit(cards):
    first, second = cards(1000, 2000)
    held = torch.empty(1000, dtype=torch.uint8, device=first)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate 1 bytes"):
        torch.empty(1, dtype=torch.uint8, device=first)
    assert held.numel()
