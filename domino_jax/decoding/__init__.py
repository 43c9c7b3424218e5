"""Speculative decoding: the compiled loop, its acceptance rules, and answers to prompts."""
