"""Whether a step fits is found out late, and paid for, where a machine has to be hired first.

`domino plan` compiles that very step for machines that nobody owns here, and reads the program:

    configuration -> the step that `train` runs, traced on this CPU -> the compiler of the place
                                  |                                      |
                          products by stage                 memory or a refusal, collectives,
                                  `----------------> Plan <---------------- buffers, launches

Two bounds of time come from the chip's published peaks. No step time is promised: a program reaches
neither peak, and nothing here tells how near it comes.
"""

import dataclasses
import datetime
import hashlib
import json
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from domino_jax.base.chips import CHIPS
from domino_jax.base.errors import InputError
from domino_jax.base.files import write_whole
from domino_jax.base.progress import Reporter
from domino_jax.objective.objectives import reads_target
from domino_jax.plan import hlo, jaxpr_flops
from domino_jax.plan.topology import Compiler, DeviceSpec
from domino_jax.training.flops import step_flops
from domino_jax.training.prepare import AbstractStep
from domino_jax.training.program import traced_step

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50}


@dataclass(frozen=True)
class Exchange:
    """All collectives of one kind in a step; bytes are of whole arrays on one device."""

    count: int
    bytes: int
    largest: int
    largest_in_loop: int


@dataclass(frozen=True)
class Plan:
    """What a step takes at a place; bytes, launches and seconds are of one device.

    Attributes:
        spec: as it was asked for.
        device_kind: of its devices.
        devices: how many.
        mesh: devices along each axis.
        batch_size: batch rows of a micro-batch, over all devices.
        grad_accumulation: micro-batches of a step.
        memory_bytes: published of the device; a system may keep some of it.
        fits: whether the compiler took it and its peak is within that memory.
        peak_bytes: the most that the program holds at once; None where the compiler refused.
        argument_bytes: of them, parameters, optimiser, target and batch.
        refusal: what the compiler said instead.
        exchanges: by kind of collective.
        buffers: the largest arrays that operations write.
        launches: kernels and library calls on a GPU, at most; None on a TPU.
        bytes_moved: between memory and cores, see `hlo.bytes_moved`.
        useful_flops: of a step on all devices by stage, every batch row full (`training.flops`).
        executed_flops: likewise, at most (`arithmetic`).
        float32_flops: of those, products of float32 with float32.
        seconds_of_flops: executed FLOPs at the chip's peak.
        seconds_of_bytes: bytes moved at the chip's bandwidth.
        compile_seconds: on the machine that planned.
        compiler: its name and version.
        date: of the compilation, ISO.
        cached: whether this was planned before.
    """

    spec: str
    device_kind: str
    devices: int
    mesh: dict[str, int]
    batch_size: int
    grad_accumulation: int
    memory_bytes: int
    fits: bool
    peak_bytes: int | None
    argument_bytes: int | None
    refusal: str | None
    exchanges: dict[str, Exchange]
    buffers: tuple[hlo.Buffer, ...]
    launches: int | None
    bytes_moved: int | None
    useful_flops: dict[str, float]
    executed_flops: dict[str, float]
    float32_flops: float
    seconds_of_flops: float
    seconds_of_bytes: float | None
    compile_seconds: float
    compiler: str
    date: str
    cached: bool = False

    @property
    def needed_bytes(self) -> int | None:
        """The peak, or what a refusal says of it; None where it says nothing."""
        if self.peak_bytes is not None or self.refusal is None:
            return self.peak_bytes
        # As compilers word it: "temporaries (20.50G)" or "Used 20.50G".
        found = re.search(r"(?:temporaries \(|Used )([\d.]+)([KMGTP]?)", self.refusal)
        return int(float(found[1]) * _UNITS[found[2]]) if found else None


@dataclass(frozen=True)
class PlannedStep:
    """A step ready to be compiled for its devices."""

    abstract: AbstractStep
    traced: jax.stages.Traced
    lowered: jax.stages.Lowered


