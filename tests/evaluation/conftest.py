"""Weights of the toy target."""

from toy_models import target_params

__all__ = ["target_params"]
