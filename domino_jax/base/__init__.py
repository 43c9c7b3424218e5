"""Errors, strict parsing, files, progress and the names of a step's parts."""
