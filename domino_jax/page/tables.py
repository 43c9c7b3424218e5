"""Runs are compared figure by figure: a row for each of them, a column for each run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from domino_jax.evaluation.bootstrap import PerPrompt, gain
from domino_jax.page.cells import (
    COUNT,
    LOSS,
    MILLISECONDS,
    MISSING,
    PLACE,
    TAU,
    TIMES,
    Cell,
    figure,
    is_missing,
    joined,
    size,
    times,
    with_interval,
    words,
)
from domino_jax.page.growth import FACTOR, growths
from domino_jax.page.sources import NOTHING, RunFiles, Source, counts, last

HASH_CHARACTERS = 12  # of a sha256: enough to see that two differ


@dataclass(frozen=True)
class Row:
    """A figure of every run."""

    name: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """A row for each figure that some run has, a column for each run."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


# What a row shows of one run; its rows by their names.
Column = Callable[[RunFiles], Cell]
Rows = dict[str, Column]


def summary(run: RunFiles) -> Cell:
    """What a run is, in a line."""
    line = joined(words(_kind(run)), " for ", _target(run))
    line = joined(line, ", ", figure(last(run.records("train"))["step"], COUNT))
    line = line if is_missing(line) or not run.records("train") else (*line, " steps")
    tokens = figure(run.answer_tokens, COUNT)
    return line if is_missing(tokens) else (*line, " on ", *tokens, " answer tokens")


def training_table(runs: Sequence[RunFiles]) -> Table:
    """What was trained, on what, how far."""
    rows: Rows = {
        "target": _target,
        "drafter": _drafter,
        "layers of the draft": _set("draft", "num_hidden_layers", form=COUNT),
        "block": _block,
        "training data": _training_data,
        "answer tokens": lambda run: figure(run.answer_tokens, COUNT),
        "conversations": _evaluated("training", "data", "conversations", form=COUNT),
        "held-out data": lambda run: words(_file_name(run.config["data"]["eval"])),
        "steps trained": lambda run: figure(last(run.records("train"))["step"], COUNT),
        "step evaluated": _evaluated("evaluator", "step", form=COUNT),
        "rows a step": _rows_a_step,
        "anchors a row, at most": _set("loss", "num_anchors", form=COUNT),
        "learning rate, peak": _set("optimizer", "learning_rate", form="g"),
        "objective": _set("loss", "loss_type"),
        "first loss": lambda run: figure(_with_loss(run, 0)["loss"], LOSS),
        "last loss": lambda run: figure(_with_loss(run, -1)["loss"], LOSS),
        "seed": _set("seed", form=PLACE),
        "computed in": _set("dtype"),
    }
    return _table("What was trained, and on what", runs, rows)


def tau_tables(runs: Sequence[RunFiles]) -> tuple[Table, ...]:
    """The figures of each set of prompts."""
    return tuple(_tau_table(name, runs) for name in set_names(runs))


def _tau_table(name: str, runs: Sequence[RunFiles]) -> Table:
    def of_set(*path: str, form: str) -> Column:
        return _evaluated("sets", name, *path, form=form)

    serving = ("ways", "serving")
    rows: Rows = {
        "prompts": of_set("prompts", form=COUNT),
        "proposals a cycle": of_set(*serving, "proposals", form=PLACE),
        "tau": _tau(name, "serving"),
        "tau, head off": _tau(name, "head_off"),
        "gain by the head": _gain(name, "head_off"),
        "tau, all proposals of a block": _tau(name, "block"),
        "n-gram floor": _tau(name, "ngram"),
        "gain over the floor": _gain(name, "ngram"),
        f"gain over {runs[0].name}": _gain_over(runs[0], name),
        "verifications": of_set(*serving, "verifications", form=COUNT),
        "committed tokens": of_set(*serving, "committed", form=COUNT),
        "counted by": _counted_by(name),
        "tokens/s, speculative": of_set("speed", "tokens_per_second", form=".1f"),
        "tokens/s, target alone": of_set("speed", "tokens_per_second_plain", form=".1f"),
        "speed-up": of_set("speed", "speed_up", form=TAU),
        "tokens compared with the target's": of_set(*serving, "tokens_compared", form=COUNT),
        "of them equal": of_set(*serving, "tokens_equal", form=COUNT),
    }
    return _table(name, runs, rows)


def position_tables(runs: Sequence[RunFiles]) -> tuple[Table, ...]:
    """Shares of drafted tokens that were kept, a row for each position and kind."""
    return tuple(_position_table(name, runs) for name in set_names(runs))


def _position_table(name: str, runs: Sequence[RunFiles]) -> Table:
    place = ("sets", name, "ways", "serving", "acceptance")
    rows: Rows = {}
    for kind in ("conditional", "marginal"):
        positions = max(len(run.evaluation.at(*place, kind).entries) for run in runs)
        for index in range(positions):
            row = f"{kind}, position {index + 1}"
            rows[row] = _evaluated(*place, kind, index, form=".0%")
    return _table(name, runs, rows)


