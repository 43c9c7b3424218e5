"""Tiny models as GGUF files."""

from torch_models import tiny, tiny_gguf, vocabulary

__all__ = ["tiny", "tiny_gguf", "vocabulary"]
