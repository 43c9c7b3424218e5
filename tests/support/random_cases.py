"""How many random configurations test each implementation: 5 in the suite, 50 with `-m slow`."""

from doubles import slow_after

CASES = slow_after(5, range(50))
VALUE, GRADIENT = 1e-5, 1e-5  # relative, of the largest value and of a gradient's norm
KERNEL_GRADIENT = 1e-4  # of a kernel for an accelerator
# The results are the same and compiling takes half as long.
QUICK = {"xla_backend_optimization_level": 0}
