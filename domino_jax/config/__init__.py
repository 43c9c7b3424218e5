"""What a model is and what a run is told, as frozen dataclasses. No jax here."""