def planned_step(step: AbstractStep) -> PlannedStep:
    """The step, traced and lowered here."""
    # Not `with mesh:`, under which the layers' constraints do nothing, in silence.
    with jax.set_mesh(step.mesh):
        traced = traced_step(step.program, step.arguments)
        return PlannedStep(step, traced, traced.lower())


def plan(
    abstract: AbstractStep, spec: DeviceSpec, compiler: Compiler, *, cache: Path, reporter: Reporter
) -> Plan:
    """Compiles the step of a run for a place, unless that program was planned before.

    Args:
        abstract: the step, over the compiler's devices.
        spec: where it would run.
        compiler: of the place.
        cache: a directory that keeps plans by program; made where it is missing.
        reporter: is told each long stage.
    """
    step = planned_step(abstract)
    batch_size = abstract.arguments.batch.input_ids.shape[1]
    kept = cache / f"{_key(step, spec, compiler)}.json"
    if kept.is_file():
        reporter.say(f"{spec.name}, batch {batch_size}: planned before ({kept})")
        return dataclasses.replace(read_plan(kept), cached=True)
    reporter.say(f"compiling for {spec.name}, batch {batch_size}")
    began = time.monotonic()
    made = _compiled_plan(step, spec, compiler)
    reporter.say(f"compiled for {spec.name} in {time.monotonic() - began:.0f} s")
    cache.mkdir(parents=True, exist_ok=True)
    write_json(kept, dataclasses.asdict(made))
    return made


def _key(step: PlannedStep, spec: DeviceSpec, compiler: Compiler) -> str:
    """The program, its place, the compiler, and the code that reads what comes out."""
    # So that a plan which older code made is not taken for one of this code.
    readers = [Path(module.__file__ or "").read_text() for module in (hlo, jaxpr_flops)]
    readers.append(Path(__file__).read_text())
    told = (step.lowered.as_text(), spec.name, jax.__version__, compiler.version, *readers)
    return hashlib.sha256("\0".join(told).encode()).hexdigest()


