"""Scripts around `domino` rely on its streams and exit codes, so these are decided in one place.

Results go to stdout, progress and logs to stderr. What the user can mend is one line and an exit
code, never a traceback. The verbs themselves are thin over the package.
"""

import logging
import sys
import threading
from typing import Any

import click
import jax

from domino_jax import __version__
from domino_jax.base.errors import InputError, one_line, shown, text_problem
from domino_jax.base.files import NO_ROOM
from domino_jax.cli.checkpoint import export, import_
from domino_jax.cli.config import config_verb
from domino_jax.cli.data import prompts, regenerate, target
from domino_jax.cli.decode import generate
from domino_jax.cli.evaluate import evaluate
from domino_jax.cli.interrupts import EXIT_CODE, kept
from domino_jax.cli.plan import plan_verb
from domino_jax.cli.report import report
from domino_jax.cli.train import capture, train
from domino_jax.training.loop import Interrupted
from domino_jax.training.skips import Diverged

DIVERGED = 3
NOBODY_READS = 141  # what shells report of a program that SIGPIPE ended


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
        except BrokenPipeError:
            raise  # nobody reads what is printed, see `run`
        except OSError as error:
            raise click.UsageError(_system_words(error)) from error
        # These two are no errors of the user's: they have codes of their own, and no "error:".
        except Interrupted as error:
            print(error, file=sys.stderr)
            ctx.exit(EXIT_CODE)
        except Diverged as error:
            print(error, file=sys.stderr)
            ctx.exit(DIVERGED)


def _system_words(error: OSError) -> str:
    """What the system refused, and on a full disk what the verb keeps of its work."""
    words = f"{error.filename or 'a file'}: {error.strerror or error}"
    # Only where it helps: with room again the same command resumes.
    going_on = kept() if error.errno in NO_ROOM else None
    return f"{words}; {going_on}" if going_on else words


@click.group(
    cls=_Group,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="domino", message="%(prog)s %(version)s")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Train speculative-decoding drafters (Domino, DFlash) in JAX, check their gain, export them.

    \b
    A drafter from nothing to a served checkpoint:
      domino prompts OUT                  the target writes prompts, where you have none
      domino regenerate PROMPTS ANSWERS   the target answers prompts: the training data
      domino config --list                every key of CONFIG, and what it means
      domino plan CONFIG --on v5p:2x2x2   what a step would take there, before you pay
      domino train CONFIG                 trains the drafter; run it again to resume after a stop
      domino evaluate RUN PROMPTS...      acceptance length, speed, and a token-by-token check
      domino report RUN [RUN]...          does it pay? one page with pictures
      domino generate RUN "a question"    streams one answer
      domino export RUN DIR               writes the checkpoint that serving engines read

    \b
    Exit codes:
      0    done
      1    plan: it does not fit
      2    bad input, or a full disk: one line says where, what and what to do
      3    train: the numbers diverged; the checkpoints are finite
      130  interrupted by Ctrl-C or SIGTERM: one line says what is kept
      141  nobody reads what is printed any more
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


_VERBS = (
    target,
    prompts,
    regenerate,
    config_verb,
    capture,
    plan_verb,
    train,
    generate,
    evaluate,
    report,
    export,
)
for _verb in (*_VERBS, import_):
    cli.add_command(_verb)


def run() -> None:
    """Runs the verb of the command line and exits; a message of bad input is one line, code 2."""
    # Accelerators multiply float32 in fewer bits by default; bfloat16 operands are not affected.
    jax.config.update("jax_default_matmul_precision", "highest")
    _hear_failed_saves_once()
    # Not in click's own mode, which prints the usage before a message and ends the process itself.
    try:
        code = cli(standalone_mode=False, prog_name="domino") or 0
    except SystemExit:
        # What click and rich do at a closed pipe: `domino generate RUN "a question" | head -1`.
        sys.exit(NOBODY_READS)
    except click.ClickException as error:  # code 2 where it is about usage
        print(f"error: {one_line(error.format_message())}", file=sys.stderr)
        sys.exit(error.exit_code)
    sys.exit(code)


def _hear_failed_saves_once() -> None:
    """A save that fails raises in the main thread; its libraries need not tell it again.

    They log it too, and print it from their threads.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    told = sys.excepthook

    def hook(*error: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            told(*error)

    sys.excepthook = hook
    sys.unraisablehook = lambda _: None
