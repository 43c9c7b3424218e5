"""What a drafter gains, in one answer, as it streams: the verb `generate`."""

import sys
from collections.abc import Callable
from pathlib import Path

import click
from rich.console import Console

from domino_jax.base.errors import InputError, Scalars
from domino_jax.base.escapes import printable_text
from domino_jax.base.files import LINE_BYTES
from domino_jax.base.marks import MARKS, has_colours, marked
from domino_jax.cli import options
from domino_jax.cli.interrupts import keeps, safe_point
from domino_jax.cli.shared import reporter


@click.command()
@click.argument("run", type=options.PATH)
@click.argument("prompt", required=False)
@click.option("--plain", is_flag=True, help="Decode without the drafter, to compare.")
@click.option("--no-head", is_flag=True, help="Switch the Domino head off.")
@click.option(
    "--color",
    is_flag=True,
    help="Mark what was drafted and kept: green on a terminal, in brackets elsewhere.",
)
@options.proposals
@options.max_new_tokens
@options.temperature
@options.top_k
@options.top_p
@options.seed
@options.run_dtype
@options.chat_template_kwargs
@options.step
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
    # Until `keeps` a signal ends the process at once, also while it waits for a prompt.
    from domino_jax.cli.loading import load_run
    from domino_jax.data.prompt import encode_prompt, stop_token_ids
    from domino_jax.decoding.decoder import Weights
    from domino_jax.decoding.generate import TextStream, check_prompt, stream_answer
    from domino_jax.evaluation.counts import acceptance

    keeps("nothing is kept of the answer; the same command starts over")
    loaded, drafter = load_run(
        run, dtype, chat_template_kwargs, step=step, max_new_tokens=max_new_tokens
    )
    kwargs = drafter.record.chat_template.kwargs
    decoder = loaded.decoder(
        None if plain else drafter.record.config,
        proposals=proposals,
        use_head=not no_head,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop_ids=stop_token_ids(loaded.tokenizer, kwargs, end_ids=loaded.end_ids),
    )
    ids = encode_prompt([{"role": "user", "content": text}], loaded.tokenizer, kwargs)
    check_prompt(decoder, ids, loaded.tokenizer, source="the prompt")
    text_stream = TextStream(loaded.tokenizer, _writer(color=color), apart=color)
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
    figures = [f"{len(answer.tokens)} tokens", f"tau {answer.tau:.2f}"]
    if decoder.proposals:  # plain decoding drafts nothing
        kept = acceptance([answer], decoder.proposals).marginal
        figures.append(f"{sum(kept) / len(kept):.0%} of drafted tokens kept")
    reporter.say(", ".join([*figures, f"{answer.tokens_per_second:.1f} tokens/s"]))


def _writer(*, color: bool) -> Callable[[str, bool], None]:
    """Writes pieces of an answer to stdout; with `color` drafted ones are marked."""
    coloured = color and has_colours(Console())
    if color:
        reporter.say(
            f"drafted and kept: {'green' if coloured else MARKS}; the rest: the target's own"
        )

    def write(piece: str, drafted: bool) -> None:
        safe_point()  # a piece of text is a place to end, as a line of `say` is
        reporter.pause_heartbeat()  # its lines would be in the middle of the answer
        piece = printable_text(piece)
        if piece and drafted:
            piece = marked(piece, coloured=coloured)
        # Colours that FORCE_COLOR asks for reach a pipe too, where click takes them out.
        click.echo(piece, nl=False, color=coloured or None)

    return write


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
