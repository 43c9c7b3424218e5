"""What a drafter gains shows when it drafts for its target, not in training's forced figures.

The verb `generate` shows it in one answer, `evaluate` measures it and keeps it with the run.
"""

import sys
from pathlib import Path
from typing import Any

import click
import jax
import numpy as np
from rich.console import Console

from domino_jax.cli.interrupts import keeps, safe_point
from domino_jax.cli.shared import (
    load_run,
    new_tokens_option,
    proposals_option,
    reporter,
    run_dtype_option,
    seed_option,
    step_option,
    temperature_option,
    template_option,
    top_k_option,
    top_p_option,
)
from domino_jax.data.conversations import encode_prompt, read_messages, stop_token_ids
from domino_jax.decoding.counts import acceptance
from domino_jax.decoding.evaluate import evaluate as evaluate_set
from domino_jax.decoding.evaluation import EVALUATION, Evaluator, write_evaluation
from domino_jax.decoding.generate import Answer, TextStream, check_length, stream_answer
from domino_jax.decoding.speculate import Decoder, Weights, make_decoder
from domino_jax.draft.backbone import DraftModel
from domino_jax.files import LINE_BYTES
from domino_jax.marks import MARKS, has_colours, marked
from domino_jax.report import evaluation_table, training_summary
from domino_jax.strict import InputError, Scalars
from domino_jax.target.model import Target


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("prompt", required=False)
@click.option("--plain", is_flag=True, help="Decode without the drafter, to compare.")
@click.option("--no-head", is_flag=True, help="Switch the Domino head off.")
@click.option(
    "--color",
    is_flag=True,
    help="Mark what was drafted and kept: green on a terminal, in brackets elsewhere.",
)
@proposals_option
@new_tokens_option
@temperature_option
@top_k_option
@top_p_option
@seed_option
@run_dtype_option
@template_option
@step_option
def generate(
    run: Path,
    prompt: str | None,
    plain: bool,
    no_head: bool,
    color: bool,
    proposals: str,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    dtype: str | None,
    chat_template_kwargs: Scalars | None,
    step: int | None,
) -> None:
    """Answer PROMPT (or standard input) with the target and the drafter of RUN, streamed.

    Ends with tau, the share of drafted tokens that were kept, and tokens/s without compilation.
    """
    if plain and color:
        raise InputError("--color marks what was drafted; --plain drafts nothing")
    if not (run / "checkpoints").is_dir():  # before anybody types a prompt for it
        raise InputError(f"{run}: not a run directory (no checkpoints/ in it)")
    text = prompt if prompt is not None else _standard_input()
    if not text.strip():
        raise InputError("the prompt is empty")
    # Not before: until then a signal ends the verb at once, also while it waits for a prompt.
    keeps("nothing is kept of the answer; the same command starts over")
    loaded, drafter = load_run(
        run, dtype, chat_template_kwargs, step=step, max_new_tokens=max_new_tokens
    )
    kwargs = drafter.record.chat_template.kwargs
    decoder = make_decoder(
        Target(loaded.config),
        None if plain else DraftModel(drafter.config),
        proposals=proposals,
        use_head=not no_head,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop_ids=stop_token_ids(loaded.tokenizer, kwargs),
    )
    ids = encode_prompt([{"role": "user", "content": text}], loaded.tokenizer, kwargs)
    check_length(decoder, ids, place="the prompt")
    text_stream = _text_stream(loaded.tokenizer, color=color)
    reporter.say("compiling")
    answer = stream_answer(
        decoder,
        Weights(loaded.params, drafter.params),
        ids,
        max_new_tokens=max_new_tokens,
        show=text_stream.show,
        seed=seed,
    )
    text_stream.end(answer.tokens, answer.drafted)
    click.echo()
    reporter.say(_figures(answer, decoder.proposals))


def _text_stream(tokenizer: Any, *, color: bool) -> TextStream:
    """Writes an answer to stdout; with `color` what was drafted is marked, and a legend told."""
    coloured = color and has_colours(Console())
    if color:
        reporter.say(
            f"drafted and kept: {'green' if coloured else MARKS}; the rest: the target's own"
        )

    def write(piece: str, drafted: bool) -> None:
        safe_point()  # a piece of text is a place to end, as a line of `say` is
        if piece and drafted:
            piece = marked(piece, coloured=coloured)
        # Colours that FORCE_COLOR asks for reach a pipe too, where click takes them out.
        click.echo(piece, nl=False, color=coloured or None)

    return TextStream(tokenizer, write, apart=color)


