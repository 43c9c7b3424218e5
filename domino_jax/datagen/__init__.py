"""Prompts, answers and hidden states that the target makes for training."""
