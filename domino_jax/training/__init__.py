"""What only a run needs, kept together so that decoding and interop never import any of it.

Each part builds on those before it:

    curriculum, loss, objectives, modules    what a batch costs, as functions of arrays
    metrics, window, optimizer               what is measured of it, and what a gradient does
    step, program                            one update, and what is compiled of it
    records, checkpoint, run_directory       what a run leaves on disk, and who may resume it
    inputs, preflight, prepare, loop         from a configuration to the last checkpoint
"""
