"""How fast a run trains: what a window of steps put through a second, and what the chips could do.

Rows differ in length and in how many anchors they have, and a speed that counts padding can be
raised by padding. So what was really there is counted: tokens without padding, predictions that
were supervised, blocks that were trained on.

    begin | step step step | paused: a save | step step | figures, begin | ...
          | counted        | not counted    | counted   |
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from domino_jax.base.chips import Chip
from domino_jax.objective.objectives import reads_target
from domino_jax.training.flops import step_flops
from domino_jax.training.step import Program


class Speed:
    """Counts the steps of a window and gives its figures.

    Each process counts the tokens of its own rows and takes the others to have as many.
    """

    def __init__(
        self,
        program: Program,
        mesh: Mesh,
        *,
        lengths: Sequence[int],
        step_rows: int,
        target_runs: bool,
        chip: Chip | None,
    ) -> None:
        """Begins a window.

        Args:
            program: of a step.
            mesh: devices of the run.
            lengths: tokens of each row of its data.
            step_rows: batch rows of a step.
            target_runs: whether a step runs the target's layers, or reads captured states.
            chip: what is published of the devices, if anything.
        """
        self._program, self._mesh = program, mesh
        self._lengths = np.asarray(lengths)
        self._step_rows, self._target_runs, self._chip = step_rows, target_runs, chip
        self.begin()

    def begin(self) -> None:
        """Begins a window; what was counted before is forgotten."""
        self._began = time.monotonic()
        self._steps = self._tokens = self._conversations = 0

    def add(self, row_numbers: np.ndarray) -> None:
        """Counts one step; its rows are int [...], -1 for none."""
        # From the rows' numbers: the lengths are known on the host, and no device is asked.
        there = row_numbers[row_numbers >= 0]
        self._steps += 1
        self._tokens += int(self._lengths[there].sum()) * jax.process_count()
        self._conversations += there.size * jax.process_count()

    @contextmanager
    def paused(self, state: Any) -> Iterator[None]:
        """Time that does not count; the steps that lead to `state` are waited for first, and do."""
        # Else the steps that are in flight would end within the pause, and count as nothing.
        jax.block_until_ready(state)
        stopped = time.monotonic()
        yield
        self._began += time.monotonic() - stopped

    def figures(self, sums: dict[str, Any]) -> dict[str, float]:
        """The figures of the window, whose steps have all run.

        Args:
            sums: of `train_step` over the window.
        Returns:
            `samples_per_second` (rows of batches), `tokens_per_second`,
            `supervised_tokens_per_second`, `seconds_per_step`; where known, `mfu`, the useful FLOPs
            per second (`step_flops`) over the published bfloat16 peak of all devices, and
            `peak_memory_bytes`, the most that one device of this process has held.
        """
        seconds = time.monotonic() - self._began
        figures = {
            "samples_per_second": self._steps * self._step_rows / seconds,
            "tokens_per_second": self._tokens / seconds,
            "supervised_tokens_per_second": float(sums["valid_tokens"]) / seconds,
            "seconds_per_step": seconds / self._steps,
        }
        if self._chip is not None:
            program, trainer, count = self._program, self._program.trainer, self._conversations
            # Per conversation, not per batch row: packed ones do not see each other.
            parts = step_flops(
                trainer.draft_model.cfg,
                self._tokens / count,
                float(sums["valid_blocks"]) / count,
                target=program.target.cfg if self._target_runs else None,
                target_logits=reads_target(trainer.loss_type, kl_weight=trainer.kl_weight),
            )
            # Over the whole mesh: tokens and blocks are those of all processes.
            peak_flops = self._mesh.size * self._chip.flops
            figures["mfu"] = count * sum(parts.values()) / seconds / peak_flops
        peak = peak_memory_bytes(self._mesh.local_devices)
        if peak is not None:
            figures["peak_memory_bytes"] = peak
        return figures


def peak_memory_bytes(devices: Sequence[jax.Device]) -> int | None:
    """The most memory that one of the devices has held; None where the platform is silent."""
    statistics = [device.memory_stats() or {} for device in devices]  # None on a CPU
    peaks = [found["peak_bytes_in_use"] for found in statistics if "peak_bytes_in_use" in found]
    return max(peaks, default=None)


def speed_words(figures: dict[str, float]) -> str:
    """The figures that a person watches."""
    words = f"{figures['tokens_per_second']:,.0f} tokens/s"
    return f"{words}  MFU {figures['mfu']:.1%}" if "mfu" in figures else words
