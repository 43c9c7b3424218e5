"""Training: curriculum, loss, modules, metrics, optimiser, step, checkpoints and the loop that joins them."""