def _figures(answer: Answer, proposals: int) -> str:
    """What an answer took, in a line."""
    figures = [f"{len(answer.tokens)} tokens", f"tau {answer.tau:.2f}"]
    if proposals:  # plain decoding drafts nothing
        kept = np.mean(acceptance([answer], proposals).marginal)
        figures.append(f"{kept:.0%} of drafted tokens kept")
    return ", ".join([*figures, f"{answer.tokens_per_second:.1f} tokens/s"])


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument(
    "prompt_files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="PROMPTS..."
)
@click.option(
    "--limit", type=click.IntRange(1), default=None, help="Only the first prompts of each file."
)
@proposals_option
@new_tokens_option
@temperature_option
@seed_option
@run_dtype_option
@template_option
@step_option
def evaluate(
    run: Path,
    prompt_files: tuple[Path, ...],
    limit: int | None,
    proposals: str,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    dtype: str | None,
    chat_template_kwargs: Scalars | None,
    step: int | None,
) -> None:
    """Measure the drafter of RUN on each JSONL file of PROMPTS and write RUN/evaluation.json.

    Every prompt is decoded plainly, speculatively and with the Domino head off, in one run: tokens
    per verification (tau), tokens per second, and whether the outputs are the same token by token.
    """
    place = run / EVALUATION
    keeps(f"{place} was not written; the same command starts over")
    loaded, drafter = load_run(
        run, dtype, chat_template_kwargs, step=step, max_new_tokens=max_new_tokens
    )
    template = drafter.record.chat_template
    decoder = make_decoder(
        Target(loaded.config),
        DraftModel(drafter.config),
        proposals=proposals,
        temperature=temperature,
        stop_ids=stop_token_ids(loaded.tokenizer, template.kwargs),
    )
    weights = Weights(loaded.params, drafter.params)
    sets = {}
    for path in prompt_files:
        prompts = _prompts(path, limit, decoder, loaded.tokenizer, template.kwargs)
        reporter.say(f"{path.stem}: compiling")
        figures = evaluate_set(
            decoder, weights, prompts, max_new_tokens=max_new_tokens, seed=seed, reporter=reporter
        )
        sets[path.stem] = {"file": str(path)} | figures.as_json()
    reporter.say(f"saving {place}")
    evaluator = Evaluator(
        target=drafter.record.target,
        chat_template=template,
        step=drafter.step,
        block_size=drafter.config.block_size,
        proposals=decoder.proposals,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        dtype=drafter.config.dtype,
        # For the speeds, which mean nothing without it.
        device=f"{jax.devices()[0].platform}:{jax.devices()[0].device_kind}",
    )
    # Before the table, which a closed pipe may refuse.
    record = write_evaluation(place, evaluator, training=training_summary(run), sets=sets)
    keeps(f"{place} is written")
    Console().print(evaluation_table(record))
    for name, figures_of_set in sets.items():
        for difference in figures_of_set.get("differences", ()):
            click.echo(f"{name}: first difference {difference}")
    click.echo(place)


def _prompts(
    path: Path, limit: int | None, decoder: Decoder, tokenizer: Any, kwargs: Scalars
) -> list[np.ndarray]:
    """The first prompts of a file as token ids; tells which lines were left out."""
    usable, bad_lines = read_messages(path)
    # Told and passed over: a set is measured on what can be used of it.
    for bad in bad_lines:
        reporter.say(f"{path}:{bad.line}: {bad.reason}")
    prompts = []
    for line, messages in usable[:limit]:
        prompts.append(encode_prompt(messages, tokenizer, kwargs))
        check_length(decoder, prompts[-1], place=f"{path}:{line}")
    return prompts


def _standard_input() -> str:
    # Bytes, since how Python would decode them depends on the locale; and one more than is taken,
    # since a pipe does not tell its size.
    raw = sys.stdin.buffer.read(LINE_BYTES + 1)
    if len(raw) > LINE_BYTES:
        raise InputError(f"standard input: more than {LINE_BYTES} bytes")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"standard input: not UTF-8 text: {error.reason} at byte {error.start}"
        ) from error
