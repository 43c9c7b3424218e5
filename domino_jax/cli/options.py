"""Options that several verbs share: an option means the same in each verb that takes it.

No import of jax or numpy here: `VERB --help` and an argument error do without them.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from domino_jax.base.errors import InputError, Scalars, scalars
from domino_jax.base.parse import parse_yaml
from domino_jax.config.run import SEED_LIMIT
from domino_jax.target.resolve import BUILT_IN

if TYPE_CHECKING:
    from domino_jax.evaluation.servers import Server

PATH = click.Path(path_type=Path)
DTYPE = click.Choice(["float32", "bfloat16"])
BATCH_SIZE = click.IntRange(1, 2**16)
LENGTH = click.IntRange(1, 2**20)  # of an answer or a prompt, in tokens
# A softmax over logits divided by less would round to the largest one, or overflow.
TEMPERATURES = (1e-3, 1e3)


class FiniteRange(click.FloatRange):
    """A range of numbers, without the "nan" and "inf" that compare as inside one."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The number, or click's error."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{number} is not a finite number.", param, ctx)
        return number


class _TargetName(click.ParamType[str]):
    """Text. No target is assumed: where it is missing, the message says what could stand there."""

    name = "text"

    def get_missing_message(self, param: click.Parameter, ctx: click.Context | None) -> str:
        return f"Expected a directory or a built-in name ({', '.join(BUILT_IN)})."


def _temperature(_: click.Context, option: click.Parameter, value: float) -> float:
    low, high = TEMPERATURES
    # 0 is no temperature but the word for none, so it lies outside of the range.
    if value != 0 and not low <= value <= high:
        raise InputError(f"{option.opts[0]}: expected 0, or {low:g} to {high:g}, found {value}")
    return value


def _filter(context: click.Context, option: click.Parameter, value: Any) -> Any:
    if value is not None and context.params.get("temperature") == 0:
        raise InputError(
            f"{option.opts[0]}: nothing is drawn at temperature 0; give a --temperature above 0"
        )
    return value


def _server(context: click.Context, option: click.Parameter, url: str | None) -> Server | None:
    """The server of an option, found before anything is loaded for it."""
    if url is None:
        return None
    if context.params.get("temperature") != 0:
        raise InputError(f"{option.opts[0]}: greedy answers are compared; leave --temperature out")
    from domino_jax.evaluation.servers import find_server

    return find_server(url)


def _mapping(_: click.Context, option: click.Parameter, text: str | None) -> Scalars | None:
    """The value of an option as a mapping; JSON is YAML."""
    source = option.opts[0]
    return None if text is None else scalars(parse_yaml(text, source=source), source=source)


max_new_tokens = click.option(
    "--max-new-tokens",
    type=LENGTH,
    default=128,
    help="Length of each answer at most; the target's own length is another limit.",
)
target_dtype = click.option(
    "--dtype", type=DTYPE, default="float32", help="Compute type of the target."
)
# Without a default: a draft was trained on states of its run's type, and sees others in another.
run_dtype = click.option(
    "--dtype",
    type=DTYPE,
    help="Compute type of target and draft; the run's own where it is not given.",
)
temperature = click.option(
    "--temperature",
    type=FiniteRange(0),
    callback=_temperature,
    is_eager=True,  # before the filters, which ask for it
    default=0.0,
    help="0 takes the most likely token.",
)
top_k = click.option(
    "--top-k",
    type=click.IntRange(1),
    callback=_filter,
    metavar="N",
    help="Draw from the N likeliest tokens alone.",
)
top_p = click.option(
    "--top-p",
    type=FiniteRange(0, 1, min_open=True),
    callback=_filter,
    metavar="P",
    help="Draw from the fewest likeliest tokens whose probability is at least P together, after "
    "--top-k.",
)
seed = click.option(
    "--seed", type=click.IntRange(0, SEED_LIMIT - 1), default=0, help="Of the sampler."
)
endpoint = click.option(
    "--endpoint",
    "server",
    callback=_server,
    metavar="URL",
    help="A server of the exported draft, SGLang, vLLM or OpenAI-style (http://HOST:PORT): ask it "
    "for the same answers and compare tau and text. It should serve nobody else meanwhile.",
)
chat_template_kwargs = click.option(
    "--chat-template-kwargs",
    callback=_mapping,
    metavar="MAPPING",
    help="Arguments of the target's chat template, as YAML or JSON: "
    "'{\"enable_thinking\": false}'. Default: those of the run or draft, where there is one; "
    "others are an error there.",
)
proposals = click.option(
    "--proposals",
    type=click.Choice(["block", "serving"]),
    default="block",
    help="Tokens per cycle: all that a block predicts, or K - 1 as serving engines do.",
)
step = click.option(
    "--step",
    type=click.IntRange(0),
    help="Take the checkpoint of this step (train.keep_best keeps one) instead of the newest.",
)
target = click.option(
    "--target",
    type=_TargetName(),
    required=True,
    help=f"Directory of the target, or a built-in name ({', '.join(BUILT_IN)}).",
)
overrides = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
