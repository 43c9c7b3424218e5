"""What a run reads: its rows, and batches of them on the devices of its mesh.

Training, captures, plans and dry runs must speak of the same batches, so all of them ask here. A
batch row is one row, or with packing several that share its S positions:

    file or capture -> rows [n] -> packs -> batch rows [A * B, S] of a process
                                         -> `Batch` [A, B, S] over the mesh, B split, A scanned
    held-out file   -> prompts [n] of rollouts
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from domino_jax.base.errors import InputError, Scalars
from domino_jax.base.files import count_lines
from domino_jax.base.progress import Reporter
from domino_jax.config.model import DecoderConfig, DraftConfig
from domino_jax.data.conversations import Row, load_rows
from domino_jax.data.forms import Conversation, iterate_conversations
from domino_jax.data.hidden_states import FeatureRows, check_manifest, rows_fingerprint
from domino_jax.data.packing import (
    Pack,
    answer_tokens,
    pack_rows,
    padding_share,
    row_lengths,
    single_packs,
)
from domino_jax.data.prompt import prompt_of
from domino_jax.data.rendering import CostlyTemplate
from domino_jax.decoding.decoder import make_decoder
from domino_jax.decoding.generate import check_prompt
from domino_jax.objective.objectives import reads_target
from domino_jax.sharding import axis_size, make_mesh, partition_spec
from domino_jax.target.decoder import Target
from domino_jax.target.tokens import check_vocabulary, token_words
from domino_jax.training.step import Batch


@dataclass(frozen=True, kw_only=True)
class RowSettings:
    """The keys of `data` that decide the tokens of a row; a capture records them as well."""

    max_length: int
    chat_template_kwargs: Scalars
    mask_reasoning_content: bool


@dataclass(frozen=True)
class InputRows:
    """The rows of a run, and which of them share a batch row (None without packing)."""

    rows: Sequence[Row]
    packs: list[Pack] | None

    @property
    def epoch_rows(self) -> int:
        """Batch rows in one epoch."""
        return len(self.rows) if self.packs is None else len(self.packs)

    @property
    def captured(self) -> bool:
        """Whether the rows carry states of the target, which then does not run for them."""
        return isinstance(self.rows, FeatureRows)

    @property
    def figures(self) -> dict[str, int]:
        """How many conversations there are, and tokens of them that the target wrote."""
        # Masks of captured rows lie beside gigabytes of states.
        if isinstance(self.rows, FeatureRows):
            tokens = self.rows.manifest.answer_tokens
        else:
            tokens = answer_tokens(self.rows)
        return {"conversations": len(self.rows), "answer_tokens": tokens}

    @property
    def fingerprint(self) -> str:
        """How many rows, and the sha256 in hex of their ids and masks or of their manifest."""
        # A capture's manifest has the hash of its rows, which lie beside gigabytes of states.
        if isinstance(self.rows, FeatureRows):
            digest = self.rows.fingerprint
        else:
            digest = rows_fingerprint(self.rows)
        return f"{len(self.rows)} rows, sha256 {digest}"

    def summary(self, *, max_length: int) -> str:
        """The number of batch rows and the share of padding in their positions, in words."""
        packs = single_packs(len(self.rows)) if self.packs is None else self.packs
        share = padding_share(row_lengths(self.rows), packs, max_length=max_length)
        packed = "" if self.packs is None else f" packed from {len(self.rows)} conversations"
        return f"{self.epoch_rows} rows{packed} ({share:.1%} of their positions are padding)"


def read_rows(
    path: str,
    tokenizer: Any,
    settings: RowSettings,
    *,
    draft: DraftConfig,
    packing: bool,
    max_unusable: float,
    special_tokens: str,
    end_ids: Sequence[int],
    reporter: Reporter,
) -> InputRows:
    """Reads, encodes and checks conversations, and packs the rows if the run packs.

    Reports lines and answers that are not trained with their reasons, keys that nothing reads,
    special tokens in text, answers that are unfinished, and how many lines are text.

    Args:
        path: of the conversations.
        tokenizer: of the target, with `end_ids`, see `stop_token_ids`.
        settings: of the rows.
        draft: reads the rows, see `check_rows`.
        packing: whether rows share batch rows.
        max_unusable: largest share of lines with something that is not trained.
        special_tokens: see `Reading`.
        end_ids: see `tokenizer`.
        reporter: receives the progress and the report.
    Raises:
        InputError: the file cannot be read, gives no row, more of its lines than `max_unusable`
            are not usable, or a row does not fit the draft.
    """
    with reporter.bar("lines", total=count_lines(Path(path))) as bar:
        found = load_rows(
            path,
            tokenizer,
            end_ids=end_ids,
            special_tokens=special_tokens,
            progress=bar.update,
            **vars(settings),
        )
    rows, lines, bad = found.rows, found.reading.lines, found.bad_lines
    for words in bad.report(path):
        reporter.say(words)
    share = f"{len(bad)} of {lines} lines hold an answer that is not trained"
    if bad:
        reporter.say(f"{path}: {share}")
    for words in found.reading.report():
        reporter.say(words)
    if len(bad) > max_unusable * lines:
        first, count = bad.by_reason()[0]
        raise InputError(
            f"{path}: {share} ({len(bad) / lines:.0%}), {count} for one reason (line "
            f"{first.line}: {first.reason}); expected at most {max_unusable:.0%}: correct "
            "the file, or raise data.max_unusable"
        )
    if found.unfinished:
        reporter.say(
            f"{path}: {found.unfinished} of {lines} lines "
            f"({found.unfinished / lines:.0%}) end with an unfinished answer, cut at its "
            "token limit: no end of turn is learned from it"
        )
    if found.from_text:
        reporter.say(
            f"{path}: {found.from_text} of {lines} lines are text: their token ids are those "
            "of the text tokenised again, and may differ from the generated ones"
        )
    check_rows(rows, tokenizer, draft=draft, path=path)
    return _with_packs(rows, settings, packing=packing)


def check_rows(rows: Sequence[Row], tokenizer: Any, *, draft: DraftConfig, path: str) -> None:
    """Refuses rows that a draft and its target cannot read.

    Args:
        rows: of a file, with their lines.
        tokenizer: gives the text of a token, for messages.
        draft: has the vocabulary and the positions of its target, and a mask token.
        path: of the file, for messages.
    Raises:
        InputError: a row has more tokens than the target has positions, a token outside the
            vocabulary, or the mask token.
    """
    positions, vocab_size = draft.max_position_embeddings, draft.vocab_size
    masked = []
    for row in rows:
        source = f"{path}:{row.line}"
        # Packed or not: positions restart with each row.
        if len(row.input_ids) > positions:
            raise InputError(
                f"{source}: a row of {len(row.input_ids)} tokens, the target has {positions} "
                f"positions; set data.max_length to {positions} at most"
            )
        check_vocabulary(row.input_ids, tokenizer, vocab_size=vocab_size, source=source)
        if (row.input_ids == draft.mask_token_id).any():
            masked.append(row)
    if masked:
        raise InputError(
            f"{path}:{masked[0].line}: the row contains "
            f"{token_words(tokenizer, draft.mask_token_id)}, the mask token; {len(masked)} of "
            f"{len(rows)} rows contain it; give draft.mask_token_id an id that no row contains"
        )


def read_features(
    directory: str,
    settings: RowSettings,
    *,
    target: str,
    tokenizer: str,
    target_layer_ids: tuple[int, ...],
    mask_token_id: int,
    packing: bool,
    loss_type: str,
    kl_weight: float,
) -> InputRows:
    """Opens the captured rows of `data.hidden_states`, and packs them if the run packs.

    Args:
        directory: of the capture.
        settings: of the rows.
        target: sha256 of the target (see `target.fingerprint`), `tokenizer` that of its tokenizer.
        tokenizer: see `target`.
        target_layer_ids: layers that the draft reads.
        mask_token_id: of the draft; no row may contain it.
        packing: whether rows share batch rows.
        loss_type: decides with `kl_weight` which states are read.
        kl_weight: see `LossConfig`.
    Raises:
        InputError: no finished capture, or one of another target, tokenizer, template, layers,
            length or masking, of rows with the mask token, or without the final states, for a loss
            that reads them.
    """
    rows = FeatureRows(directory)
    # Not compared: the stored type, since a step casts the states to the type it computes in.
    of_run = {"target": target, "tokenizer": tokenizer, "target_layer_ids": target_layer_ids}
    check_manifest(directory, rows.manifest, of_run | vars(settings))
    if rows.manifest.contains(mask_token_id):
        raise InputError(
            f"{directory}: the captured rows contain draft.mask_token_id {mask_token_id}; give an "
            "id that no row contains"
        )
    if reads_target(loss_type, kl_weight=kl_weight) and not rows.manifest.target_states:
        raise InputError(
            f"{directory}: captured without the target's final states, which "
            f"loss.loss_type {loss_type} with loss.kl_weight {kl_weight:g} reads; "
            "capture them with --with-target-states"
        )
    return _with_packs(rows, settings, packing=packing)


def read_prompts(
    path: str,
    rows: Sequence[Row],
    tokenizer: Any,
    target: DecoderConfig,
    *,
    chat_template_kwargs: Scalars,
    count: int,
    rollout_tokens: int,
) -> list[np.ndarray]:
    """The prompts of a run's rollouts: what held-out conversations ask, as `evaluate` asks it.

    Args:
        path: the file of held-out conversations.
        rows: read from it; a line that gave no row has no prompt either.
        tokenizer: the target's, as are the `chat_template_kwargs`.
        target: the target.
        chat_template_kwargs: see `DataConfig`.
        count: of the first conversations with a prompt.
        rollout_tokens: longest answer.
    Returns:
        Token ids, int32 [n] each.
    Raises:
        InputError: a prompt, or an answer, exceeds the target's positions, or a prompt has a token
            outside its vocabulary.
    """
    positions = target.max_position_embeddings
    if rollout_tokens > positions:
        raise InputError(
            f"train.rollout_tokens {rollout_tokens}: the target has {positions} "
            "positions; give fewer"
        )
    reader = make_decoder(Target(target))
    lines = iter(dict.fromkeys(row.line for row in rows))
    prompts: dict[int, np.ndarray] = {}
    size = count
    while len(prompts) < count and (wanted := dict.fromkeys(islice(lines, size))):
        # More each time: lines without a prompt, however many, take few passes over the file.
        size *= 4
        # Read once more: a row has its tokens alone, and may be cut before its last answer.
        found = {
            one.line: one
            for one in iterate_conversations(path)
            if isinstance(one, Conversation) and one.line in wanted
        }
        for line in wanted:
            assert line is not None, "held-out rows are read from a file"
            if len(prompts) == count:
                break
            try:
                prompt = prompt_of(found[line], tokenizer, chat_template_kwargs)
            except CostlyTemplate:
                raise
            except InputError:  # a later answer of the line, which is not trained either
                continue
            check_prompt(reader, prompt, tokenizer, source=f"{path}:{line}")
            prompts[line] = prompt
    if not prompts:
        raise InputError(f"{path}: no line of it has a prompt for a rollout")
    return list(prompts.values())


def _with_packs(rows: Sequence[Row], settings: RowSettings, *, packing: bool) -> InputRows:
    packs = pack_rows(row_lengths(rows), max_length=settings.max_length) if packing else None
    return InputRows(rows, packs)


def device_batch(mesh: Mesh, arrays: dict[str, np.ndarray], *, micro_batches: int) -> Batch:
    """Puts the batch rows of this process on the devices: [A * B, ...] -> `Batch` of [A, B, ...].

    The result holds those of all processes. What says where rows come from stays on the host.
    """

    def put(x: np.ndarray) -> jax.Array:
        # Not split over A: a step scans it, and every device takes part in each micro-batch.
        layout = NamedSharding(mesh, partition_spec(None, "batch", *[None] * (x.ndim - 1)))
        return jax.make_array_from_process_local_data(
            layout, x.reshape(micro_batches, -1, *x.shape[1:])
        )

    known = {name: x for name, x in arrays.items() if name in Batch._fields}
    return Batch(**{name: put(x) for name, x in known.items()})


def run_mesh(
    sizes: Mapping[str, int], *, batch_size: int, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """The mesh of a run over the devices of a plan, or over all that are here.

    Args:
        sizes: devices along each axis, by the arguments of `make_mesh`.
        batch_size: batch rows of a micro-batch, over all devices.
        devices: of a plan.
    Raises:
        InputError: the sizes do not fit the devices, or the batch does not divide over them.
    """
    try:
        mesh = make_mesh(**sizes, devices=devices)
    # `make_mesh` serves scripts as well, which have no section `mesh`.
    except ValueError as error:
        raise InputError(f"mesh: {error}") from error
    # Devices that split a model's tensors work on the same batch rows.
    parts = axis_size("batch", mesh)
    if batch_size % parts:
        raise InputError(
            f"data.batch_size {batch_size} must be a multiple of {parts}, the parts "
            f"that its {mesh.size} devices split a batch into"
        )
    return mesh
