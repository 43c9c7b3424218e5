"""Plans: memory, collectives, launches and FLOPs of a training step on devices that are not here.

`domino plan` compiles the step of a run ahead of time and reads the program:

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
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from domino_jax.base.chips import CHIPS
from domino_jax.base.errors import InputError
from domino_jax.base.files import read_own_json, write_json
from domino_jax.base.progress import Reporter
from domino_jax.objective.objectives import reads_target
from domino_jax.plan import hlo, jaxpr_flops
from domino_jax.plan.topology import Compiler
from domino_jax.training.flops import step_flops
from domino_jax.training.prepare import AbstractStep
from domino_jax.training.program import traced_step

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50}


@dataclass(frozen=True)
class Exchange:
    """All collectives of one kind in a step; bytes are of whole arrays on one device."""

    count: int = 0
    bytes: int = 0
    largest: int = 0
    largest_in_loop: int = 0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a step takes on a topology; bytes, launches and seconds are of one device."""

    spec: str  # as it was asked for
    device_kind: str
    devices: int
    mesh: dict[str, int]  # devices along each axis
    batch_size: int  # batch rows of a micro-batch, over all devices
    grad_accumulation: int  # micro-batches of a step
    memory_bytes: int  # published of the device; a system may keep some of it
    fits: bool  # the compiler took it, and its peak is within that memory
    peak_bytes: int | None  # the most that the program holds at once; None with a refusal
    argument_bytes: int | None  # of them, parameters, optimiser, target and batch
    refusal: str | None  # the compiler's message instead
    exchanges: dict[str, Exchange] = field(default_factory=dict)  # by kind of collective
    buffers: tuple[hlo.Buffer, ...] = ()  # the largest arrays that operations write
    launches: int | None = None  # kernels and library calls on a GPU, at most; None on a TPU
    bytes_moved: int | None = None  # between memory and cores, see `hlo.bytes_moved`
    # Of a step on all devices by stage: every batch row full (`training.flops`); then at most.
    useful_flops: dict[str, float]
    executed_flops: dict[str, float]
    float32_flops: float  # of the executed ones, products of float32 with float32
    seconds_of_flops: float  # executed FLOPs at the chip's peak
    seconds_of_bytes: float | None = None  # bytes moved at the chip's bandwidth
    compile_seconds: float  # on the machine that planned
    compiler: str  # its name and version
    date: str  # of the compilation, ISO
    cached: bool = False  # whether this was planned before

    @property
    def needed_bytes(self) -> int | None:
        """The peak, or what a refusal says of it; None where it says nothing."""
        if self.peak_bytes is not None or self.refusal is None:
            return self.peak_bytes
        # As compilers word it: "temporaries (20.50G)" or "Used 20.50G".
        found = re.search(r"(?:temporaries \(|Used )([\d.]+)([KMGTP]?)", self.refusal)
        return int(float(found[1]) * _UNITS[found[2]]) if found else None


def traced_on_mesh(step: AbstractStep) -> jax.stages.Traced:
    """The step, traced for its devices and ready to be lowered."""
    # Not `with mesh:`, under which the layers' constraints do nothing, in silence.
    with jax.set_mesh(step.mesh):
        return traced_step(step.program, step.arguments)


