"""Formats of others: the Hugging Face draft checkpoint, both ways."""
