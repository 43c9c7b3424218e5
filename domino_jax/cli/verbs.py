"""The `domino` command: its verbs, streams and exit codes.

Results go to stdout, progress and logs to stderr. A user error is one line and an exit code, never
a traceback. A verb's module is imported when the verb is named, and imports jax only once the
arguments are checked; so `--version`, `--help`, `config` and an argument error answer at once.
"""

import importlib
import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import click

from domino_jax import __version__
from domino_jax.base.errors import (
    Diverged,
    InputError,
    Interrupted,
    Untrained,
    one_line,
    shown,
    text_problem,
)
from domino_jax.base.escapes import printable, printable_text
from domino_jax.base.files import NO_ROOM
from domino_jax.cli.interrupts import EXIT_CODE, kept

NO_RESULT = 3
NOBODY_READS = 141  # what shells report of a program that SIGPIPE ended


# Verb -> module of `domino_jax.cli` and name of the command in it.
_COMMANDS = {
    "capture": ("train", "capture"),
    "config": ("config", "config_verb"),
    "evaluate": ("evaluate", "evaluate"),
    "export": ("checkpoint", "export"),
    "generate": ("decode", "generate"),
    "import": ("checkpoint", "import_"),
    "plan": ("plan", "plan_verb"),
    "prompts": ("data", "prompts"),
    "regenerate": ("data", "regenerate"),
    "report": ("report", "report"),
    "target": ("data", "target"),
    "train": ("train", "train"),
}


_formatted = warnings.formatwarning


def _formatted_warning(*args: Any, **kwargs: Any) -> str:
    """A warning as Python prints it, control characters escaped."""
    return printable_text(_formatted(*args, **kwargs))


class _Record(logging.LogRecord):
    """A record of `logging`, control characters escaped."""

    def getMessage(self) -> str:
        """The message with its arguments."""
        return printable_text(super().getMessage())


class _Verbs(Mapping[str, click.Command]):
    """Verbs by name; reading a verb imports its module."""

    def __getitem__(self, verb: str) -> click.Command:
        module, command = _COMMANDS[verb]
        return getattr(importlib.import_module(f"domino_jax.cli.{module}"), command)

    def __iter__(self) -> Iterator[str]:
        return iter(_COMMANDS)

    def __len__(self) -> int:
        return len(_COMMANDS)


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
            words = f"{error.filename or 'a file'}: {error.strerror or error}"
            # With room again the same command resumes.
            if error.errno in NO_ROOM and kept():
                words = f"{words}; {kept()}"
            raise click.UsageError(words) from error
        except RuntimeError as error:
            # JAX's, without a type of its own: JAX_PLATFORMS or a driver.
            if str(error).startswith("Unable to initialize backend"):
                raise click.UsageError(str(error)) from error
            raise
        # These are no errors of the user's: they have codes of their own, and no "error:".
        except Interrupted as error:
            print(printable(str(error)), file=sys.stderr)
            ctx.exit(EXIT_CODE)
        except (Diverged, Untrained) as error:
            print(printable(str(error)), file=sys.stderr)
            ctx.exit(NO_RESULT)


@click.group(
    cls=_Group,
    commands=_Verbs(),
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
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
      3    train: the numbers diverged, or no step updated the draft; the checkpoints are finite
      130  interrupted by Ctrl-C or SIGTERM: one line says what is kept
      141  nobody reads what is printed any more
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
    elif ctx.invoked_subcommand != "config":  # which answers at once, without rich
        from domino_jax.base.progress import heartbeat
        from domino_jax.cli.shared import reporter

        ctx.with_resource(heartbeat(reporter))


def run() -> None:
    """Runs the verb of the command line and exits; a message of bad input is one line, code 2."""
    _multiply_in_full_float32()
    _hear_failed_saves_once()
    _escape_what_libraries_quote()
    # Not in click's own mode, which prints the usage before a message and ends the process itself.
    try:
        code = cli(standalone_mode=False, prog_name="domino") or 0
    except SystemExit:
        # What click and rich do at a closed pipe: `domino generate RUN "a question" | head -1`.
        sys.exit(NOBODY_READS)
    except click.ClickException as error:  # code 2 where it is about usage
        with suppress(OSError):  # a full disk: the exit code is left
            print(f"error: {one_line(error.format_message())}", file=sys.stderr)
        sys.exit(error.exit_code)
    sys.exit(code)


def _multiply_in_full_float32() -> None:
    """Sets the highest matmul precision, for a jax that is imported later or already is.

    Accelerators multiply float32 in fewer bits by default; bfloat16 operands are not affected.
    """
    os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
    # jax reads the variable when it is imported; a program that calls the command may have it.
    jax = sys.modules.get("jax")
    if jax is not None:
        jax.config.update("jax_default_matmul_precision", "highest")


def _escape_what_libraries_quote() -> None:
    """Escapes control characters in logs and warnings of libraries, which may quote data."""
    logging.setLogRecordFactory(_Record)
    warnings.formatwarning = _formatted_warning


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
