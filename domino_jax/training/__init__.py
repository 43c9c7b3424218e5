"""Training of a draft: what only a run needs, which decoding and interop never import.

step, program, optimizer, metrics    one update, and what is measured of it
records, checkpoint, run_directory   what a run leaves on disk, and who may resume it
inputs, preflight, prepare, loop     from a configuration to the last checkpoint
"""