def _compiled_plan(step: PlannedStep, spec: DeviceSpec, compiler: Compiler) -> Plan:
    device = compiler.devices[0]
    chip = CHIPS[device.device_kind]
    count = len(compiler.devices)
    # Which piece holds the last supervised block only data knows: at most the loss runs all.
    trainer = step.abstract.program.trainer
    pieces = -(-trainer.num_anchors // trainer.chunk_blocks)
    products = jaxpr_flops.products(
        step.traced, platform=device.platform, unknown_trip_count=pieces
    )
    executed = jaxpr_flops.flops_by_stage(products)
    began = time.monotonic()
    outcome = compile_step(step.lowered, spec, compiler)
    seconds = time.monotonic() - began
    read = _read(outcome, pieces, spec) if outcome.refusal is None else {}
    moved = read.get("bytes_moved")
    peak = outcome.peak_bytes
    micro_batches, batch_size, _ = step.abstract.arguments.batch.input_ids.shape
    return Plan(
        spec=spec.name,
        device_kind=device.device_kind,
        devices=count,
        mesh=dict(step.abstract.mesh.shape),
        batch_size=batch_size,
        grad_accumulation=micro_batches,
        memory_bytes=chip.memory,
        fits=peak is not None and peak <= chip.memory,
        peak_bytes=peak,
        argument_bytes=outcome.argument_bytes,
        refusal=outcome.refusal,
        exchanges=read.get("exchanges", {}),
        buffers=read.get("buffers", ()),
        launches=read.get("launches"),
        bytes_moved=moved,
        useful_flops=_useful_flops(step.abstract),
        executed_flops=executed,
        float32_flops=jaxpr_flops.float32_flops(products),
        seconds_of_flops=sum(executed.values()) / count / chip.flops,
        seconds_of_bytes=None if moved is None else moved / chip.bandwidth,
        compile_seconds=seconds,
        compiler=f"jax {jax.__version__}, {compiler.version}",
        date=datetime.date.today().isoformat(),
    )


@dataclass(frozen=True)
class Outcome:
    """What a compiler gave: the program's text and memory, or its refusal."""

    text: str = ""
    peak_bytes: int | None = None
    argument_bytes: int | None = None
    refusal: str | None = None


def compile_step(lowered: jax.stages.Lowered, spec: DeviceSpec, compiler: Compiler) -> Outcome:
    """Compiles a lowered step for a place."""
    with tempfile.TemporaryDirectory() as scratch:
        options = dict(compiler.options)
        if spec.is_tpu:
            # A large TPU program may crash `as_text`; a dump is the same text.
            options |= {"xla_dump_to": scratch, "xla_dump_hlo_as_text": True}
        try:
            program = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise  # a fault of the program or of the compiler, not an answer
            said = [line.strip() for line in str(error).splitlines() if line.strip()]
            return Outcome(refusal=" ".join(said[:2])[:400])
        if spec.is_tpu:
            # The step's is the longest: small modules may be dumped beside it.
            dumps = Path(scratch).rglob("*.after_optimizations.txt")
            text = max((dump.read_text() for dump in dumps), key=len)
        else:
            text = program.as_text() or ""
    memory = program.memory_analysis()
    assert memory is not None
    peak = memory.peak_memory_in_bytes
    if not peak:  # 0: this compiler does not tell it
        peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return Outcome(text, peak, memory.argument_size_in_bytes)


def _read(outcome: Outcome, unknown_trip_count: int, spec: DeviceSpec) -> dict[str, Any]:
    program = hlo.read_program(outcome.text, unknown_trip_count=unknown_trip_count)
    exchanges: dict[str, Exchange] = {}
    for one in hlo.collectives(program):
        so_far = exchanges.get(one.kind, Exchange(0, 0, 0, 0))
        exchanges[one.kind] = Exchange(
            so_far.count + one.times,
            so_far.bytes + one.bytes * one.times,
            max(so_far.largest, one.bytes),
            max(so_far.largest_in_loop, one.bytes if one.loop else 0),
        )
    return {
        "exchanges": exchanges,
        "buffers": tuple(hlo.largest_buffers(program)),
        "launches": None if spec.is_tpu else hlo.launches(program),
        "bytes_moved": hlo.bytes_moved(program),
    }


def _useful_flops(step: AbstractStep) -> dict[str, float]:
    trainer, batch = step.program.trainer, step.arguments.batch
    micro_batches, batch_size, length = batch.input_ids.shape
    parts = step_flops(
        trainer.draft_model.cfg,
        length,
        trainer.num_anchors,
        target=step.program.target.cfg if batch.features is None else None,  # captured before
        target_logits=reads_target(trainer.loss_type, kl_weight=trainer.kl_weight),
    )
    return {stage: flops * micro_batches * batch_size for stage, flops in parts.items()}


def largest_batch(first: int, planned: Callable[[int], Plan], *, multiple_of: int) -> Plan:
    """The plan of the largest `data.batch_size` that fits, or of the smallest, which does not.

    A step is taken to fit up to some batch size and not beyond.

    Args:
        first: the batch size that is tried first.
        planned: the plan of a batch size; asked for as few as it takes: it may compile for minutes.
        multiple_of: divisor of every batch size.
    """
    plans: dict[int, Plan] = {}

    def fits(count: int) -> bool:
        plans[count] = planned(count * multiple_of)
        return plans[count].fits

    good, bad = 0, max(first // multiple_of, 1)
    while fits(bad):
        good, bad = bad, bad * 2
    while bad - good > 1:
        middle = (good + bad) // 2
        if fits(middle):
            good = middle
        else:
            bad = middle
    return plans[good or 1]


def read_plan(path: Path) -> Plan:
    """Reads a plan that `write_json` wrote."""
    tree = json.loads(path.read_text(encoding="utf-8"))
    tree["exchanges"] = {kind: Exchange(**one) for kind, one in tree["exchanges"].items()}
    tree["buffers"] = tuple(hlo.Buffer(**one) for one in tree["buffers"])
    return Plan(**tree)


def write_json(path: Path, tree: Any) -> None:
    """Writes JSON beside its place and renames it.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        write_whole(path, json.dumps(tree, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
