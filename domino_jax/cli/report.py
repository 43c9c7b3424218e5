"""The verb `report`: what a run or several have shown, on a page for a person."""

from pathlib import Path

import click

from domino_jax.base.errors import InputError
from domino_jax.base.lock import lock_beside
from domino_jax.cli import options
from domino_jax.cli.interrupts import keeps
from domino_jax.cli.shared import echo, own, reporter
from domino_jax.page.sources import read_runs

PAGE = "report.html"  # its name in a run directory


@click.command()
@click.argument("runs", nargs=-1, required=True, type=options.PATH, metavar="RUN [RUN]...")
@click.option(
    "--out",
    type=options.PATH,
    metavar="FILE.html",
    help=f"Where to write it; {PAGE} of the first RUN where it is not given.",
)
def report(runs: tuple[Path, ...], out: Path | None) -> None:
    """Write one page on what RUN has shown: does it pay?

    \b
    domino report runs/demo
    domino report runs/domino runs/dflash --out compared.html

    Tau by set against the break-even and the n-gram floor, acceptance by position, the time of a
    cycle, losses, speed, warnings, decoded answers. Several runs stand side by side; where they
    differ in data, tau is drawn over it. The page needs no network and no script; each picture is
    written as PNG too, into the folder of the same name beside it. What a run lacks is left out,
    and said: `domino evaluate` comes first.
    """
    path = out or runs[0] / PAGE
    # The pictures' folder has the same name without its ending.
    if path.suffix != ".html":
        raise InputError(f"--out {path}: expected a name that ends in .html")
    # Before `keeps`: until then a signal ends the process at once.
    from domino_jax.page.document import write_page

    keeps(f"{path} was not written; the same command starts over")
    found = read_runs(runs)
    if not path.parent.is_dir():
        raise InputError(f"--out {path}: no directory {path.parent}; make it first")
    own(lock_beside, path)  # its folder of pictures too
    for run in found:
        for line in run.notices:
            reporter.say(line)
    reporter.say(f"drawing {path}")
    write_page(found, path)
    keeps(f"{path} is written")
    echo(path)
