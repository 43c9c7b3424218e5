"""One optimisation step of a Domino draft, here and in NeMo AutoModel 0.7.0, on the same inputs.

Weights and anchors are the same too. Each side runs in its own process and waits for its turn; the
two alternate, so that a busy moment hits both. Prints medians, peak memory, the arithmetic of a
step and the share of the measured float32 matrix-product peak; the last line is JSON. NeMo
AutoModel must be installed beside the project (`pip install -e '.[test]'`, then
`pip install --no-deps nemo-automodel==0.7.0`).

On an accelerator `qwen3-4b`, `qwen3-8b` and `specforge` measure steps of real size in bfloat16,
each with few and many anchors, draft only and online (see `benchmark_card.py`). The GPU table of
the README is filled by

    python scripts/bench/benchmark_step.py --workload qwen3-8b --rounds 7

and likewise for the other two; `--anchors` and `--modes` take a part of a workload, where a call
may last some minutes only. A machine without network needs the checkout, jax for CUDA with flax and
optax, transformers, safetensors and, for the peer, torch for CUDA and the wheel that
`pip download --no-deps nemo-automodel==0.7.0` fetches, installed there with
`pip install --no-deps --no-index WHEEL`; no weights, no data, no tokenizer. `--tiny` tries the same
on any machine in seconds.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import benchmark_workloads as card
import numpy as np
from benchmark_record import add_record_option, record, revision
from benchmark_sides import Side, SideEnded, Worker, serve
from benchmark_workloads import BETAS, LAMBDA_BASE, LEARNING_RATE

from domino_jax.config.heads import DominoHeadConfig
from domino_jax.config.model import DraftConfig
from domino_jax.evaluation.record import hardware
from domino_jax.training.flops import step_flops

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
    head=DominoHeadConfig(emb_dim=256, gru_hidden_dim=1024),
    pure_draft_prefix_len=1,
    shift_label=True,
)
CHUNK_BLOCKS = 16  # blocks whose logits exist together
WORKLOADS = {"small": (512, 64), "wide": (512, 256), "long": (4096, 64)}  # S, N


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workload", choices=(*WORKLOADS, *card.WORKLOADS), default="small")
    parser.add_argument(
        "--rounds", type=int, default=7, help="measured steps of each side, after two to warm up"
    )
    parser.add_argument(
        "--chunk-blocks",
        type=int,
        help="blocks whose logits exist together; 0 for all "
        f"({CHUNK_BLOCKS}, on an accelerator {card.CHUNK_BLOCKS})",
    )
    add_record_option(parser)
    real = parser.add_argument_group("steps of real size (qwen3-4b, qwen3-8b, specforge)")
    real.add_argument("--anchors", type=int, nargs="+", default=[], help="only these N (256 512)")
    real.add_argument("--modes", nargs="+", choices=card.MODES, default=[], help="only these")
    real.add_argument("--no-peer", action="store_true", help="this project alone")
    real.add_argument(
        "--nemo-compile", action="store_true", help="the recipe's `compile: {enabled: true}`"
    )
    real.add_argument(
        "--tiny", action="store_true", help="widths and rows that a CPU runs in seconds"
    )
    parser.add_argument("--worker", choices=("ours", "nemo"), help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--setting", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    on_card = options.workload in card.WORKLOADS
    if options.chunk_blocks is None:
        options.chunk_blocks = card.CHUNK_BLOCKS if on_card else CHUNK_BLOCKS
    chosen = {"anchors": options.anchors, "modes": options.modes, "tiny": options.tiny}
    if not on_card and any((*chosen.values(), options.no_peer, options.nemo_compile)):
        parser.error(f"{options.workload} has no settings; those of real size have")
    if on_card and not card.settings(options.workload, **chosen):
        parser.error(
            f"--modes: {options.workload} has "
            f"{' '.join(card.WORKLOADS[options.workload].modes)} alone"
        )
    if on_card:
        import benchmark_card

        run, work = benchmark_card.compare, benchmark_card.run_worker
    else:
        run, work = compare, run_worker
    try:
        (work if options.worker else run)(options)
    except SideEnded as ended:
        sys.exit(str(ended))


def compare(options: argparse.Namespace) -> None:
    """Starts both sides, lets them take turns, prints the figures."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # as the other side, whatever the machine has
    with tempfile.TemporaryDirectory() as directory:
        write_inputs(Path(directory), options.workload)
        words = ["--directory", directory, "--workload", options.workload]
        words += ["--chunk-blocks", str(options.chunk_blocks)]
        sides = {
            name: Side(name, [__file__, "--worker", name, *words]) for name in ("ours", "nemo")
        }
        for index in range(options.rounds + 2):
            for side in sides.values():
                side.step(measured=index >= 2)
            print(
                f"round {index}: " + ", ".join(f"{s.name} {s.last:.2f} s" for s in sides.values()),
                file=sys.stderr,
            )
        ours, nemo = (side.finish() for side in sides.values())
    medians = {side.name: statistics.median(side.seconds) for side in sides.values()}
    flops = sum(step_flops(CONFIG, *WORKLOADS[options.workload]).values())
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
    }
    print(
        f"workload {options.workload}: a step of {flops / 1e12:.3f} TFLOP, "
        f"{options.rounds} alternating rounds"
    )
    print(
        f"  here          {medians['ours']:.3f} s (median), "
        f"peak {ours['peak_bytes'] / 2**30:.2f} GiB"
    )
    print(
        f"  NeMo 0.7.0    {medians['nemo']:.3f} s (median), "
        f"peak {nemo['peak_bytes'] / 2**30:.2f} GiB"
    )
    print(
        f"  ratio {figures['ratio']:.2f}x, memory {figures['rss_ratio']:.2f}x of NeMo's, ", end=""
    )
    print(f"{figures['peak_share']:.0%} of {peak / 1e9:.0f} GFLOP/s")
    record(options.record, figures, device={"platform": "cpu", "device": "cpu"})
    print(json.dumps(figures | {"hardware": hardware(), "revision": revision()}))


