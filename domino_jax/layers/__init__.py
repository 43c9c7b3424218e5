"""Parts that target and draft share."""
