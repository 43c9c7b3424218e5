"""Runs are compared figure by figure: a row for each of them, a column for each run.

Each function gives the column of one run, `side_by_side` makes a table of several.
"""

from collections.abc import Iterable, Sequence
from pathlib import PurePath

from domino_jax.evaluation.bootstrap import PerPrompt, gain
from domino_jax.page.cells import (
    COUNT,
    DASH,
    INTERVAL,
    LOSS,
    MILLISECONDS,
    PLACE,
    TAU,
    TIMES,
    Cell,
    Shown,
    cell,
    with_interval,
    words,
)
from domino_jax.page.growth import FACTOR, growths
from domino_jax.page.sources import RunFiles, Source, last, set_names

GIB = 2**30
HASH_CHARACTERS = 12  # of a sha256: enough to see that two differ

Column = dict[str, Cell]  # what a run shows in each row
Table = dict[str, tuple[Cell, ...]]  # what each run shows in a row


def side_by_side(columns: Iterable[Column]) -> Table:
    """A table of runs: a row for each figure that some run has."""
    columns = list(columns)
    names = dict.fromkeys(name for column in columns for name in column)
    rows = {name: tuple(column.get(name, ()) for column in columns) for name in names}
    # What no run has is left out: a head's gain, where all are plain DFlash.
    return {name: cells for name, cells in rows.items() if any(cells)}


def summary(run: RunFiles) -> Cell:
    """What a run is, in a line."""
    kind, target = _kind(run), _target(run)
    steps = cell(f", {COUNT} steps", last(run.records("train"))["step"])
    tokens = cell(f" on {COUNT} answer tokens", run.answer_tokens)
    if not (kind or steps or tokens):
        return ()
    return (f"{kind or DASH} for {target}" if target else kind or DASH, *steps, *tokens)


def training_column(run: RunFiles) -> Column:
    """What was trained, on what, how far."""
    config, evaluator = run.config, run.evaluation["evaluator"]
    data, loss, draft = config["data"], config["loss"], config["draft"]
    captured = _file_name(data["hidden_states"])
    trained_on = f"{captured} (captured states)" if captured else _file_name(data["train"])
    batch, batches = data["batch_size"], config["optimizer"]["grad_accumulation"]
    rows_a_step = cell(COUNT, batch)
    # One batch is the rule, and says nothing.
    if batches.number not in (None, 1):
        rows_a_step = cell(f"{COUNT} batches of {COUNT}", batches, batch)
    # A window in which every step was skipped has no loss.
    losses = [one["loss"] for one in run.records("train") if one["loss"].number is not None]
    return {
        "target": words(_target(run)),
        "drafter": _drafter(run),
        "layers of the draft": cell(COUNT, draft["num_hidden_layers"]),
        "block": cell(PLACE, draft["block_size"]) or cell(PLACE, evaluator["block_size"]),
        "training data": words(trained_on),
        "answer tokens": cell(COUNT, run.answer_tokens),
        "conversations": cell(COUNT, run.evaluation["training"]["data"]["conversations"]),
        "held-out data": words(_file_name(data["eval"])),
        "steps trained": cell(COUNT, last(run.records("train"))["step"]),
        "step evaluated": cell(COUNT, evaluator["step"]),
        "rows a step": rows_a_step,
        "anchors a row, at most": cell(COUNT, loss["num_anchors"]),
        "learning rate, peak": cell("{:g}", config["optimizer"]["learning_rate"]),
        "objective": words(loss["loss_type"].text),
        "first loss": cell(LOSS, last(losses[:1])),
        "last loss": cell(LOSS, last(losses)),
        "seed": cell(PLACE, config["seed"]),
        "computed in": words(config["dtype"].text),
    }