def cycle_table(runs: Sequence[RunFiles]) -> Table:
    """Milliseconds of a cycle by part, and what they demand of tau."""

    def part(key: str, form: str = MILLISECONDS) -> Column:
        return _evaluated("cycle", key, form=form)

    rows: Rows = {
        "draft, ms": part("draft"),
        "head, ms": part("head"),
        "verification, ms": part("verification"),
        "rest, ms": part("rest"),
        "sum of the parts, ms": part("sum"),
        "cycle as a whole, ms": part("whole"),
        "step of the target alone, ms": part("plain"),
        "break-even tau": part("break_even_tau", TAU),
        "where verifying costs one step": part("break_even_tau_if_one_step", TAU),
        "proposals a cycle": part("proposals", PLACE),
        "tokens behind the cycle": part("context", COUNT),
        "machine": _evaluated("cycle", "measured", "hardware"),
        "device": _evaluated("cycle", "measured", "device"),
        "measured on": _evaluated("cycle", "measured", "date"),
    }
    return _table("A cycle at batch 1, medians", runs, rows)


def speed_table(runs: Sequence[RunFiles]) -> Table:
    """How fast training was, by the last line of its log."""

    def last_of(key: str, form: str) -> Column:
        return lambda run: figure(last(run.timing.entries)[key], form)

    rows: Rows = {
        "at step": last_of("step", COUNT),
        "rows/s": last_of("samples_per_second", ",.1f"),
        "tokens/s": last_of("tokens_per_second", COUNT),
        "supervised tokens/s": last_of("supervised_tokens_per_second", COUNT),
        "seconds a step": last_of("seconds_per_step", ".3f"),
        "MFU": last_of("mfu", ".1%"),
        "peak memory of a device": lambda run: size(last(run.timing.entries)["peak_memory_bytes"]),
    }
    return _table("Training, by the last line of timing.jsonl", runs, rows)


def heldout_table(runs: Sequence[RunFiles]) -> Table:
    """The last figures that training itself measured."""

    def last_of(split: str, key: str, form: str) -> Column:
        return lambda run: figure(last(run.records(split))[key], form)

    rows: Rows = {
        "held-out pass at step": last_of("heldout", "step", COUNT),
        "loss": last_of("heldout", "loss", LOSS),
        "accuracy": last_of("heldout", "accuracy", ".1%"),
        "acceptance length, teacher-forced": last_of("heldout", "accept_len", TAU),
        "the same without the head": last_of("heldout", "base_accept_len", TAU),
        "rolled out at step": last_of("rollout", "step", COUNT),
        "tau, rolled out": last_of("rollout", "tau", TAU),
    }
    return _table("Last figures of training", runs, rows)


def data_table(runs: Sequence[RunFiles]) -> Table:
    """Tau by how much was trained on."""
    rows: Rows = {"answer tokens": lambda run: figure(run.answer_tokens, COUNT)}
    for name in set_names(runs):
        rows[f"tau, {name}"] = _tau(name, "serving")
        rows[f"tau, {name}, extrapolated to {FACTOR} times the most"] = _beyond(name, runs)
    return _table("Tau by answer tokens trained on", runs, rows)


def _beyond(name: str, runs: Sequence[RunFiles]) -> Column:
    """Beside the largest run of each kind."""
    taus = {runs[one.runs[-1]].name: one.beyond[1][1] for one in growths(runs, name)}
    return lambda run: words(format(taus[run.name], TAU) if run.name in taus else None)


def evaluator_table(runs: Sequence[RunFiles]) -> Table:
    """What the figures of an evaluation depend on besides draft and prompts."""
    rows: Rows = {
        "temperature": _evaluated("evaluator", "temperature", form="g"),
        "new tokens, at most": _evaluated("evaluator", "max_new_tokens", form=COUNT),
        "seed": _evaluated("evaluator", "seed", form=PLACE),
        "computed in": _evaluated("evaluator", "dtype"),
        "sha256 of the target": _hash("target_sha256"),
        "sha256 of the chat template": _hash("chat_template"),
    }
    for name in set_names(runs):
        rows[f"{name}: measured on"] = _evaluated("sets", name, "measured", "date")
        rows[f"{name}: machine"] = _evaluated("sets", name, "measured", "hardware")
        rows[f"{name}: device"] = _evaluated("sets", name, "measured", "device")
        rows[f"{name}: versions"] = _versions(name)
    return _table("How it was evaluated", runs, rows)


def set_names(runs: Sequence[RunFiles]) -> list[str]:
    """The sets of prompts of all runs, each once, in the order in which they come."""
    names = (str(prompts.path[-1]) for run in runs for prompts in run.sets)
    return list(dict.fromkeys(names))


def _table(caption: str, runs: Sequence[RunFiles], rows: Rows) -> Table:
    filled = []
    for name, column in rows.items():
        cells = tuple(column(run) for run in runs)
        # What no run has is left out: a head's gain, where all are plain DFlash.
        if not all(map(is_missing, cells)):
            filled.append(Row(name, cells))
    return Table(caption, tuple(run.name for run in runs), tuple(filled))


def _shown(source: Source, form: str | None) -> Cell:
    return words(source.text) if form is None else figure(source, form)