def unknown_trip_count(step: AbstractStep) -> int:
    """Chunks of the vocabulary loss: only data knows which holds the last supervised block."""
    trainer = step.program.trainer
    return -(-trainer.num_anchors // trainer.chunk_blocks)


@dataclass(frozen=True)
class Outcome:
    """A compiler's result: the program's text and memory, or its refusal."""

    seconds: float
    text: str = ""
    peak_bytes: int | None = None
    argument_bytes: int | None = None
    refusal: str | None = None


def compile_step(lowered: jax.stages.Lowered, compiler: Compiler) -> Outcome:
    """Compiles a lowered step for the compiler's devices."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        options = dict(compiler.options)
        if compiler.spec.is_tpu:
            # A large TPU program may crash `as_text`; a dump is the same text.
            options |= {"xla_dump_to": scratch, "xla_dump_hlo_as_text": True}
        try:
            program = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise  # a fault of the program or of the compiler, not an answer
            said = [line.strip() for line in str(error).splitlines() if line.strip()]
            return Outcome(time.monotonic() - began, refusal=" ".join(said[:2])[:400])
        seconds = time.monotonic() - began
        if compiler.spec.is_tpu:
            # The step's is the longest: small modules may be dumped beside it.
            dumps = Path(scratch).rglob("*.after_optimizations.txt")
            text = max((dump.read_text() for dump in dumps), key=len)
        else:
            text = program.as_text() or ""
    memory = program.memory_analysis()
    assert memory is not None
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    peak = memory.peak_memory_in_bytes or held  # 0: this compiler does not tell it
    return Outcome(seconds, text, peak, memory.argument_size_in_bytes)


def plan(step: AbstractStep, compiler: Compiler, *, cache: Path, reporter: Reporter) -> Plan:
    """Compiles the step of a run, unless that program was planned before.

    Args:
        step: over the compiler's devices.
        compiler: for them.
        cache: a directory that keeps plans by program; made where it is missing.
        reporter: is told each long stage.
    """
    spec = compiler.spec.name
    traced = traced_on_mesh(step)
    lowered = traced.lower()
    # The code that reads the program too: a plan that older code made is not taken for its own.
    readers = [Path(name).read_text() for name in (hlo.__file__, jaxpr_flops.__file__, __file__)]
    told = (lowered.as_text(), spec, jax.__version__, compiler.version, *readers)
    kept = cache / f"{hashlib.sha256(chr(0).join(told).encode()).hexdigest()}.json"
    batch_size = step.arguments.batch.input_ids.shape[1]
    if kept.is_file():
        try:
            found = read_plan(kept)
        except InputError as error:
            reporter.say(f"{error}; planned again")
        else:
            reporter.say(f"{spec}, batch {batch_size}: planned before ({kept})")
            return dataclasses.replace(found, cached=True)
    reporter.say(f"compiling for {spec}, batch {batch_size}")
    outcome = compile_step(lowered, compiler)
    reporter.say(f"compiled for {spec} in {outcome.seconds:.0f} s")
    made = _read(step, traced, outcome, compiler)
    cache.mkdir(parents=True, exist_ok=True)
    write_json(kept, dataclasses.asdict(made))
    return made


def _read(
    step: AbstractStep, traced: jax.stages.Traced, outcome: Outcome, compiler: Compiler
) -> Plan:
    device = compiler.devices[0]
    chip = CHIPS[device.device_kind]
    count = len(compiler.devices)
    trip_count = unknown_trip_count(step)
    products = jaxpr_flops.products(traced, platform=device.platform, unknown_trip_count=trip_count)
    executed = jaxpr_flops.flops_by_stage(products)
    found: dict[str, Any] = {}
    if outcome.refusal is None:
        program = hlo.read_program(outcome.text, unknown_trip_count=trip_count)
        moved = hlo.bytes_moved(program)
        found = {
            "exchanges": _exchanges(program),
            "buffers": tuple(hlo.largest_buffers(program)),
            "launches": None if compiler.spec.is_tpu else hlo.launches(program),
            "bytes_moved": moved,
            "seconds_of_bytes": moved / chip.bandwidth,
        }
    peak = outcome.peak_bytes
    micro_batches, batch_size, _ = step.arguments.batch.input_ids.shape
    return Plan(
        spec=compiler.spec.name,
        device_kind=device.device_kind,
        devices=count,
        mesh=dict(step.mesh.shape),
        batch_size=batch_size,
        grad_accumulation=micro_batches,
        memory_bytes=chip.memory,
        fits=peak is not None and peak <= chip.memory,
        peak_bytes=peak,
        argument_bytes=outcome.argument_bytes,
        refusal=outcome.refusal,
        useful_flops=_useful_flops(step),
        executed_flops=executed,
        float32_flops=float(sum(one.total_flops for one in products if one.float32)),
        seconds_of_flops=sum(executed.values()) / count / chip.flops,
        compile_seconds=outcome.seconds,
        compiler=f"jax {jax.__version__}, {compiler.version}",
        date=datetime.date.today().isoformat(),
        **found,
    )


def _exchanges(program: hlo.CompiledProgram) -> dict[str, Exchange]:
    """The collectives of a program by kind."""
    exchanges: dict[str, Exchange] = {}
    for one in hlo.collectives(program):
        so_far = exchanges.get(one.kind, Exchange())
        exchanges[one.kind] = Exchange(
            so_far.count + one.times,
            so_far.bytes + one.bytes * one.times,
            max(so_far.largest, one.bytes),
            max(so_far.largest_in_loop, one.bytes if one.loop else 0),
        )
    return exchanges


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
    """Reads a plan of the cache.

    Raises:
        InputError: it was changed, or another version wrote it.
    """
    tree = read_own_json(path, remedy="not used")
    try:
        tree["exchanges"] = {kind: Exchange(**one) for kind, one in tree["exchanges"].items()}
        tree["buffers"] = tuple(hlo.Buffer(**one) for one in tree["buffers"])
        return Plan(**tree)
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a plan of this version: {error}") from error
