"""What a run would be, told before it costs anything: `domino train CONFIG --dry-run`.

Most mistakes show in the last part, the first row with the tokens that the loss counts marked:

    user What is 2 + 2?\\n assistant ⟦4\\n⟧        in colour on a terminal
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from domino_jax.base.escapes import printable
from domino_jax.base.marks import MARKS, STYLE
from domino_jax.data.packing import row_lengths
from domino_jax.draft.build import boxed_parameters
from domino_jax.objective.objectives import reads_target
from domino_jax.target.decoder import Target
from domino_jax.target.load import boxed_parameters as boxed_target
from domino_jax.training.inputs import InputRows
from domino_jax.training.preflight import (
    GIGABYTE,
    checkpoint_bytes,
    checkpoints_at_once,
    free_bytes,
)
from domino_jax.training.program import abstract_batch
from domino_jax.training.rollout import prompts_at_once, target_cache_bytes
from domino_jax.training.run import RunInputs
from domino_jax.training.step import Batch

SAMPLED = 64  # rows of a capture whose masks are read: each lies beside megabytes of states
LONGEST_SPAN = 1200  # characters of a row that are shown in one piece


class Span(NamedTuple):
    """Text of tokens that stand together; `supervised` where the loss counts them."""

    text: str
    supervised: bool


def print_preview(run: RunInputs, console: Console) -> None:
    """Prints a run's recipe, sizes, shapes and first row; creates nothing.

    Args:
        run: its inputs.
        console: of any width; colours mark the row on a terminal, brackets elsewhere.
    """
    # As `Text`, here and below: rich would take [brackets] in a plain string for markup.
    recipe = yaml.safe_dump(dict(run.settings), sort_keys=False)
    console.print(Text(recipe), soft_wrap=True)
    # The run's own first batch, shuffled and packed as training will see it.
    first = next(run.batches())
    figures = Table("", "", show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, words in (*_models(run), *_data(run), *_steps(run), *_shapes(run, first)):
        figures.add_row(*(Text(printable(cell), overflow="fold") for cell in (name, words)))
    console.print(figures)

    numbers = [int(number) for number in first["row_numbers"][0] if number >= 0]
    count = sum(row_lengths(run.rows.rows)[number] for number in numbers)
    spans = supervised_spans(
        run.tokenizer, first["input_ids"][0, :count], first["loss_mask"][0, :count]
    )
    marked = "green" if console.is_terminal else MARKS
    where = f"{_where(run, numbers)} of {printable(run.source)}"
    console.print(Text(f"\nfirst row of the first batch, {where}"))
    console.print(Text(f"what the loss counts: {marked}"))
    console.print(_marked(spans, coloured=console.is_terminal))


def supervised_spans(tokenizer: Any, ids: np.ndarray, mask: np.ndarray) -> Iterator[Span]:
    """The text of a row in spans of one kind.

    Args:
        tokenizer: of the target.
        ids: int32 [n].
        mask: bool [n], True where the loss counts a token.
    """
    text, end = "", 0
    for supervised, group in itertools.groupby(mask.tolist()):
        end += len(list(group))
        # From the start each time: alone, a span would lose the space before its first word.
        longer = tokenizer.decode(
            ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        yield Span(longer[len(text) :], supervised)
        text = longer


def escaped(text: str) -> str:
    """The text with what a terminal would obey or not show as escapes.

    A line still ends after its `\\n`.
    """
    return printable(text).replace("\\n", "\\n\n")


def _marked(spans: Iterable[Span], *, coloured: bool) -> Text:
    marked = Text()
    for span in spans:
        text = span.text
        left_out = len(span.text) - LONGEST_SPAN
        if left_out > 0:  # its ends stay: they are where the mask begins and stops
            half = LONGEST_SPAN // 2
            text = f"{text[:half]} [... {left_out:,} characters ...] {text[-half:]}"
        if not span.supervised:
            marked.append(escaped(text))
        elif coloured:
            marked.append(escaped(text), style=STYLE)
        else:
            marked.append(f"{MARKS[0]}{escaped(text)}{MARKS[1]}")
    return marked


def _where(run: RunInputs, numbers: list[int]) -> str:
    """Which rows a batch row is made of: lines of their file, or rows of a capture."""
    if run.rows.captured:
        unit, places = "row", [str(number + 1) for number in numbers]
    else:
        unit, places = "line", [str(run.rows.rows[number].line) for number in numbers]
    several = "s" if len(numbers) > 1 else ""
    return f"{unit}{several} {', '.join(places)}"


def _models(run: RunInputs) -> Iterator[tuple[str, str]]:
    draft, cadence = run.record.config, run.cadence
    yield "target", f"{run.record.target}: {run.target}"
    # Scanned: one trace of a layer counts for all of them.
    whole = Target(run.program.target.cfg, scan_layers=True)
    yield "target's parameters", _counts(boxed_target(whole))
    yield "draft's parameters", _counts(boxed_parameters(draft))
    yield "target's layers read", ", ".join(map(str, draft.target_layer_ids))
    one = checkpoint_bytes(draft, average=run.program.ema_decay is not None) / GIGABYTE
    count = checkpoints_at_once(cadence.keep_checkpoints, keep_best=cadence.keep_best is not None)
    free = free_bytes(run.directory) / GIGABYTE
    parts = "parameters, moments, average if kept"
    yield "a checkpoint", f"{one:.3g} GB at most, float32: {parts}"
    yield "on disk", f"{count} at once, {count * one:.3g} GB; {free:.3g} GB are free"


def _counts(boxed: Mapping[str, Any]) -> str:
    """How many parameters there are, and how many in each part."""
    parts: dict[str, int] = {}
    for name, tree in boxed.items():
        part = "norms" if name.endswith("norm") else name
        if name.startswith("layers"):
            part = "layers"
        sizes = [leaf.size for leaf in jax.tree.leaves(tree)]
        parts[part] = parts.get(part, 0) + sum(sizes)
    by_part = ", ".join(f"{name} {count:,}" for name, count in parts.items())
    return f"{sum(parts.values()):,}: {by_part}"


def _data(run: RunInputs) -> Iterator[tuple[str, str]]:
    for name, part in (("training rows", run.rows), ("held-out rows", run.heldout)):
        if part is not None:
            tokens = sum(row_lengths(part.rows))
            yield name, part.summary(max_length=run.shape.max_length)
            yield "", f"{tokens:,} tokens, {_supervised_share(part)}"
    if run.prompts:
        longest = max(map(len, run.prompts))
        yield "rollout prompts", f"{len(run.prompts)} of up to {longest:,} tokens"
        size = target_cache_bytes(run) / GIGABYTE
        yield "", f"{prompts_at_once(run)} at once: {size:.3g} GB of keys and values of the target"


def _supervised_share(part: InputRows) -> str:
    # Rows of conversations are in memory: all of them count.
    sample = itertools.islice(part.rows, SAMPLED if part.captured else None)
    masks = [row.loss_mask for row in sample]
    share = sum(int(mask.sum()) for mask in masks) / sum(mask.size for mask in masks)
    which = f" (of the first {len(masks)} rows)" if part.captured else ""
    return f"{share:.1%} of them supervised{which}"


def _steps(run: RunInputs) -> Iterator[tuple[str, str]]:
    epochs = run.last_step * run.shape.step_rows / run.rows.epoch_rows
    resumed = "" if run.resumed is None else f"; the run resumes at step {run.resumed.step}"
    yield "steps", f"{run.last_step:,} of {run.shape.step_rows} rows: {epochs:.3g} epochs{resumed}"
    sizes = ", ".join(f"{axis} {size}" for axis, size in run.mesh.shape.items())
    yield "mesh", f"{sizes}: {run.mesh.size} x {run.mesh.devices.flat[0].device_kind}"


def _shapes(run: RunInputs, first: Mapping[str, np.ndarray]) -> Iterator[tuple[str, str]]:
    trainer = run.program.trainer
    layout = abstract_batch(
        run.shape,
        run.record.config,
        run.mesh,
        captured=run.rows.captured,
        target_states=reads_target(trainer.loss_type, kl_weight=trainer.kl_weight),
        documents=None if run.rows.packs is None else first["row_numbers"].shape[1],
    )
    for name in Batch._fields:
        laid = getattr(layout, name)
        if laid is not None:
            # What has to fit is the share of a device, which a mesh of several makes smaller.
            own = list(laid.sharding.shard_shape(laid.shape))
            yield f"batch: {name}", f"{first[name].dtype} {list(laid.shape)} a step, {own} a device"