def write_inputs(directory: Path, workload: str) -> None:
    """A float32 draft checkpoint and one batch for both sides."""
    import jax
    from flax.core import meta

    from domino_jax.draft.backbone import DraftModel
    from domino_jax.draft.build import init_variables
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
        "hidden_states": rng.standard_normal(
            (1, length, len(config.target_layer_ids) * table[1]), np.float32
        ),
        "loss_mask": np.ones((1, length), np.float32),
        "lm_head": rng.standard_normal(table, np.float32) * table[1] ** -0.5,
        "embed_tokens": rng.standard_normal(table, np.float32) * 0.02,
        "anchors": starts,
        "keep": np.ones_like(starts, dtype=bool),
    }


def run_worker(options: argparse.Namespace) -> None:
    """One side, asked for its steps."""
    losses = [float("nan")]

    def make() -> Worker:
        batch = dict(np.load(options.directory / "batch.npz"))
        one = (our_step if options.worker == "ours" else nemo_step)(
            options.directory / "draft", batch, options
        )

        def step() -> float:
            losses[0] = one()
            return losses[0]

        return step, finish

    def finish() -> dict[str, Any]:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {
            "peak_bytes": peak,
            "loss": losses[0],
            "matmul_flops_per_second": matmul_speed(options.worker),
        }

    serve(make)


def our_step(
    draft: Path, batch: dict[str, np.ndarray], options: argparse.Namespace
) -> Callable[[], float]:
    """Our step on the checkpoint's weights."""
    from domino_jax.interop.hf import load_hf_draft

    return compiled_step(*load_hf_draft(draft), batch, chunk_blocks=options.chunk_blocks)[0]


def compiled_step(
    config: DraftConfig, params: Any, batch: dict[str, np.ndarray], *, chunk_blocks: int
) -> tuple[Callable[[], float], Any]:
    """A donated step (forward, backward, AdamW) that returns the loss; and the compiled program."""
    import jax
    import jax.numpy as jnp
    import optax

    from domino_jax.objective.modules import build_trainer

    module = build_trainer(config, chunk_blocks=chunk_blocks)
    optimizer = optax.adamw(LEARNING_RATE, b1=BETAS[0], b2=BETAS[1], weight_decay=0.0)
    names = ("input_ids", "hidden_states", "loss_mask", "lm_head", "embed_tokens")
    arrays = [jnp.asarray(batch.pop(name)) for name in names]  # one copy counts
    given = {
        "anchor_positions": jnp.asarray(batch["anchors"]),
        "block_keep_mask": jnp.asarray(batch["keep"]),
    }

    def update(
        params: Any, state: Any, arrays: list[jax.Array], given: dict[str, jax.Array]
    ) -> tuple[Any, Any, Any]:
        def loss(params: Any) -> jax.Array:
            variables = {"params": {"draft_model": params}}
            return module.apply(variables, *arrays, lambda_base=LAMBDA_BASE, **given).loss

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    held = [params, jax.jit(optimizer.init)(params)]
    lowered = jax.jit(update, donate_argnums=(0, 1)).lower(*held, arrays, given)
    compiled = lowered.compile()

    def step() -> float:
        *held[:], value = compiled(*held, arrays, given)
        return float(jax.block_until_ready((value, held))[0])

    return step, compiled


def nemo_step(
    draft: Path, batch: dict[str, np.ndarray], options: argparse.Namespace
) -> Callable[[], float]:
    """The same step of NeMo AutoModel, on its dense mask (its block-sparse one needs CUDA)."""
    import torch
    from nemo_automodel.components.speculative.dflash.domino_core import DominoTrainerModule
    from nemo_automodel.components.speculative.dflash.draft_qwen3 import Qwen3DFlashDraftModel

    del options
    model = Qwen3DFlashDraftModel.from_pretrained(
        draft, dtype=torch.float32, attn_implementation="sdpa"
    )
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
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=0.0
    )
    inputs = [torch.tensor(batch.pop(name)) for name in ("input_ids", "hidden_states", "loss_mask")]

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = trainer(*inputs, lambda_base=LAMBDA_BASE).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def matmul_speed(side: str) -> float:
    """Float32 operations per second of a 4096 x 4096 product of JAX or torch.

    The best of five after one to warm up.
    """
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


if __name__ == "__main__":
    main()
