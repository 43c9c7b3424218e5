"""The `domino` command: thin verbs over the package. Results go to stdout, progress and logs to stderr."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import click
import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress

from domino_jax.config import DraftConfig, InputError, load_config
from domino_jax.data.conversations import encode_prompt, read_messages, stop_token_ids
from domino_jax.decoding import evaluate as evaluation
from domino_jax.decoding.generate import regenerate as regenerate_answers
from domino_jax.decoding.generate import stream_text
from domino_jax.decoding.speculate import Decoder, Weights, make_decoder
from domino_jax.draft.backbone import DraftModel
from domino_jax.interop.hf import load_hf_draft, save_hf_draft
from domino_jax.report import evaluation_table, training_summary
from domino_jax.target.gguf import convert_gguf, resolve_target
from domino_jax.target.load import load_target, load_tokenizer, read_decoder_config
from domino_jax.target.model import Target
from domino_jax.training.checkpoint import DraftRecord, load_draft, save_draft, template_hash
from domino_jax.training.loop import Interrupted
from domino_jax.training.loop import train as train_run

logs = Console(stderr=True)


class _Group(click.Group):
    """Turns what the user can mend into one line and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except InputError as error:
            raise click.UsageError(str(error)) from error
        except OSError as error:
            raise click.UsageError(f"{error.filename or 'a file'}: {error.strerror or error}") from error
        except Interrupted as error:
            _say(str(error))
            ctx.exit(130)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Train speculative-decoding drafters (Domino, DFlash) in JAX, check what they gain, and export them.

    \b
    A drafter from nothing to a served checkpoint:
      domino regenerate PROMPTS ANSWERS   the target answers your prompts: the training data
      domino train CONFIG                 trains the drafter; run it again to go on after a stop
      domino evaluate RUN PROMPTS...      acceptance length, speed, and a token-by-token check
      domino generate RUN "a question"    streams one answer
      domino export RUN DIR               writes the checkpoint that serving engines read
    """


def main() -> None:
    """Entry point of the `domino` command; a message of bad input is one line, exit code 2."""
    # Accelerators multiply float32 in fewer bits by default; bfloat16 operands are not affected.
    jax.config.update("jax_default_matmul_precision", "highest")
    try:
        sys.exit(cli(standalone_mode=False, prog_name="domino") or 0)
    except click.UsageError as error:
        print(f"error: {error.format_message()}", file=sys.stderr)
        sys.exit(2)
    except click.ClickException as error:
        print(f"error: {error.format_message()}", file=sys.stderr)
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)


_new_tokens = click.option(
    "--max-new-tokens", type=click.IntRange(1), default=128, show_default=True, help="Length of each answer at most."
)
_temperature = click.option(
    "--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0 takes the most likely token."
)
_seed = click.option("--seed", type=int, default=0, show_default=True, help="Of the sampler.")
_dtype = click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Compute type of the target.",
)
_proposals = click.option(
    "--proposals",
    type=click.Choice(["block", "serving"]),
    default="block",
    show_default=True,
    help="Tokens per cycle: all that a block predicts, or K - 1 as serving engines do.",
)


@cli.command()
@click.argument("source")
@click.argument("directory", required=False, type=click.Path(path_type=Path))
def target(source: str, directory: Path | None) -> None:
    """Prepare a target and print its directory.

    SOURCE is a built-in name (smollm2-135m-instruct: fetched and converted on first use), a directory in Hugging Face
    form, or a GGUF file of a Llama or Qwen3 model, which is converted into DIRECTORY.
    """
    if source.endswith(".gguf"):
        if directory is None:
            raise InputError(f"{source}: give the directory to convert into: domino target {source} DIRECTORY")
        path = convert_gguf(source, directory, progress=_say)
    else:
        if directory is not None:
            raise InputError(f"{source}: only a .gguf file is converted into a directory")
        path = resolve_target(source, progress=_say)
    click.echo(path)


@cli.command()
@click.argument("prompts", type=click.Path(path_type=Path))
@click.argument("answers", type=click.Path(path_type=Path))
@click.option(
    "--target", "target_name", default="smollm2-135m-instruct", show_default=True, help="Built-in name or directory."
)
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Rows decoded together.")
@_new_tokens
@_temperature
@_seed
@_dtype
def regenerate(
    prompts: Path,
    answers: Path,
    target_name: str,
    batch_size: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    dtype: str,
) -> None:
    """Let the target answer PROMPTS (JSONL of {"messages": [...]}) into ANSWERS, the training data of a drafter.

    A drafter must learn the words of its own target; answers written by anyone else cost acceptance. Stopped and
    started again it goes on where it was.
    """
    loaded = _load_target(target_name, dtype)
    decoder = make_decoder(Target(loaded.config), temperature=temperature, stop_ids=stop_token_ids(loaded.tokenizer))
    settings = {"target": target_name, "max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    with _progress() as progress:
        task = progress.add_task("answering", total=None)

        def show(done: int, total: int, tokens: int) -> None:
            speed = tokens / max(progress.tasks[task].elapsed or 0.0, 1e-9)
            progress.update(task, completed=done, total=total, description=f"answering, {speed:.0f} tokens/s")
            if not logs.is_terminal:
                _say(f"{done}/{total} prompts answered, {tokens} tokens, {speed:.0f} tokens/s")

        count = regenerate_answers(
            decoder,
            Weights(loaded.params),
            loaded.tokenizer,
            prompts,
            answers,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            seed=seed,
            settings=settings,
            progress=show,
        )
    _say(f"{count} prompts answered")
    click.echo(answers)


@cli.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def train(config: Path, overrides: tuple[str, ...]) -> None:
    """Train the drafter that the YAML file CONFIG describes; KEY=VALUE words override it.

    \b
    domino train configs/smollm2-demo.yaml optimizer.learning_rate=1e-3 run_dir=runs/second

    The run directory receives config.yaml, metrics.jsonl and checkpoints/. The same command goes on after a stop,
    with the same bits as if there had been none.
    """
    click.echo(train_run(load_config(config, overrides), console=logs))


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("prompt", required=False)
@click.option("--plain", is_flag=True, help="Decode without the drafter, to compare.")
@click.option("--no-head", is_flag=True, help="Switch the Domino head off.")
@_proposals
@_new_tokens
@_temperature
@_seed
@_dtype
def generate(
    run: Path,
    prompt: str | None,
    plain: bool,
    no_head: bool,
    proposals: str,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    dtype: str,
) -> None:
    """Answer PROMPT (or standard input) with the target and the drafter of RUN, streamed; then tau and tokens/s."""
    text = prompt if prompt is not None else sys.stdin.read()
    if not text.strip():
        raise InputError("the prompt is empty")
    loaded, drafter = _load_run(run, dtype)
    stops = stop_token_ids(loaded.tokenizer)
    decoder = make_decoder(Target(loaded.config), temperature=temperature, stop_ids=stops)
    if not plain:
        decoder = make_decoder(
            Target(loaded.config),
            DraftModel(drafter.config),
            proposals=proposals,
            use_head=not no_head,
            temperature=temperature,
            stop_ids=stops,
        )
    answer = stream_text(
        decoder,
        Weights(loaded.params, drafter.params),
        loaded.tokenizer,
        encode_prompt([{"role": "user", "content": text}], loaded.tokenizer),
        max_new_tokens=max_new_tokens,
        seed=seed,
        write=lambda piece: click.echo(piece, nl=False),
    )
    click.echo()
    speed = f"{answer.tokens_per_second:.1f} tokens/s (compilation included)"
    _say(f"{len(answer.tokens)} tokens, tau {answer.tau:.2f}, {speed}")


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("prompt_files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="PROMPTS...")
@click.option("--limit", type=click.IntRange(1), default=None, help="Only the first prompts of each file.")
@_proposals
@_new_tokens
@_temperature
@_seed
@_dtype
def evaluate(
    run: Path,
    prompt_files: tuple[Path, ...],
    limit: int | None,
    proposals: str,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    dtype: str,
) -> None:
    """Measure the drafter of RUN on each JSONL file of PROMPTS and write RUN/evaluation.json.

    Every prompt is decoded plainly, speculatively and with the Domino head off, in one run: tokens per verification
    (tau), tokens per second, and whether the outputs are the same token by token.
    """
    loaded, drafter = _load_run(run, dtype)
    decoder = make_decoder(
        Target(loaded.config),
        DraftModel(drafter.config),
        proposals=proposals,
        temperature=temperature,
        stop_ids=stop_token_ids(loaded.tokenizer),
    )
    weights = Weights(loaded.params, drafter.params)
    report: dict[str, Any] = {
        "evaluator": {
            "target": drafter.record.target,
            "chat_template": drafter.record.chat_template,
            "step": drafter.step,
            "block_size": drafter.config.block_size,
            "proposals": decoder.proposals,
            "temperature": temperature,
            "max_new_tokens": max_new_tokens,
            "device": f"{jax.devices()[0].platform}:{jax.devices()[0].device_kind}",
        },
        "training": training_summary(run),
        "sets": {},
    }
    for path in prompt_files:
        usable, bad_lines = read_messages(path)
        for bad in bad_lines:
            _say(f"{path}:{bad.line}: {bad.reason}")
        prompts = [encode_prompt(messages, loaded.tokenizer) for _, messages in usable[:limit]]
        figures = _evaluate_set(path.stem, decoder, weights, prompts, max_new_tokens=max_new_tokens, seed=seed)
        report["sets"][path.stem] = {"file": str(path)} | figures
    place = run / "evaluation.json"
    beside = place.with_suffix(".json.new")
    beside.write_text(json.dumps(report, indent=2) + "\n")
    beside.replace(place)
    Console().print(evaluation_table(report))
    for name, figures in report["sets"].items():
        for difference in figures.get("differences", ()):
            click.echo(f"{name}: first difference {difference}")
    click.echo(place)


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float32"]),
    default="bfloat16",
    show_default=True,
    help="Type of the stored tensors.",
)
def export(run: Path, directory: Path, dtype: str) -> None:
    """Write the drafter of RUN to DIRECTORY as config.json and safetensors, the form that serving engines read."""
    record, params, step = load_draft(run)
    save_hf_draft(directory, record.config, params, dtype=dtype)
    _say(f"step {step} of {run} exported and read back, {dtype}")
    click.echo(directory)


@cli.command(name="import")
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--target", "target_name", default="smollm2-135m-instruct", show_default=True, help="Target the draft belongs to."
)
def import_(directory: Path, run: Path, target_name: str) -> None:
    """Make the run directory RUN from the draft checkpoint in DIRECTORY, for generate, evaluate and export."""
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise InputError(f"{run}: already there and not an empty directory; give a new one")
    config, params = load_hf_draft(directory)
    path = resolve_target(target_name, progress=_say)
    tokenizer = load_tokenizer(path)
    _check_fit(config, Target(read_decoder_config(path, dtype="float32")), tokenizer)
    save_draft(run, params, DraftRecord(config, target_name, template_hash(tokenizer)))
    click.echo(run)


def _evaluate_set(
    name: str, decoder: Decoder, weights: Weights, prompts: list[np.ndarray], *, max_new_tokens: int, seed: int
) -> dict[str, Any]:
    with _progress() as progress:
        task = progress.add_task(name, total=len(prompts))

        def show(done: int) -> None:
            progress.update(task, completed=done)
            if not logs.is_terminal:
                _say(f"{name}: {done}/{len(prompts)} prompts")

        return evaluation.evaluate(decoder, weights, prompts, max_new_tokens=max_new_tokens, seed=seed, progress=show)


class _Loaded(NamedTuple):
    config: Any
    params: Any
    tokenizer: Any


class _Drafter(NamedTuple):
    record: DraftRecord
    config: DraftConfig
    params: Any
    step: int


def _load_target(name: str, dtype: str) -> _Loaded:
    path = resolve_target(name, progress=_say)
    loaded = load_target(path, dtype=dtype)
    return _Loaded(loaded.config, loaded.params, load_tokenizer(path))


def _load_run(run: Path, dtype: str) -> tuple[_Loaded, _Drafter]:
    record, params, step = load_draft(run)
    loaded = _load_target(record.target, dtype)
    if template_hash(loaded.tokenizer) != record.chat_template:
        raise InputError(f"{run}: the chat template of {record.target} is not the one the draft was trained with")
    config = replace(record.config, dtype=dtype)
    _check_fit(config, Target(loaded.config), loaded.tokenizer)
    return loaded, _Drafter(record, config, params, step)


def _check_fit(config: DraftConfig, target: Target, tokenizer: Any) -> None:
    try:
        make_decoder(target, DraftModel(config))
    except ValueError as error:
        raise InputError(str(error)) from error
    if config.mask_token_id in (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id):
        raise InputError(f"mask_token_id {config.mask_token_id} is an eos, pad or bos token of the target")


def _progress() -> Progress:
    return Progress(console=logs, disable=not logs.is_terminal)


def _say(line: str) -> None:
    logs.print(line, highlight=False, markup=False, soft_wrap=True)
