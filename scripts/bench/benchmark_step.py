"""One optimisation step of a Domino draft, here and in NeMo AutoModel 0.7.0, on the same inputs.

Weights and anchors are the same too. Each side runs in its own process and waits for its turn; the
two alternate, so that a busy moment hits both, or run alone, ours first, where the device does not
hold both. Prints medians, peak memory and the share of the device's published peak (on a CPU, of
the float32 matrix products that it was measured to do), and a line of JSON for each setting. NeMo
AutoModel must be installed beside the project (`pip install -e '.[test]'`, then
`pip install --no-deps nemo-automodel==0.7.0`). `benchmark_ours.py` and `benchmark_nemo.py` define a
step.

`small`, `wide` and `long` are for a CPU. On an accelerator `qwen3-4b`, `qwen3-8b` and `specforge`
measure steps of real size in bfloat16, each with few and many anchors, draft only and online. The
GPU table of the README is filled by

    python scripts/bench/benchmark_step.py --workload qwen3-8b --rounds 7

and likewise for the other two; `--anchors` and `--modes` take a part of a workload, where a call
may last some minutes only. A machine without network needs the checkout, jax for CUDA with flax and
optax, transformers, safetensors and, for the peer, torch for CUDA and the wheel that
`pip download --no-deps nemo-automodel==0.7.0` fetches, installed there with
`pip install --no-deps --no-index WHEEL`; no weights, no data, no tokenizer. `--tiny` tries the same
on any machine in seconds.
"""

import argparse
import dataclasses
import functools
import importlib
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from benchmark_record import add_record_option, record
from benchmark_sides import Side, SideEnded, Worker, serve
from benchmark_workloads import MODES, WORKLOADS, Setting, draft_config, settings, target_config

from domino_jax.base.chips import CHIPS
from domino_jax.training.flops import step_flops

WARM_UP = 2  # steps of each side before those that count
# Both sides take the memory that they need, not most of the card at once.
ENVIRONMENT = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def main() -> None:
    options = parsed_options()
    if options.worker:
        serve(functools.partial(side_step, Setting(**options.setting), options))
        return
    sys.stdout.reconfigure(line_buffering=True)  # a call that is cut off has said what it measured
    complete = True
    for setting in options.settings:
        with tempfile.TemporaryDirectory() as directory:
            start = functools.partial(start_side, setting, Path(directory))
            try:
                figures = measure(start, setting, options)
            except SideEnded as ended:
                sys.exit(str(ended))
        show(figures)
        asked = {name: getattr(options, name) for name in ("workload", "tiny", "rounds")}
        asked["chunk_blocks"] = options.chunk_blocks
        record(options.record, asked | figures, device=figures["ours"])
        complete &= options.no_peer or "nemo" in figures
    sys.exit(not complete)


