"""Conversations to token rows, and rows to batches."""
