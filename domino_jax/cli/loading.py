"""Targets and runs as the verbs load them, checked against each other.

Imports jax; the verbs import this module once their arguments are checked.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from domino_jax.base.errors import InputError, Scalars, require
from domino_jax.cli.shared import reporter
from domino_jax.config.model import DecoderConfig, DraftConfig
from domino_jax.data.prompt import stop_token_ids
from domino_jax.data.template import chat_template, dated
from domino_jax.decoding.decoder import Decoder, make_decoder
from domino_jax.draft.backbone import DraftModel
from domino_jax.target.decoder import Target
from domino_jax.target.decoder_keys import read_decoder_config
from domino_jax.target.fingerprint import hashed_beside, tokenizer_fingerprint
from domino_jax.target.load import load_target, load_tokenizer
from domino_jax.target.resolve import resolve_target
from domino_jax.target.tokens import end_token_ids, special_token_ids
from domino_jax.training.checkpoint import StoredDraft, load_draft


@dataclass(frozen=True)
class NamedTarget:
    """A target without its weights: directory, config, tokenizer, and its files' end tokens."""

    path: Path
    config: DecoderConfig
    tokenizer: Any
    end_ids: tuple[int, ...]

    def decoder(self, draft: DraftConfig | None = None, **how: Any) -> Decoder:
        """What decodes with this target, alone or with a draft; `how` as of `make_decoder`."""
        return make_decoder(Target(self.config), DraftModel(draft) if draft else None, **how)


@dataclass(frozen=True)
class Loaded(NamedTarget):
    """A target with its parameters, layers apart."""

    params: Any


def open_named_target(name: str, dtype: str, *, max_new_tokens: int) -> NamedTarget:
    """Reads the small files of a target by built-in name or directory.

    Raises:
        InputError: as `read_decoder_config`, `load_tokenizer` and `end_token_ids`, or answers are
            to be longer than the target has positions.
    """
    path = resolve_target(name, reporter=reporter)
    config = read_decoder_config(path, dtype=dtype)
    longest = config.max_position_embeddings
    require(
        max_new_tokens <= longest,
        f"--max-new-tokens {max_new_tokens}: {path} has {longest} positions; give fewer",
    )
    return NamedTarget(path, config, load_tokenizer(path), end_token_ids(path))


def load_named_target(name: str, dtype: str, *, max_new_tokens: int) -> Loaded:
    """Reads a target by built-in name or directory.

    Raises:
        InputError: as `open_named_target` and `load_weights`.
    """
    return load_weights(open_named_target(name, dtype, max_new_tokens=max_new_tokens))


def load_weights(target: NamedTarget) -> Loaded:
    """Reads the weights of a target.

    Raises:
        InputError: as `load_target`.
    """
    reporter.say(f"loading the target {target.path}, {target.config.dtype}")
    params = load_target(target.path, dtype=target.config.dtype).params
    return Loaded(**vars(target), params=params)


def load_run(
    run: Path,
    dtype: str | None,
    chat_template_kwargs: Scalars | None = None,
    *,
    step: int | None = None,
    max_new_tokens: int,
) -> tuple[Loaded, StoredDraft]:
    """Reads a run: its target, and its draft with a config in the compute type.

    Args:
        run: the run directory.
        dtype: compute type of both; None takes the one that the run trains in.
        chat_template_kwargs: settings of the chat template; None takes the run's own. The date is
            the run's own where they have none.
        step: of the checkpoint; None takes the newest.
        max_new_tokens: of an answer.
    Raises:
        InputError: draft, target and chat template do not fit each other, or the target is not the
            one that the draft was trained for.
    """
    reporter.say(f"loading the draft of {run}")
    stored = load_draft(run, reporter=reporter, step=step)
    record = stored.record
    compute = dtype or record.config.dtype
    as_trained = "" if dtype else ", as it was trained"
    reporter.say(f"step {stored.step} of {run}, computed in {compute}{as_trained}")
    path = resolve_target(record.target, reporter=reporter)
    # Hashing reads all of the weights, so it runs beside their loading.
    with hashed_beside(path) as target_sha256:
        loaded = load_named_target(record.target, compute, max_new_tokens=max_new_tokens)
        hashes = target_sha256(), tokenizer_fingerprint(path, loaded.tokenizer)
    trained = record.chat_template
    kwargs = trained.kwargs if chat_template_kwargs is None else chat_template_kwargs
    asked = chat_template(loaded.tokenizer, dated(loaded.tokenizer, kwargs, trained.kwargs))
    asked.check_trained(trained, source=str(run), target=record.target)
    trained_with = record.target_sha256, record.tokenizer_sha256
    for name, was, now in zip(("target", "tokenizer"), trained_with, hashes, strict=True):
        require(
            was == now,
            f"{path}: the {name} has changed since {run} was trained with it: sha256 was "
            f"{str(was)[:12]}, is {now[:12]}; put its files back",
        )
    record = replace(record, config=replace(record.config, dtype=compute))
    stop_ids = stop_token_ids(loaded.tokenizer, asked.kwargs, end_ids=loaded.end_ids)
    check_fit(record.config, Target(loaded.config), loaded.tokenizer, stop_ids=stop_ids)
    return loaded, replace(stored, record=record)


def check_fit(
    config: DraftConfig, target: Target, tokenizer: Any, *, stop_ids: tuple[int, ...]
) -> None:
    """Raises `InputError` unless the draft can serve this target, whose answers `stop_ids` end."""
    # What decodes knows best what fits; nothing is decoded, and no weight is looked at.
    try:
        make_decoder(target, DraftModel(config))
    except ValueError as error:
        raise InputError(str(error)) from error
    role = special_token_ids(tokenizer, stop_ids).get(config.mask_token_id)
    require(role is None, f"mask_token_id {config.mask_token_id} is the target's {role} token")
