"""The verbs of `domino`, thin over the package. Results go to stdout, progress and logs to stderr."""

import logging
import sys
import threading
from typing import Any

import click
import jax

from domino_jax import __version__
from domino_jax.cli.checkpoint import export, import_
from domino_jax.cli.data import regenerate, target
from domino_jax.cli.decode import evaluate, generate
from domino_jax.cli.interrupts import EXIT_CODE
from domino_jax.cli.plan import plan_verb
from domino_jax.cli.train import capture, train
from domino_jax.strict import InputError, one_line, shown, text_problem
from domino_jax.training.loop import Interrupted
from domino_jax.training.skips import Diverged


class _Group(click.Group):
    """Turns what the user can mend into one line and exit code 2."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Refuses words that are not UTF-8: no settings file and no record could hold them."""
        for word in args:
            problem = text_problem(word)
            if problem:
                raise click.UsageError(f"{shown(word)} {problem}")
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except InputError as error:
            raise click.UsageError(str(error)) from error
        except OSError as error:
            raise click.UsageError(f"{error.filename or 'a file'}: {error.strerror or error}") from error
        except Interrupted as error:
            print(error, file=sys.stderr)
            ctx.exit(EXIT_CODE)
        except Diverged as error:
            print(error, file=sys.stderr)
            ctx.exit(3)


@click.group(
    cls=_Group,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="domino", message="%(prog)s %(version)s")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Train speculative-decoding drafters (Domino, DFlash) in JAX, check what they gain, and export them.

    \b
    A drafter from nothing to a served checkpoint:
      domino regenerate PROMPTS ANSWERS   the target answers your prompts: the training data
      domino plan CONFIG --on v5p:2x2x2   what a step would take there, before you pay
      domino train CONFIG                 trains the drafter; run it again to go on after a stop
      domino evaluate RUN PROMPTS...      acceptance length, speed, and a token-by-token check
      domino generate RUN "a question"    streams one answer
      domino export RUN DIR               writes the checkpoint that serving engines read
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


for _verb in (target, regenerate, capture, plan_verb, train, generate, evaluate, export, import_):
    cli.add_command(_verb)


def run() -> None:
    """Runs the verb of the command line and exits; a message of bad input is one line, code 2."""
    # Accelerators multiply float32 in fewer bits by default; bfloat16 operands are not affected.
    jax.config.update("jax_default_matmul_precision", "highest")
    _hear_failed_saves_once()
    try:
        sys.exit(cli(standalone_mode=False, prog_name="domino") or 0)
    except click.ClickException as error:  # code 2 where it is about usage
        print(f"error: {one_line(error.format_message())}", file=sys.stderr)
        sys.exit(error.exit_code)


def _hear_failed_saves_once() -> None:
    """A save that fails raises in the main thread; its libraries log it too, and print it from their threads."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    told = sys.excepthook

    def hook(*error: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            told(*error)

    sys.excepthook, sys.unraisablehook = hook, lambda _: None
