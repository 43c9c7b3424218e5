"""A drafter learns to predict one target, so it is trained on that target's own answers.

The verb `target` makes a directory of the target, `prompts` lets it write requests, `regenerate`
answer them.
"""

from pathlib import Path

import click

from domino_jax.base.errors import InputError, Scalars
from domino_jax.cli.interrupts import keeps
from domino_jax.cli.shared import (
    TEMPERATURES,
    FiniteRange,
    dtype_option,
    new_tokens_option,
    reporter,
    seed_option,
    target_option,
    temperature_option,
    template_option,
    top_k_option,
    top_p_option,
)
from domino_jax.target.resolve import resolve_target


@click.command()
@click.argument("source")
@click.argument("directory", required=False, type=click.Path(path_type=Path))
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
        from domino_jax.target.gguf import convert_gguf

        path = convert_gguf(source, directory, reporter=reporter)
    else:
        if directory is not None:
            raise InputError(f"{source}: only a .gguf file is converted into a directory")
        path = resolve_target(source, reporter=reporter)
    click.echo(path)


@click.command()
@click.argument("prompts", type=click.Path(path_type=Path))
@click.argument("answers", type=click.Path(path_type=Path))
@target_option
@click.option(
    "--batch-size",
    type=click.IntRange(1, 2**16),
    default=32,
    show_default=True,
    help="Rows decoded together.",
)
@new_tokens_option
@temperature_option
@top_k_option
@top_p_option
@seed_option
@dtype_option
@template_option
def regenerate(
    prompts: Path,
    answers: Path,
    target_name: str,
    batch_size: int,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    dtype: str,
    chat_template_kwargs: Scalars | None,
) -> None:
    """Let the target answer PROMPTS into ANSWERS, the training data of a drafter.

    PROMPTS is JSONL or JSONL.gz of {"messages": [...]}. A drafter must learn the words of its own
    target; answers written by anyone else cost acceptance. Stopped and started again it resumes
    where it was.
    """
    # Before `keeps`: until then a signal ends the process at once.
    from domino_jax.cli.loading import load_named_target
    from domino_jax.data.conversations import stop_token_ids
    from domino_jax.datagen.regenerate import AnswerSettings
    from domino_jax.datagen.regenerate import regenerate as regenerate_answers
    from domino_jax.decoding.decoder import Weights, make_decoder
    from domino_jax.target.decoder import Target

    keeps(f"answered batches are kept in {answers}.partial; the same command resumes")
    loaded = load_named_target(target_name, dtype, max_new_tokens=max_new_tokens)
    kwargs = chat_template_kwargs or {}
    stops = stop_token_ids(loaded.tokenizer, kwargs)
    decoder = make_decoder(
        Target(loaded.config), temperature=temperature, top_k=top_k, top_p=top_p, stop_ids=stops
    )
    result = regenerate_answers(
        prompts,
        answers,
        decoder=decoder,
        weights=Weights(loaded.params),
        tokenizer=loaded.tokenizer,
        settings=AnswerSettings(
            target=target_name,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            dtype=dtype,
            batch_size=batch_size,
            chat_template_kwargs=kwargs,
        ),
        reporter=reporter,
    )
    keeps(f"{answers} is complete")
    reporter.say(f"saved {result.total} answers, {result.answered} of them by this start")
    if result.cut:
        reporter.say(
            f"{result.cut} of {result.total} answers ({result.cut / result.total:.0%}) were cut at "
            f"{max_new_tokens} tokens: a drafter sees no end in them; "
            "--max-new-tokens sets the limit"
        )
    click.echo(answers)


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@target_option
@click.option("--count", type=click.IntRange(1, 2**31 - 1), required=True, help="Prompts to write.")
@click.option(
    "--batch-size",
    type=click.IntRange(1, 2**16),
    default=64,
    show_default=True,
    help="Rows drawn together.",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1, 2**20),
    # SmolLM2: nine of ten prompts are shorter, and a batch takes as long as its longest row.
    default=64,
    show_default=True,
    help="Length of a prompt at most; longer ones are left out.",
)
@click.option(
    "--temperature",
    type=FiniteRange(*TEMPERATURES),
    default=0.9,
    show_default=True,
    help="Higher: more various and less sensible.",
)
@top_k_option
@top_p_option
@click.option(
    "--language",
    default=None,
    metavar="CODE",
    help="Leave out what is told to be in another language than this one (ISO 639-1, as en); needs "
    "domino-jax[language].",
)
@seed_option
@dtype_option
@template_option
def prompts(
    out: Path,
    target_name: str,
    count: int,
    batch_size: int,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    language: str | None,
    seed: int,
    dtype: str,
    chat_template_kwargs: Scalars | None,
) -> None:
    """Let the target write prompts into OUT: training data for who has none.

    Given the opening of a user's turn, a chat model writes a request. Those that end, ask for
    something and are not repeated are kept; `domino regenerate OUT ANSWERS` answers them. Stopped
    and started again it resumes where it was. Each batch counts the seed up by one, so the seeds of
    two files lie further apart than a file has batches, or both hold the same prompts.
    """
    # Before `keeps`: until then a signal ends the process at once.
    from domino_jax.cli.loading import load_named_target
    from domino_jax.data.conversations import stop_token_ids
    from domino_jax.datagen.prompts import PromptSettings, user_turn, write_prompts
    from domino_jax.decoding.decoder import Weights, make_decoder
    from domino_jax.target.decoder import Target

    keeps(f"batches of prompts are kept in {out}.partial; the same command resumes")
    loaded = load_named_target(target_name, dtype, max_new_tokens=max_new_tokens)
    kwargs = chat_template_kwargs or {}
    stops = {user_turn(loaded.tokenizer, kwargs).end, *stop_token_ids(loaded.tokenizer, kwargs)}
    decoder = make_decoder(
        Target(loaded.config),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop_ids=tuple(sorted(stops)),
    )
    drawn = write_prompts(
        out,
        decoder=decoder,
        weights=Weights(loaded.params),
        tokenizer=loaded.tokenizer,
        settings=PromptSettings(
            target=target_name,
            count=count,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            dtype=dtype,
            batch_size=batch_size,
            language=language,
            chat_template_kwargs=kwargs,
        ),
        reporter=reporter,
    )
    keeps(f"{out} is complete")
    words = f"{drawn.drawn} drawn by this start, left out: {drawn.left_out}"
    reporter.say(f"saved {count} prompts; {words}")
    click.echo(out)
