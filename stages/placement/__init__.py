"""Where weights live, and how tensors get from card to card."""
