"""The loss, its objectives and curriculum, and the trainer modules that compute them."""
