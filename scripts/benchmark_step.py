"""One optimisation step of a Domino draft, here and in NeMo AutoModel 0.7.0, on the same weights, inputs and anchors.

Each side runs in its own process and waits for its turn; the two alternate, so that a busy moment hits both. Prints
medians, peak memory, the arithmetic of a step and the share of the measured float32 matrix-product peak; the last line
is JSON. NeMo AutoModel must be installed beside the project (`pip install -e '.[test]'`, then
`pip install --no-deps nemo-automodel==0.7.0`).
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from domino_jax.config import LossConfig
from domino_jax.model_config import DraftConfig

CONFIG = DraftConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=3,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    max_position_embeddings=8192,
    block_size=16,
    mask_token_id=49151,
    num_target_layers=30,
    target_layer_ids=(1, 14, 27),
    emb_dim=256,
    gru_hidden_dim=1024,
    pure_draft_prefix_len=1,
    shift_label=True,
)
WORKLOADS = {"small": (512, 64), "wide": (512, 256), "long": (4096, 64)}  # S, N
LAMBDA_BASE, LEARNING_RATE, BETAS = 0.5, 6e-4, (0.9, 0.95)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workload", choices=WORKLOADS, default="small")
    parser.add_argument("--rounds", type=int, default=7, help="measured steps of each side, after two to warm up")
    chunk = LossConfig.chunk_blocks
    parser.add_argument("--chunk-blocks", type=int, default=chunk, help="blocks whose logits exist together; 0 for all")
    parser.add_argument("--worker", choices=("ours", "nemo"), help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        run_worker(options)
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    """Starts both sides, lets them take turns, prints the figures."""
    with tempfile.TemporaryDirectory() as directory:
        write_inputs(Path(directory), options.workload)
        sides = {name: Side(name, directory, options) for name in ("ours", "nemo")}
        for index in range(options.rounds + 2):
            for side in sides.values():
                side.step(measured=index >= 2)
            print(f"round {index}: " + ", ".join(f"{s.name} {s.last:.2f} s" for s in sides.values()), file=sys.stderr)
        ours, nemo = (side.finish() for side in sides.values())
    medians = {side.name: statistics.median(side.seconds) for side in sides.values()}
    flops = step_flops(CONFIG, *WORKLOADS[options.workload])
    peak = max(side["matmul_flops_per_second"] for side in (ours, nemo))
    figures = {
        "workload": options.workload,
        "ratio": medians["nemo"] / medians["ours"],
        "rss_ratio": ours["peak_bytes"] / nemo["peak_bytes"],
        "peak_share": flops / medians["ours"] / peak,
        "ours_seconds": medians["ours"],
        "nemo_seconds": medians["nemo"],
        "ours_peak_bytes": ours["peak_bytes"],
        "nemo_peak_bytes": nemo["peak_bytes"],
        "step_flops": flops,
        "matmul_flops_per_second": peak,
        "losses": [ours["loss"], nemo["loss"]],
        "rounds": options.rounds,
        "chunk_blocks": options.chunk_blocks,
        "hardware": hardware(),
        "revision": revision(),
    }
    print(f"workload {options.workload}: a step of {flops / 1e12:.3f} TFLOP, {options.rounds} alternating rounds")
    print(f"  here          {medians['ours']:.3f} s (median), peak {ours['peak_bytes'] / 2**30:.2f} GiB")
    print(f"  NeMo 0.7.0    {medians['nemo']:.3f} s (median), peak {nemo['peak_bytes'] / 2**30:.2f} GiB")
    print(f"  ratio {figures['ratio']:.2f}x, memory {figures['rss_ratio']:.2f}x of NeMo's, ", end="")
    print(f"{figures['peak_share']:.0%} of {peak / 1e9:.0f} GFLOP/s")
    print(json.dumps(figures))


class Side:
    """One worker process and the times of its steps."""

    def __init__(self, name: str, directory: str, options: argparse.Namespace) -> None:
        self.name, self.seconds, self.last = name, [], 0.0
        words = ["--worker", name, "--directory", directory, "--workload", options.workload]
        words += ["--chunk-blocks", str(options.chunk_blocks)]
        self._process = subprocess.Popen(
            [sys.executable, __file__, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._ask("ready")

    def step(self, *, measured: bool) -> None:
        """Runs one step while the other side waits."""
        self.last = self._ask("step")["seconds"]
        if measured:
            self.seconds.append(self.last)

    def finish(self) -> dict[str, float]:
        """Peak memory, last loss and the speed of this side's matrix products; ends the process."""
        figures = self._ask("finish")
        self._process.communicate()
        return figures

    def _ask(self, word: str) -> dict[str, float]:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"the {self.name} side ended: exit code {self._process.wait()}")
        return json.loads(line)


