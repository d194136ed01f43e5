"""A diffusers pipeline cut into stages: encode, denoise, decode, and how one of them runs."""
