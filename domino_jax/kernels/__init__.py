"""The operations that cost the time and the memory, a file each, in three parts.

First the *definition*: plain jnp, short enough to be read as the mathematics, differentiated by
JAX. Then *implementations* for a platform, each compared with the definition in values and
gradients by `tests/kernels`. Last the *choice*, made where a program is lowered
(`jax.lax.platform_dependent`) and not where it is traced: a program for a TPU may be traced on a
laptop. A form that cannot be traced everywhere is never a branch there.

What was measured on a CPU belongs to a CPU's implementation and never to a program for a TPU or a
GPU. Such a form runs in a name scope `cpu_...`: `tests/kernels/test_lowering.py` lowers a training
step and a decoding cycle for each platform and looks for it.

Axis letters: B batch, S context length, T tokens of a pass, N blocks, K block size, M predictions
of a block, D hidden width, V vocabulary, R low-rank width, H query heads, KV key-value heads, G
query heads per key-value head (in `draft/` it is the width of the GRU).
"""