def write_inputs(directory: Path, workload: str) -> None:
    """A float32 draft checkpoint and one batch for both sides."""
    import jax
    from flax.core import meta

    from domino_jax.draft.backbone import DraftModel, init_variables
    from domino_jax.interop.hf import save_hf_draft

    length, anchors = WORKLOADS[workload]
    params = meta.unbox(init_variables(DraftModel(CONFIG), jax.random.key(0)))["params"]
    save_hf_draft(directory / "draft", CONFIG, params, dtype="float32")
    np.savez(directory / "batch.npz", **random_batch(CONFIG, length=length, anchors=anchors))


def random_batch(config: DraftConfig, *, length: int, anchors: int) -> dict[str, np.ndarray]:
    """One row with every slot used, and the target's tables."""
    rng = np.random.default_rng(0)
    table = (config.vocab_size, config.hidden_size)
    starts = np.sort(rng.permutation(length - config.block_size)[:anchors])[None]
    if starts.size < anchors:  # more slots than places: blocks repeat
        starts = np.sort(rng.integers(0, length - config.block_size, anchors))[None]
    return {
        "input_ids": rng.integers(0, config.vocab_size - 1, (1, length)),
        "hidden_states": rng.standard_normal((1, length, len(config.target_layer_ids) * table[1]), np.float32),
        "loss_mask": np.ones((1, length), np.float32),
        "lm_head": rng.standard_normal(table, np.float32) * table[1] ** -0.5,
        "embed_tokens": rng.standard_normal(table, np.float32) * 0.02,
        "anchors": starts,
        "keep": np.ones_like(starts, dtype=bool),
    }


def run_worker(options: argparse.Namespace) -> None:
    """Answers "ready", "step" and "finish" on standard input, one JSON line each."""
    replies, sys.stdout = sys.stdout, sys.stderr  # libraries may print
    batch = dict(np.load(options.directory / "batch.npz"))
    make = our_step if options.worker == "ours" else nemo_step
    step = make(options.directory / "draft", batch, options)
    loss = float("nan")
    for line in sys.stdin:
        answer: dict[str, float] = {}
        if line.strip() == "step":
            began = time.perf_counter()
            loss = step()
            answer = {"seconds": time.perf_counter() - began}
        elif line.strip() == "finish":
            answer = {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "loss": loss}
            answer["matmul_flops_per_second"] = matmul_speed(options.worker)
        print(json.dumps(answer), file=replies, flush=True)


def our_step(draft: Path, batch: dict[str, np.ndarray], options: argparse.Namespace) -> Callable[[], float]:
    """Our step on the checkpoint's weights."""
    from domino_jax.interop.hf import load_hf_draft

    return compiled_step(*load_hf_draft(draft), batch, chunk_blocks=options.chunk_blocks)[0]


def compiled_step(
    config: DraftConfig, params: Any, batch: dict[str, np.ndarray], *, chunk_blocks: int
) -> tuple[Callable[[], float], Any]:
    """A donated step, forward, backward and AdamW, that returns the loss; and the compiled program."""
    import jax
    import jax.numpy as jnp
    import optax

    from domino_jax.training.modules import build_trainer
    from domino_jax.training.step import compiler_options

    module = build_trainer(config, chunk_blocks=chunk_blocks)
    optimizer = optax.adamw(LEARNING_RATE, b1=BETAS[0], b2=BETAS[1], weight_decay=0.0)
    names = ("input_ids", "hidden_states", "loss_mask", "lm_head", "embed_tokens")
    arrays = [jnp.asarray(batch.pop(name)) for name in names]  # one copy counts
    given = {"anchor_positions": jnp.asarray(batch["anchors"]), "block_keep_mask": jnp.asarray(batch["keep"])}

    def update(params: Any, state: Any, arrays: list[jax.Array], given: dict[str, jax.Array]) -> tuple[Any, Any, Any]:
        def loss(params: Any) -> jax.Array:
            variables = {"params": {"draft_model": params}}
            return module.apply(variables, *arrays, lambda_base=LAMBDA_BASE, **given).loss

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    held = [params, jax.jit(optimizer.init)(params)]
    lowered = jax.jit(update, donate_argnums=(0, 1)).lower(*held, arrays, given)
    compiled = lowered.compile(compiler_options=compiler_options())

    def step() -> float:
        *held[:], value = compiled(*held, arrays, given)
        return float(jax.block_until_ready((value, held))[0])

    return step, compiled


