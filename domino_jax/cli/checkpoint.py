"""Engines and trainers read a draft each a little differently, so none passes here unchecked.

`export` checks what leaves for its reader, `import` what comes in against the target it is for.
"""

from pathlib import Path

import click

from domino_jax.base.errors import InputError, Scalars
from domino_jax.base.files import check_new, whole_directory, write_error
from domino_jax.base.lock import lock_beside
from domino_jax.cli import options
from domino_jax.cli.interrupts import keeps
from domino_jax.cli.shared import echo, own, reporter
from domino_jax.data.template import NO_KWARGS, chat_template, check_kwargs, dated
from domino_jax.interop.engines import ENGINES, engine_refusals, proposals_note
from domino_jax.target.decoder_keys import read_decoder_config
from domino_jax.target.fingerprint import target_fingerprint, tokenizer_fingerprint
from domino_jax.target.resolve import resolve_target


@click.command()
@click.argument("run", type=options.PATH)
@click.argument("directory", type=options.PATH)
@click.option("--dtype", type=options.DTYPE, default="bfloat16", help="Type of the stored tensors.")
@click.option(
    "--for",
    "engine",
    type=click.Choice(ENGINES),
    help="Refuse what this reader would misread, see above.",
)
@options.step
def export(run: Path, directory: Path, dtype: str, engine: str | None, step: int | None) -> None:
    """Write the drafter of RUN to DIRECTORY as config.json and safetensors, which engines serve.

    \b
    What --for refuses, because the reader would draft other tokens:
      sglang     a Domino draft with pure_draft_prefix_len other than 1 or in float32;
                 scaled embeddings or logits; the target's last layer
      vllm       Domino drafts (it has no head); scaled embeddings or logits;
                 the target's last layer
      zlab       Domino drafts
      nemo       sliding layers that are causal inside the block;
                 the target's last layer
      specforge  sliding layers that look both ways inside the block;
                 scaled embeddings or logits
      all        plain DFlash drafts with shift_label; heads other than Domino's
    """
    check_new(directory)  # before the run is read
    own(lock_beside, directory)
    # Before `keeps`: until then a signal ends the process at once.
    from domino_jax.interop.hf import save_hf_draft
    from domino_jax.training.checkpoint import load_draft

    keeps(f"{directory} is whole or was not made; the same command starts over")
    reporter.say(f"loading the draft of {run}")
    stored = load_draft(run, reporter=reporter, step=step)
    record = stored.record
    # Before anything is written: what an engine misreads is not worth exporting for it.
    refusals = engine_refusals(record.config, engine, dtype=dtype) if engine else []
    if refusals:
        raise InputError(f"{run}: not for {engine}: {'; '.join(refusals)}")
    reporter.say(f"saving {directory}")
    save_hf_draft(
        directory, record.config, stored.params, dtype=dtype, chat_template=record.chat_template
    )
    keeps(f"{directory} is complete")
    reporter.say(f"step {stored.step} of {run} exported and read back, {dtype}")
    if engine:
        reporter.say(proposals_note(record.config, engine))
    echo(directory)


@click.command(name="import")
@click.argument("directory", type=options.PATH)
@click.argument("run", type=options.PATH)
@options.target
@options.chat_template_kwargs
def import_(directory: Path, run: Path, target: str, chat_template_kwargs: Scalars | None) -> None:
    """Make the run directory RUN from the draft checkpoint in DIRECTORY.

    RUN then serves generate, evaluate and export.
    """
    check_new(run)
    own(lock_beside, run)
    # Before `keeps`: until then a signal ends the process at once.
    from domino_jax.cli.loading import check_fit
    from domino_jax.data.prompt import stop_token_ids
    from domino_jax.interop.hf import load_hf_draft, recorded_template
    from domino_jax.target.decoder import Target
    from domino_jax.target.load import load_tokenizer
    from domino_jax.target.tokens import end_token_ids
    from domino_jax.training.checkpoint import save_draft
    from domino_jax.training.preflight import check_pattern
    from domino_jax.training.records import DraftRecord

    check_pattern(run)
    keeps(f"{run} is whole or was not made; the same command starts over")
    reporter.say(f"loading {directory}")
    config, params = load_hf_draft(directory)
    # The layout of the block decides which token a position predicts, and its default is silent.
    reporter.say(
        f"draft: projector_type {config.projector_type}, block_size {config.block_size}, "
        f"shift_label {str(config.shift_label).lower()}, target layers "
        f"{list(config.target_layer_ids)}"
    )
    path = resolve_target(target, reporter=reporter)
    tokenizer = load_tokenizer(path)
    trained_with = recorded_template(directory)
    recorded = NO_KWARGS if trained_with is None else trained_with.kwargs
    asked = recorded if chat_template_kwargs is None else chat_template_kwargs
    template = chat_template(tokenizer, dated(tokenizer, asked, recorded))
    if trained_with is None:
        # With no record to compare it with, only this notices a misspelt setting.
        check_kwargs(tokenizer, template.kwargs)
        reporter.say(
            f"{directory} does not say which chat template it was trained with; "
            f"taking that of {target}"
        )
    else:
        template.check_trained(trained_with, source=str(directory), target=target)
    stop_ids = stop_token_ids(tokenizer, template.kwargs, end_ids=end_token_ids(path))
    # Sizes alone are compared: no weights are read, and the compute type does not matter.
    model = Target(read_decoder_config(path, dtype="float32"))
    check_fit(config, model, tokenizer, stop_ids=stop_ids)
    reporter.say(f"saving {run}")
    hashes = target_fingerprint(path), tokenizer_fingerprint(path, tokenizer)
    record = DraftRecord(config, target, template, *hashes)
    # Half a run directory would be taken for a run by every other verb.
    with whole_directory(run) as beside:
        try:
            save_draft(beside, params, record)
        except (ValueError, RuntimeError) as error:  # TensorStore has no OSError
            raise write_error(error, run) from error
    keeps(f"{run} is complete")
    echo(run)
