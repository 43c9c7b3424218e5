"""The frozen target: its model, its loader and the conversion of GGUF files."""