def tau_column(run: RunFiles, name: str, first: RunFiles) -> Column:
    """The figures of a set of prompts; `first` is the run that the others are compared with."""
    prompts = run.evaluation["sets"][name]
    ways, speed = prompts["ways"], prompts["speed"]
    serving, off, floor = ways["serving"], ways["head_off"], ways["ngram"]
    counted = {True: "replay of the target's answers", False: "decoding"}
    replayed = prompts["replayed"].value
    return {
        "prompts": cell(COUNT, prompts["prompts"]),
        "proposals a cycle": cell(PLACE, serving["proposals"]),
        "tau": with_interval(serving, "tau"),
        "tau, head off": with_interval(off, "tau"),
        "gain by the head": _gain(off),
        "tau, all proposals of a block": with_interval(ways["block"], "tau"),
        "n-gram floor": with_interval(floor, "tau"),
        "gain over the floor": _gain(floor),
        f"gain over {first.name}": _gain_over(first, run, name),
        "verifications": cell(COUNT, serving["verifications"]),
        "committed tokens": cell(COUNT, serving["committed"]),
        "counted by": words(counted[replayed] if isinstance(replayed, bool) else None),
        "tokens/s, speculative": cell("{:.1f}", speed["tokens_per_second"]),
        "tokens/s, target alone": cell("{:.1f}", speed["tokens_per_second_plain"]),
        "speed-up": cell(TAU, speed["speed_up"]),
        "tokens compared with the target's": cell(COUNT, serving["tokens_compared"]),
        "of them equal": cell(COUNT, serving["tokens_equal"]),
    }


def position_table(runs: Sequence[RunFiles], name: str) -> Table:
    """Shares of drafted tokens that were kept, a row for each position and kind."""
    table: Table = {}
    for kind in ("conditional", "marginal"):
        shares = [run.way(name, "serving")["acceptance"][kind] for run in runs]
        for index in range(max(len(share.entries) for share in shares)):
            row = f"{kind}, position {index + 1}"
            table[row] = tuple(cell("{:.0%}", share[index]) for share in shares)
    return {row: cells for row, cells in table.items() if any(cells)}


def cycle_column(run: RunFiles) -> Column:
    """Milliseconds of a cycle by part, and what they demand of tau."""
    times = run.evaluation["cycle"]
    return {
        "draft, ms": cell(MILLISECONDS, times["draft"]),
        "head, ms": cell(MILLISECONDS, times["head"]),
        "verification, ms": cell(MILLISECONDS, times["verification"]),
        "rest, ms": cell(MILLISECONDS, times["rest"]),
        "sum of the parts, ms": cell(MILLISECONDS, times["sum"]),
        "cycle as a whole, ms": cell(MILLISECONDS, times["whole"]),
        "step of the target alone, ms": cell(MILLISECONDS, times["plain"]),
        "break-even tau": cell(TAU, times["break_even_tau"]),
        "where verifying costs one step": cell(TAU, times["break_even_tau_if_one_step"]),
        "proposals a cycle": cell(PLACE, times["proposals"]),
        "tokens behind the cycle": cell(COUNT, times["context"]),
        "machine": words(times["measured"]["hardware"].text),
        "device": words(times["measured"]["device"].text),
        "measured on": words(times["measured"]["date"].text),
    }


def speed_column(run: RunFiles) -> Column:
    """How fast training was, by the last line of its log."""
    line = last(run.timing.entries)
    memory = line["peak_memory_bytes"]
    gib = f"{(memory.number or 0) / GIB:.2f} GiB"
    return {
        "at step": cell(COUNT, line["step"]),
        "rows/s": cell("{:,.1f}", line["samples_per_second"]),
        "tokens/s": cell(COUNT, line["tokens_per_second"]),
        "supervised tokens/s": cell(COUNT, line["supervised_tokens_per_second"]),
        "seconds a step": cell("{:.3f}", line["seconds_per_step"]),
        "MFU": cell("{:.1%}", line["mfu"]),
        "peak memory of a device": () if memory.number is None else (Shown(gib, memory),),
    }


def heldout_column(run: RunFiles) -> Column:
    """The last figures that training itself measured."""
    forced, rolled = last(run.records("heldout")), last(run.records("rollout"))
    return {
        "held-out pass at step": cell(COUNT, forced["step"]),
        "loss": cell(LOSS, forced["loss"]),
        "accuracy": cell("{:.1%}", forced["accuracy"]),
        "acceptance length, teacher-forced": cell(TAU, forced["accept_len"]),
        "the same without the head": cell(TAU, forced["base_accept_len"]),
        "rolled out at step": cell(COUNT, rolled["step"]),
        "tau, rolled out": cell(TAU, rolled["tau"]),
    }