def _evaluated(*path: str | int, form: str | None = None) -> Column:
    """A place in evaluation.json; without a format it is text."""
    return lambda run: _shown(run.evaluation.at(*path), form)


def _set(*path: str, form: str | None = None) -> Column:
    """A place in config.yaml."""
    return lambda run: _shown(run.config.at(*path), form)


def _tau(name: str, kind: str) -> Column:
    def cell(run: RunFiles) -> Cell:
        way = run.evaluation.at("sets", name, "ways", kind)
        return with_interval(way["tau"], way["interval"], TAU)

    return cell


def _gain(name: str, kind: str) -> Column:
    def cell(run: RunFiles) -> Cell:
        gain = run.evaluation.at("sets", name, "ways", kind, "gain")
        return times(gain["ratio"], gain["interval"])

    return cell


def _gain_over(first: RunFiles, name: str) -> Column:
    """Of another draft on the same prompts, paired."""

    def cell(run: RunFiles) -> Cell:
        ours, theirs = _per_prompt(run, name), _per_prompt(first, name)
        if run is first or not ours or not theirs or _asked(run, name) != _asked(first, name):
            return MISSING
        found = gain(ours, theirs)
        if found is None:
            return MISSING
        both = found.interval
        ends = f" ({both[0]:{TAU}} to {both[1]:{TAU}})" if both else ""
        return (f"{TIMES}{found.ratio:{TAU}}{ends}",)

    return cell


def _per_prompt(run: RunFiles, name: str) -> PerPrompt | None:
    each = run.evaluation.at("sets", name, "ways", "serving", "per_prompt")
    committed, verifications = counts(each["committed"]), counts(each["verifications"])
    same = committed and len(committed) == len(verifications)
    return PerPrompt(committed, verifications) if same else None


def _asked(run: RunFiles, name: str) -> list[object]:
    """What two drafts must share for a comparison prompt by prompt."""
    evaluator, prompts = run.evaluation["evaluator"], run.evaluation.at("sets", name)
    count = len(prompts.at("ways", "serving", "per_prompt", "committed").entries)
    settings = ("target_sha256", "max_new_tokens", "temperature")
    return [prompts["sha256"].value, count, *(evaluator[key].value for key in settings)]


def _counted_by(name: str) -> Column:
    def cell(run: RunFiles) -> Cell:
        replayed = run.evaluation.at("sets", name, "replayed").value
        if not isinstance(replayed, bool):
            return MISSING
        return words("replay of the target's answers" if replayed else "decoding")

    return cell


def _hash(key: str) -> Column:
    def cell(run: RunFiles) -> Cell:
        digest = run.evaluation.at("evaluator", key).text
        return words(digest[:HASH_CHARACTERS] if digest else None)

    return cell


def _versions(name: str) -> Column:
    def cell(run: RunFiles) -> Cell:
        versions = run.evaluation.at("sets", name, "measured", "versions")
        told = [f"{package} {versions[package].text}" for package in versions.names]
        return words(", ".join(told) or None)

    return cell


def _with_loss(run: RunFiles, place: int) -> Source:
    """A training record by its place among those with a loss."""
    # A window in which every step was skipped has none.
    records = [one for one in run.records("train") if one["loss"].number is not None]
    return records[place] if records else NOTHING


def _file_name(source: Source) -> str | None:
    """The last part of a path: the rest is of somebody's machine."""
    return PurePath(source.text).name if source.text else None


def _target(run: RunFiles) -> Cell:
    evaluated = run.evaluation["evaluator"]["target"]
    return words(_file_name(evaluated) or _file_name(run.config["target"]))


def _kind(run: RunFiles) -> str | None:
    """What a draft is called; None where no file says."""
    if run.head is not None:
        return "Domino head" if run.head == "domino" else f"{run.head} head"
    known = run.config.value is not None or run.evaluation["evaluator"].value is not None
    return "DFlash" if known else None


def _drafter(run: RunFiles) -> Cell:
    kind = _kind(run)
    if run.head is None:
        return MISSING if kind is None else (f"{kind}, no head",)
    rank = figure(run.config.at("draft", "emb_dim"), COUNT)
    hidden = figure(run.config.at("draft", "gru_hidden_dim"), COUNT)
    if is_missing(rank) or is_missing(hidden):
        return words(kind)
    return (f"{kind}, R ", *rank, ", G ", *hidden)


def _block(run: RunFiles) -> Cell:
    trained = figure(run.config.at("draft", "block_size"), PLACE)
    evaluated = figure(run.evaluation.at("evaluator", "block_size"), PLACE)
    return evaluated if is_missing(trained) else trained


def _training_data(run: RunFiles) -> Cell:
    data = run.config["data"]
    captured = _file_name(data["hidden_states"])
    return words(f"{captured} (captured states)" if captured else _file_name(data["train"]))


def _rows_a_step(run: RunFiles) -> Cell:
    batch = figure(run.config.at("data", "batch_size"), COUNT)
    batches = run.config.at("optimizer", "grad_accumulation")
    # One batch is the rule, and says nothing.
    if batches.number in (None, 1):
        return batch
    return joined(figure(batches, COUNT), " batches of ", batch)
