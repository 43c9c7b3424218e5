"""Acceptance length, its intervals and baselines, speed, and servers beside ours."""
