"""A step of real size on one accelerator, here and in NeMo AutoModel, for `benchmark_step.py`.

Both sides make the same weights on the device, take the same anchors and hold the card together
when it is large enough; otherwise each runs alone, ours first, and the figures say so.
`benchmark_ours.py` and `benchmark_nemo.py` say what a step is.
"""

import argparse
import dataclasses
import datetime
import functools
import importlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from benchmark_record import record, revision
from benchmark_sides import Side, SideEnded, Worker, serve
from benchmark_workloads import Setting, draft_config, settings, target_config

from domino_jax.base.chips import CHIPS
from domino_jax.evaluation.record import hardware
from domino_jax.training.flops import step_flops

WARM_UP = 2  # steps of each side before those that count
# Both sides take the memory that they need, not most of the card at once.
ENVIRONMENT = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def compare(options: argparse.Namespace) -> None:
    """Measures the settings of a workload one after another and prints the figures."""
    sys.stdout.reconfigure(line_buffering=True)  # a call that is cut off has said what it measured
    chosen = settings(
        options.workload, anchors=options.anchors, modes=options.modes, tiny=options.tiny
    )
    asked = {
        "workload": options.workload,
        "tiny": options.tiny,
        "rounds": options.rounds,
        "chunk_blocks": options.chunk_blocks,
    }
    report: dict[str, Any] = {
        **asked,
        "hardware": hardware(),
        "revision": revision(),
        "date": datetime.date.today().isoformat(),
        "settings": [],
    }
    for setting in chosen:
        with tempfile.TemporaryDirectory() as directory:
            start = functools.partial(start_side, setting, Path(directory), options)
            figures = measure(start, setting, options)
        show(figures)
        device = {name: figures["ours"][name] for name in ("platform", "device")}
        record(options.record, asked | figures, device=device)
        report["settings"].append(figures)
    print(json.dumps(report))
    if not options.no_peer and not all("nemo" in figures for figures in report["settings"]):
        sys.exit(1)


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


def start_side(setting: Setting, directory: Path, options: argparse.Namespace, name: str) -> Side:
    """A side that has warmed up, so that nothing compiles while the other is measured."""
    words = [str(Path(__file__).with_name("benchmark_step.py")), "--worker", name]
    words += ["--directory", str(directory), "--workload", setting.workload]
    words += ["--setting", json.dumps(dataclasses.asdict(setting)), "--rounds", str(options.rounds)]
    words += ["--chunk-blocks", str(options.chunk_blocks)]
    words += ["--nemo-compile"] if options.nemo_compile else []
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
    """What was measured, in the form of the report."""
    target = target_config(setting.shape, dtype="bfloat16", tiny=setting.tiny)
    draft = draft_config(target)
    online = target if setting.mode == "online" else None
    flops = step_flops(draft, setting.length, setting.cache_len, target=online)
    total, chip = sum(flops.values()), CHIPS.get(said["ours"]["device"])
    peak = chip and chip.flops
    report: dict[str, Any] = {
        "mode": setting.mode,
        "length": setting.length,
        "anchors": setting.cache_len,
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
            words += [f"{side['useful_mfu']:.1%} of {peak / 1e12:.0f} TFLOP/s"]
        if side["peak_bytes"]:
            words += [f"peak {side['peak_bytes'] / 2**30:.2f} GiB"]
        print(f"  {title:11} {', '.join(words)}, {side['dtype']} on {side['device']}")
    if "ratio" in report:
        difference = report["first_loss_difference"]
        print(f"  ratio {report['ratio']:.2f}x, first losses differ by {difference:.1e}")


def run_worker(options: argparse.Namespace) -> None:
    """One side of one setting, asked for its steps."""
    serve(functools.partial(side_step, Setting(**options.setting), options))


def side_step(setting: Setting, options: argparse.Namespace) -> Worker:
    """What a side serves; ours, which starts first, leaves its anchors to the other."""
    anchors = options.directory / "anchors.npz"
    side = importlib.import_module(f"benchmark_{options.worker}")
    target = target_config(setting.shape, dtype=side.default_dtype(), tiny=setting.tiny)
    draft = draft_config(target)
    row = np.random.default_rng(0).integers(0, draft.mask_token_id, (1, setting.length))
    if options.worker == "ours":
        np.savez(anchors, **side.drawn_anchors(draft, setting, steps=WARM_UP + options.rounds))
        own = {"num_anchors": setting.cache_len, "chunk_blocks": options.chunk_blocks}
    else:
        own = {"compiled": options.nemo_compile, **np.load(anchors)}
    return side.recipe_step(draft, target, input_ids=row, online=setting.mode == "online", **own)