def data_table(runs: Sequence[RunFiles]) -> Table:
    """Tau by how much was trained on; beside the largest run of each kind, how it goes on."""
    columns: list[Column] = [{"answer tokens": cell(COUNT, run.answer_tokens)} for run in runs]
    for name in set_names(runs):
        beyond = {one.runs[-1]: one.beyond[1][1] for one in growths(runs, name)}
        for place, (run, column) in enumerate(zip(runs, columns, strict=True)):
            further = words(TAU.format(beyond[place]) if place in beyond else None)
            column[f"tau, {name}"] = with_interval(run.way(name, "serving"), "tau")
            column[f"tau, {name}, extrapolated to {FACTOR} times the most"] = further
    return side_by_side(columns)


def evaluator_column(run: RunFiles) -> Column:
    """What the figures of an evaluation depend on besides draft and prompts."""
    known = run.evaluation["evaluator"]
    column = {
        "temperature": cell("{:g}", known["temperature"]),
        "new tokens, at most": cell(COUNT, known["max_new_tokens"]),
        "seed": cell(PLACE, known["seed"]),
        "computed in": words(known["dtype"].text),
        "sha256 of the target": words((known["target_sha256"].text or "")[:HASH_CHARACTERS]),
        "sha256 of the chat template": words((known["chat_template"].text or "")[:HASH_CHARACTERS]),
    }
    for name, prompts in run.sets.items():
        measured, versions = prompts["measured"], prompts["measured"]["versions"]
        column |= {
            f"{name}: measured on": words(measured["date"].text),
            f"{name}: machine": words(measured["hardware"].text),
            f"{name}: device": words(measured["device"].text),
            f"{name}: versions": words(
                ", ".join(f"{package} {versions[package].text}" for package in versions.names)
            ),
        }
    return column


def _gain(way: Source) -> Cell:
    shown = with_interval(way["gain"], "ratio")
    return (TIMES, *shown) if shown else ()


def _gain_over(first: RunFiles, run: RunFiles, name: str) -> Cell:
    """Of another draft on the same prompts, paired."""
    ours, theirs = _per_prompt(run, name), _per_prompt(first, name)
    if run is first or not ours or not theirs or _asked(run, name) != _asked(first, name):
        return ()
    found = gain(ours, theirs)
    if found is None:
        return ()
    ends = f" ({INTERVAL.format(*found.interval)})" if found.interval else ""
    return (f"{TIMES}{TAU.format(found.ratio)}{ends}",)


def _per_prompt(run: RunFiles, name: str) -> PerPrompt | None:
    each = run.way(name, "serving")["per_prompt"]
    committed, verifications = _counts(each["committed"]), _counts(each["verifications"])
    same = committed and len(committed) == len(verifications)
    return PerPrompt(committed, verifications) if same else None


def _counts(source: Source) -> tuple[int, ...]:
    """A list of counts; none where it holds anything else."""
    counts = [one.value for one in source.entries if type(one.number) is int and one.number >= 0]
    return tuple(counts) if len(counts) == len(source.entries) else ()


def _asked(run: RunFiles, name: str) -> list[object]:
    """What two drafts must share for a comparison prompt by prompt."""
    known, prompts = run.evaluation["evaluator"], run.evaluation["sets"][name]
    count = len(run.way(name, "serving")["per_prompt"]["committed"].entries)
    settings = ("target_sha256", "max_new_tokens", "temperature")
    return [prompts["sha256"].value, count, *(known[key].value for key in settings)]


def _file_name(source: Source) -> str | None:
    """The last part of a path: the rest is of somebody's machine."""
    return PurePath(source.text).name if source.text else None


def _target(run: RunFiles) -> str | None:
    evaluated = run.evaluation["evaluator"]["target"]
    return _file_name(evaluated) or _file_name(run.config["target"])


def _kind(run: RunFiles) -> str | None:
    """What a draft is called; None where no file says."""
    if run.head is not None:
        return "Domino head" if run.head == "domino" else f"{run.head} head"
    known = run.config.value is not None or run.evaluation["evaluator"].value is not None
    return "DFlash" if known else None


def _drafter(run: RunFiles) -> Cell:
    kind, draft = _kind(run), run.config["draft"]
    if run.head is None:
        return words(kind and f"{kind}, no head")
    sizes = cell(f", R {COUNT}, G {COUNT}", draft["emb_dim"], draft["gru_hidden_dim"])
    return (*words(kind), *sizes)
