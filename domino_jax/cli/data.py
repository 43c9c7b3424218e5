"""Verbs that make training data: `target`, `prompts` and `regenerate`.

The verb `target` makes a directory of the target, `prompts` lets it write requests, `regenerate`
answer them. The options of how the target draws are the settings that each line records.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from domino_jax.base.errors import InputError, Scalars
from domino_jax.base.lock import lock_beside
from domino_jax.cli import options
from domino_jax.cli.interrupts import keeps
from domino_jax.cli.shared import echo, own, reporter
from domino_jax.data.template import dated
from domino_jax.target.resolve import resolve_target


@click.command()
@click.argument("source")
@click.argument("directory", required=False, type=options.PATH)
def target(source: str, directory: Path | None) -> None:
    """Prepare a target and print its directory.

    SOURCE is a built-in name (smollm2-135m-instruct: fetched and converted on first use), a
    directory in Hugging Face form, or a GGUF file of a Llama or Qwen3 model, which is converted
    into DIRECTORY.
    """
    keeps("the target is whole or was not made; the same command starts over")
    # By its name: of the three sources this one alone needs a place to go to.
    if source.endswith(".gguf"):
        if directory is None:
            raise InputError(
                f"{source}: give the directory to convert into: domino target {source} DIRECTORY"
            )
        own(lock_beside, directory)
        from domino_jax.target.gguf import convert_gguf

        path = convert_gguf(source, directory, reporter=reporter)
    else:
        if directory is not None:
            raise InputError(f"{source}: only a .gguf file is converted into a directory")
        path = resolve_target(source, reporter=reporter)
    echo(path)


@click.command()
@click.argument("prompts", type=options.PATH)
@click.argument("answers", type=options.PATH)
@options.target
@click.option(
    "--turns",
    type=click.Choice(("all", "last")),
    default="all",
    help="Turns of a conversation to answer: all of them, which replaces earlier answers, or the "
    "last, which keeps them as context that is not trained.",
)
@click.option("--batch-size", type=options.BATCH_SIZE, default=32, help="Rows decoded together.")
@options.max_new_tokens
@options.temperature
@options.top_k
@options.top_p
@options.seed
@options.target_dtype
@options.chat_template_kwargs
def regenerate(
    prompts: Path, answers: Path, chat_template_kwargs: Scalars | None, **drawing: Any
) -> None:
    """Generate the target's answers to PROMPTS into ANSWERS, the training data of a drafter.

    PROMPTS is JSONL or JSONL.gz of {"messages": [...]}; an answer at the end is left out. ANSWERS
    holds the token ids that the target was given and generated, which are the training rows, and
    their text. A stopped command resumes when it is started again. docs/data.md has all forms.
    """
    own(lock_beside, answers)
    # Before `keeps`: until then a signal ends the process at once.
    from domino_jax.cli.loading import load_weights, open_named_target
    from domino_jax.data.prompt import stop_token_ids
    from domino_jax.datagen.batch_log import log_of
    from domino_jax.datagen.regenerate import AnswerSettings, read_dialogues
    from domino_jax.datagen.regenerate import regenerate as regenerate_answers
    from domino_jax.decoding.decoder import Weights

    keeps(f"answered batches are kept in {answers}.partial; the same command resumes")
    settings = AnswerSettings(**drawing, chat_template_kwargs=chat_template_kwargs or {})
    length = settings.max_new_tokens
    partial = log_of(answers)
    target = open_named_target(settings.target, settings.dtype, max_new_tokens=length)
    kwargs = dated(target.tokenizer, settings.chat_template_kwargs, partial, prompts)
    settings = replace(settings, chat_template_kwargs=kwargs)
    decoder = target.decoder(
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        stop_ids=stop_token_ids(target.tokenizer, kwargs, end_ids=target.end_ids),
    )
    # Before the weights: a file of prompts that is refused costs seconds.
    dialogues = read_dialogues(
        prompts, decoder, target.tokenizer, settings=settings, reporter=reporter
    )
    result = regenerate_answers(
        dialogues,
        answers,
        source=prompts,
        decoder=decoder,
        weights=Weights(load_weights(target).params),
        tokenizer=target.tokenizer,
        settings=settings,
        reporter=reporter,
    )
    keeps(f"{answers} is complete")
    reporter.say(f"saved {result.total} answers, {result.answered} of them by this start")
    if result.cut:
        reporter.say(
            f"{result.cut} of {result.total} answers ({result.cut / result.total:.0%}) were cut at "
            f"{length} tokens: a drafter sees no end in them; --max-new-tokens sets the limit"
        )
    if result.answered:
        reporter.say(
            f"{result.retokenised} of {result.answered} answers have other token ids when their "
            "text is tokenised again; training uses the generated ids"
        )
    if result.left_out:
        reporter.say(
            f"{result.left_out} later turns are left out: their prompts are too long, or the chat "
            "template refuses them"
        )
    echo(answers)


@click.command()
@click.argument("out", type=options.PATH)
@options.target
@click.option("--count", type=click.IntRange(1, 2**31 - 1), required=True, help="Prompts to write.")
@click.option("--batch-size", type=options.BATCH_SIZE, default=64, help="Rows drawn together.")
@click.option(
    "--max-new-tokens",
    type=options.LENGTH,
    # SmolLM2: nine of ten prompts are shorter, and a batch takes as long as its longest row.
    default=64,
    help="Length of a prompt at most; longer ones are left out.",
)
@click.option(
    "--temperature",
    type=options.FiniteRange(*options.TEMPERATURES),
    default=0.9,
    help="Higher: more various and less sensible.",
)
@options.top_k
@options.top_p
@click.option(
    "--language",
    metavar="CODE",
    help="Leave out what is told to be in another language than this one (ISO 639-1, as en); needs "
    "domino-jax[language].",
)
@options.seed
@options.target_dtype
@options.chat_template_kwargs
def prompts(out: Path, chat_template_kwargs: Scalars | None, **drawing: Any) -> None:
    """Generate prompts with the target into OUT, for `domino regenerate`.

    Given the opening of a user's turn, a chat model writes a request. Those that end, ask for
    something and are not repeated are kept; `domino regenerate OUT ANSWERS` answers them. Stopped
    and started again it resumes where it was. Each batch counts the seed up by one, so the seeds of
    two files lie further apart than a file has batches, or both hold the same prompts.
    """
    own(lock_beside, out)
    # Before `keeps`: until then a signal ends the process at once.
    from domino_jax.cli.loading import load_named_target
    from domino_jax.data.prompt import stop_token_ids
    from domino_jax.datagen.batch_log import log_of
    from domino_jax.datagen.prompts import PromptSettings, user_turn, write_prompts
    from domino_jax.decoding.decoder import Weights

    keeps(f"batches of prompts are kept in {out}.partial; the same command resumes")
    settings = PromptSettings(**drawing, chat_template_kwargs=chat_template_kwargs or {})
    length = settings.max_new_tokens
    partial = log_of(out)
    loaded = load_named_target(settings.target, settings.dtype, max_new_tokens=length)
    kwargs = dated(loaded.tokenizer, settings.chat_template_kwargs, partial)
    settings = replace(settings, chat_template_kwargs=kwargs)
    ends = stop_token_ids(loaded.tokenizer, kwargs, end_ids=loaded.end_ids)
    stops = {user_turn(loaded.tokenizer, kwargs).end, *ends}
    decoder = loaded.decoder(
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        stop_ids=tuple(sorted(stops)),
    )
    drawn = write_prompts(
        out,
        decoder=decoder,
        weights=Weights(loaded.params),
        tokenizer=loaded.tokenizer,
        settings=settings,
        reporter=reporter,
    )
    keeps(f"{out} is complete")
    words = f"{drawn.drawn} drawn by this start, left out: {drawn.left_out}"
    reporter.say(f"saved {settings.count} prompts; {words}")
    echo(out)