def parsed_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workload", choices=WORKLOADS, default="small")
    parser.add_argument(
        "--rounds", type=int, default=7, help="measured steps of each side, after two to warm up"
    )
    parser.add_argument(
        "--chunk-blocks", type=int, help="blocks whose logits exist together; 0 for all"
    )
    add_record_option(parser)
    parser.add_argument("--anchors", type=int, nargs="+", default=[], help="only these N (256 512)")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=[], help="only these")
    parser.add_argument("--no-peer", action="store_true", help="this project alone")
    parser.add_argument(
        "--nemo-compile", action="store_true", help="the recipe's `compile: {enabled: true}`"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="widths and rows that a CPU runs in seconds"
    )
    parser.add_argument("--worker", choices=("ours", "nemo"), help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--setting", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    workload = WORKLOADS[options.workload]
    if options.chunk_blocks is None:
        options.chunk_blocks = workload.chunk_blocks
    options.settings = settings(
        options.workload, anchors=options.anchors, modes=options.modes, tiny=options.tiny
    )
    if not options.settings:
        parser.error(f"--modes: {options.workload} has {' '.join(workload.modes)} alone")
    return options


def measure(
    start: Callable[[str], Side], setting: Setting, options: argparse.Namespace
) -> dict[str, Any]:
    """The figures of one setting, whose sides `start` gives by name."""
    ours, nemo = start("ours"), None
    together = not options.no_peer
    if together:
        try:
            nemo = start("nemo")
            take_turns([ours, nemo], options.rounds)
        except SideEnded as ended:
            # Mostly for want of memory. Ours is compiled, so it goes on, and the other starts over.
            print(f"{ended}; each side alone", file=sys.stderr)
            together, nemo, ours.seconds = False, None, []
    if not together:
        take_turns([ours], options.rounds)
    said = {"ours": ours.finish()}
    if not (together or options.no_peer):
        try:
            nemo = start("nemo")
            take_turns([nemo], options.rounds)
        except SideEnded as ended:
            print(f"{ended}; no figures of it", file=sys.stderr)
            nemo = None
    if nemo:
        said["nemo"] = nemo.finish()
    turns = "alternating" if together else "each side alone"
    return setting_figures(setting, turns, [side for side in (ours, nemo) if side], said)


def start_side(setting: Setting, directory: Path, name: str) -> Side:
    """A side that has warmed up, so that nothing compiles while the other is measured."""
    words = [__file__, *sys.argv[1:], "--worker", name, "--directory", str(directory)]
    words += ["--setting", json.dumps(dataclasses.asdict(setting))]
    began = time.perf_counter()
    side = Side(name, words, ENVIRONMENT)
    for _ in range(WARM_UP):
        side.step(measured=False)
    print(f"{name} ready after {time.perf_counter() - began:.0f} s", file=sys.stderr)
    return side


def take_turns(sides: list[Side], rounds: int) -> None:
    """The measured steps of one side, or of both in turn."""
    for index in range(rounds):
        for side in sides:
            side.step(measured=True)
        times = ", ".join(f"{side.name} {side.last:.4f} s" for side in sides)
        print(f"round {index}: {times}", file=sys.stderr)


def setting_figures(
    setting: Setting, turns: str, sides: list[Side], said: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """The result of a setting."""
    target = target_config(setting.shape, dtype="bfloat16", tiny=setting.tiny)
    online = target if setting.mode == "online" else None
    flops = step_flops(draft_config(target), setting.length, setting.num_anchors, target=online)
    total = sum(flops.values())
    chip = CHIPS.get(said["ours"]["device"])
    measured = [side.get("matmul_flops_per_second") for side in said.values()]
    peak = chip.flops if chip else max(filter(None, measured), default=None)
    report: dict[str, Any] = {
        "mode": setting.mode,
        "length": setting.length,
        "anchors": setting.num_anchors,
        "turns": turns,
        "flops": flops,
        "step_flops": total,
        "peak_flops_per_second": peak,
    }
    for side in sides:
        seconds = statistics.median(side.seconds)
        report[side.name] = {
            "seconds": seconds,
            "samples_per_second": 1.0 / seconds,
            "useful_mfu": peak and total / seconds / peak,
            "all_seconds": side.seconds,
            "losses": side.losses,
            **said[side.name],
        }
    if "nemo" in report:
        ours_loss, nemo_loss = (side.losses[0] for side in sides)
        report["ratio"] = report["nemo"]["seconds"] / report["ours"]["seconds"]
        # Of the same weights. Later ones drift apart: bfloat16 masters lose what float32 ones keep.
        report["first_loss_difference"] = abs(ours_loss - nemo_loss) / abs(ours_loss)
    return report


def show(report: dict[str, Any]) -> None:
    """The figures of a setting as text."""
    spec = f"{report['mode']}, S {report['length']}, N {report['anchors']}"
    print(f"{spec}: {report['step_flops'] / 1e12:.4g} useful TFLOP a step, {report['turns']}")
    for name, title in (("ours", "here"), ("nemo", "NeMo 0.7.0")):
        side = report.get(name)
        if side is None:
            continue
        words = [f"{side['seconds'] * 1e3:.1f} ms (median)"]
        words += [f"{side['samples_per_second']:.2f} samples/s"]
        if side["useful_mfu"]:
            peak = report["peak_flops_per_second"]
            words += [f"{side['useful_mfu']:.1%} of {peak / 1e9:,.0f} GFLOP/s"]
        if side["peak_bytes"]:
            words += [f"peak {side['peak_bytes'] / 2**30:.2f} GiB"]
        print(f"  {title:11} {', '.join(words)}, {side['dtype']} on {side['device']}")
    if "ratio" in report:
        difference = report["first_loss_difference"]
        print(f"  ratio {report['ratio']:.2f}x, first losses differ by {difference:.1e}")


def side_step(setting: Setting, options: argparse.Namespace) -> Worker:
    """What a side serves; ours, which starts first, leaves its anchors to the other."""
    anchors = options.directory / "anchors.npz"
    side = importlib.import_module(f"benchmark_{options.worker}")
    target = target_config(setting.shape, dtype=side.default_dtype(), tiny=setting.tiny)
    draft = draft_config(target)
    row = np.random.default_rng(0).integers(0, draft.mask_token_id, (1, setting.length))
    if options.worker == "ours":
        np.savez(anchors, **side.drawn_anchors(draft, setting, steps=WARM_UP + options.rounds))
        own = {"num_anchors": setting.num_anchors, "chunk_blocks": options.chunk_blocks}
    else:
        own = {"compiled": options.nemo_compile, **np.load(anchors)}
    online = setting.mode == "online"
    step, finish = side.recipe_step(draft, target, input_ids=row, online=online, **own)

    def described() -> dict[str, Any]:
        figures = finish()
        if figures["peak_bytes"] is None:
            # A CPU: the memory of the process, and a peak that no maker publishes.
            figures["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            size = 256 if setting.tiny else 4096
            figures["matmul_flops_per_second"] = matmul_speed(side.matrix_product, size=size)
        return figures

    return step, described


def matmul_speed(product_of: Callable[[np.ndarray], Callable[[], Any]], *, size: int) -> float:
    """Float32 operations per second of a square product, the best of five after a warm-up."""
    product = product_of(np.ones((size, size), np.float32))
    product()
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        product()
        seconds.append(time.perf_counter() - began)
    return 2.0 * size**3 / min(seconds)


if __name__ == "__main__":
    main()
