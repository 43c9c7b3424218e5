"""The verb `config`: name, default, type and meaning of each key of a configuration."""

import click

from domino_jax.base.errors import InputError, did_you_mean, shown
from domino_jax.cli.interrupts import keeps
from domino_jax.config.run import RENAMED, RunConfig
from domino_jax.config.schema import Described, described


@click.command("config")
@click.argument("key", required=False)
@click.option("--list", "every", is_flag=True, help="Print every key, one a line.")
def config_verb(key: str | None, every: bool) -> None:
    """Explain KEY of a run's configuration, or all keys of a section.

    \b
    domino config --list
    domino config loss.decay_ratio
    domino config optimizer

    A configuration is a YAML file of sections (draft, data, loss, optimizer, train, mesh) that
    holds only what differs from the defaults; verbs that read one take KEY=VALUE words too.
    """
    keeps("nothing was written", at_once=True)
    keys = list(described(RunConfig))
    if key is None:
        if not every:
            raise InputError("give a KEY, for example train.steps, or --list for all of them")
        _print(keys)
        return
    found = [one for one in keys if one.name == key or one.name.startswith(f"{key}.")]
    if key in RENAMED:
        raise InputError(f"{key} is now {RENAMED[key]}")
    if not found:
        names = [one.name for one in keys]
        # A section is known by the dot behind it, and a key often by its last part.
        last = [name for name in names if name.rpartition(".")[2] == key]
        near = f"did you mean {last[0]!r}?" if last else did_you_mean(key, names)
        remedy = near or "`domino config --list` prints all"
        raise InputError(f"no key {shown(key)} in a configuration; {remedy}")
    if len(found) > 1:
        _print(found)
        return
    (one,) = found
    click.echo(f"{one.name}: {one.key.meaning}")
    unit = f" ({one.key.unit})" if one.key.unit else ""
    parts = (f"{one.kind}{unit}", one.key.bounds)
    click.echo(f"  takes    {', '.join(part for part in parts if part)}")
    click.echo(f"  default  {one.default}")


def _print(keys: list[Described]) -> None:
    """A line for each key: its name, its default, its meaning."""
    names = max(len(one.name) for one in keys)
    defaults = max(len(one.default) for one in keys)
    for one in keys:
        click.echo(f"{one.name:{names}}  {one.default:{defaults}}  {one.key.meaning}")
