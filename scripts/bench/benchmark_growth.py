"""How step time and memory of a Domino draft grow with anchors N, context S, block K, vocabulary V.

A speed at one size does not show a term that takes over at another. Every point is a process of its
own: a step as in `benchmark_step.py` (the fastest of a few), and the temporary memory that the
compiler plans for the vocabulary loss with its gradient, in chunks of `--chunk-blocks`. Prints the
power of each law (slope of the logarithms), writes GROWTH.json and, with matplotlib installed,
GROWTH.png into `--directory`.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from benchmark_record import add_record_option, record
from benchmark_workloads import draft_config, target_config

SWEEPS = {
    "N": (16, 32, 64, 128, 256, 512),
    "S": (256, 512, 1024, 2048, 4096),
    "K": (4, 8, 16, 32),
    "V": (8192, 16384, 32768, 65536),
}
BASE = {"N": 64, "S": 512, "K": 16, "V": 49152}
FIGURES = {"step time": "seconds", "loss memory": "loss_bytes", "step memory": "step_bytes"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--directory", type=Path, default=Path("runs/growth"))
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    parser.add_argument(
        "--steps", type=int, default=3, help="measured steps of each point, after one to warm up"
    )
    parser.add_argument("--chunk-blocks", type=int, default=16)
    add_record_option(parser)
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        print(json.dumps(measure(options)))
        return
    points = {name: [run_point(name, size) for size in SWEEPS[name]] for name in options.sweeps}
    powers = {
        name: {field: power(rows, field) for field in FIGURES.values()}
        for name, rows in points.items()
    }
    report = {
        "base": BASE,
        "chunk_blocks": options.chunk_blocks,
        "powers": powers,
        "points": points,
    }
    options.directory.mkdir(parents=True, exist_ok=True)
    (options.directory / "GROWTH.json").write_text(json.dumps(report, indent=2) + "\n")
    draw(points, powers, options.directory / "GROWTH.png")
    for name, fitted in powers.items():
        print(", ".join(f"{what} ~ {name}^{fitted[field]:.2f}" for what, field in FIGURES.items()))
    record(options.record, report, device=points[options.sweeps[0]][0])


def run_point(name: str, size: int) -> dict[str, Any]:
    """Measures one point in its own process, so that no memory of another one counts."""
    sizes = {**BASE, name: size}
    words = [sys.executable, __file__, *sys.argv[1:], "--point", json.dumps(sizes)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    figures = json.loads(done.stdout)
    print(
        f"{sizes}: {figures['seconds']:.2f} s, {figures['step_bytes'] / 2**20:.0f} MiB",
        file=sys.stderr,
    )
    return figures | {"size": size}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The fastest step, the planned temporary bytes of it and of its loss, and the device."""
    from benchmark_ours import default_dtype, recipe_step

    sizes = options.point
    target = target_config("smollm2", dtype=default_dtype(), tiny=False)
    target = dataclasses.replace(target, vocab_size=sizes["V"])
    draft = dataclasses.replace(draft_config(target), block_size=sizes["K"])
    bound = {"num_anchors": sizes["N"], "chunk_blocks": options.chunk_blocks}
    row = np.random.default_rng(0).integers(0, draft.mask_token_id, (1, sizes["S"]))
    step, finish = recipe_step(draft, target, input_ids=row, online=False, **bound)
    seconds = []
    for _ in range(options.steps + 1):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    return {
        **{name: finish()[name] for name in ("platform", "device", "step_bytes")},
        "seconds": min(seconds[1:]),
        "loss_bytes": loss_bytes(draft, **bound),
    }


def loss_bytes(config: Any, *, num_anchors: int, chunk_blocks: int) -> int:
    """Planned bytes of the loss and its gradient, without states and their gradients.

    Those grow by right.
    """
    import jax
    import jax.numpy as jnp

    from domino_jax.kernels.chunked_cross_entropy import vocabulary_loss
    from domino_jax.kernels.token_loss import Labels, States, Tables

    shape = (1, num_anchors, config.num_predictions)
    widths = (config.hidden_size, config.head.emb_dim)
    states = States(*(jnp.zeros((*shape, width)) for width in widths))
    lm_head, expansion = (jnp.zeros((config.vocab_size, width)) for width in widths)

    def total(states: States, expansion: jax.Array, lm_head: jax.Array) -> jax.Array:
        ids, ones = jnp.zeros(shape, jnp.int32), jnp.ones(shape)
        tables, labels = Tables(lm_head, expansion), Labels(ids, mask=ones, weights=ones)
        bound = {"lambda_base": 0.5, "chunk_blocks": chunk_blocks}
        return vocabulary_loss(states, tables, labels, **bound).total

    compiled = jax.jit(jax.grad(total, argnums=(0, 1))).lower(states, expansion, lm_head).compile()
    planned = compiled.memory_analysis().temp_size_in_bytes
    return planned - 2 * sum(array.nbytes for array in states)


def power(rows: list[dict[str, float]], field: str) -> float:
    """The slope of `log(field)` over `log(size)`, by least squares."""
    sizes, values = ([row[name] for row in rows] for name in ("size", field))
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def draw(points: dict[str, Any], powers: dict[str, Any], path: Path) -> None:
    """One panel per sweep: seconds and planned memory over the size, both logarithmic."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: pip install matplotlib", file=sys.stderr)
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator

    figure, axes = plt.subplots(
        1, len(points), figsize=(3.6 * len(points), 3.4), squeeze=False, layout="constrained"
    )
    for axis, (name, rows) in zip(axes[0], points.items(), strict=True):
        sizes = [row["size"] for row in rows]
        gibibytes = [row["loss_bytes"] / 2**30 for row in rows]
        axis.loglog(sizes, [row["seconds"] for row in rows], "o-", color="#1f5f8b", label="step, s")
        axis.loglog(sizes, gibibytes, "s--", color="#b5651d", label="loss memory, GiB")
        axis.set_xlabel(name)
        axis.set_title(
            f"{name}: time^{powers[name]['seconds']:.2f}, memory^{powers[name]['loss_bytes']:.2f}"
        )
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3)
    axes[0][0].legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