def nemo_step(draft: Path, batch: dict[str, np.ndarray], options: argparse.Namespace) -> Callable[[], float]:
    """The same step of NeMo AutoModel, on its dense mask (its block-sparse one is for CUDA only)."""
    import torch
    from nemo_automodel.components.speculative.dflash.domino_core import DominoTrainerModule
    from nemo_automodel.components.speculative.dflash.draft_qwen3 import Qwen3DFlashDraftModel

    del options
    model = Qwen3DFlashDraftModel.from_pretrained(draft, dtype=torch.float32, attn_implementation="sdpa")
    lm_head = torch.nn.Linear(CONFIG.hidden_size, CONFIG.vocab_size, bias=False)
    embed_tokens = torch.nn.Embedding(CONFIG.vocab_size, CONFIG.hidden_size)
    for module, name in ((lm_head, "lm_head"), (embed_tokens, "embed_tokens")):
        module.weight = torch.nn.Parameter(torch.tensor(batch.pop(name)), requires_grad=False)
    trainer = DominoTrainerModule(
        model,
        lm_head,
        embed_tokens,
        mask_token_id=CONFIG.mask_token_id,
        block_size=CONFIG.block_size,
        attention_backend="sdpa",
        shift_label=CONFIG.shift_label,
    ).train()
    anchors = torch.tensor(batch["anchors"]), torch.tensor(batch["keep"])
    trainer._sample_anchor_positions = lambda *args, **kwargs: anchors
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=0.0)
    inputs = [torch.tensor(batch.pop(name)) for name in ("input_ids", "hidden_states", "loss_mask")]

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = trainer(*inputs, lambda_base=LAMBDA_BASE).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def step_flops(config: DraftConfig, length: int, anchors: int) -> float:
    """Multiplications and additions of the step's matrix products, frozen weights without their gradient.

    Context scores are counted up to each anchor on average, half of S: what the result needs, not what is computed.
    """
    d, tokens = config.hidden_size, anchors * config.block_size
    heads, kv_heads = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    per_token = d * (2 * heads + 2 * kv_heads) + 3 * d * config.intermediate_size
    attention = 2 * heads * (length / 2 + config.block_size)
    layers = config.num_hidden_layers * (3 * tokens * (per_token + attention) + 3 * length * d * 2 * kv_heads)
    context = 2 * length * len(config.target_layer_ids) * d * d  # no gradient into the target's states
    gru = tokens * 3 * config.gru_hidden_dim * (2 * d + 3 * config.gru_hidden_dim)  # nor into the embeddings
    low_rank = 3 * tokens * config.emb_dim * (d + config.gru_hidden_dim)
    vocabulary = tokens * config.vocab_size * (2 * d + 3 * config.emb_dim)
    return 2.0 * (layers + context + gru + low_rank + vocabulary)


def matmul_speed(side: str) -> float:
    """Float32 operations per second of a 4096 x 4096 product of JAX or torch, the best of five after one to warm up."""
    size = 4096
    x = np.ones((size, size), np.float32)
    product = jax_product(x) if side == "ours" else torch_product(x)
    product()
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        product()
        best = min(best, time.perf_counter() - began)
    return 2.0 * size**3 / best


def jax_product(x: np.ndarray) -> Callable[[], Any]:
    import jax

    held, product = jax.device_put(x), jax.jit(lambda x: x @ x)
    return lambda: product(held).block_until_ready()


def torch_product(x: np.ndarray) -> Callable[[], Any]:
    import torch

    held = torch.tensor(x)
    return lambda: held @ held


def hardware() -> str:
    """Cores and their name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} x {names[0] if names else platform.processor() or platform.machine()}"


def revision() -> str:
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    main()
