"""Run directories as `domino train` and `domino evaluate` leave them, made up: no model is needed.

The figures follow smooth curves and are written with all their digits, so that a page which shows
another one, or rounds it otherwise, is found out.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from domino_jax.base.files import read_own_json, write_json
from domino_jax.config.run import dump_config, load_config

HARDWARE = {
    "date": "2026-11-26",
    "hardware": "2-core x86, 24 GiB",
    "device": "cpu:cpu",
    "versions": {"domino_jax": "0.1.0", "jax": "0.10.2", "python": "3.11.7"},
}
ANSWER = ("Paris", " is", " the", " capital", " of", " France", ".", "\n", "It", " lies", " on")
ANSWER += (" the", " Seine", " and", " has", " about", " 2", ".", "1", " million", " people", ".")


def write_run(
    directory: Path,
    *,
    head: bool = True,
    tau: float = 1.34,
    answer_tokens: int = 18418,
    sets: tuple[str, ...] = ("everyday", "humaneval"),
    steps: int = 160,
    heldout: bool = True,
) -> Path:
    """A whole run, evaluated."""
    (directory / "checkpoints").mkdir(parents=True)
    source = Path(__file__).parents[2] / "configs/smollm2-demo.yaml"
    words = [f"run_dir={directory}", f"train.steps={steps}"]
    words += [] if head else ["draft.projector_type=null"]
    (directory / "config.yaml").write_text(dump_config(load_config(source, words)))
    write_logs(directory, head=head, steps=steps, heldout=heldout)
    evaluation = evaluation_of(head=head, tau=tau, sets=sets, steps=steps)
    evaluation["training"]["data"] = {"answer_tokens": answer_tokens, "conversations": 640}
    write_evaluation(directory, evaluation)
    return directory


def write_evaluation(directory: Path, evaluation: dict[str, Any]) -> None:
    write_json(directory / "evaluation.json", evaluation, indent=2)


@contextmanager
def edited(run: Path) -> Iterator[dict[str, Any]]:
    """The evaluation of a run, written again once it has been changed."""
    evaluation = read_own_json(run / "evaluation.json", remedy="write it again")
    yield evaluation
    write_evaluation(run, evaluation)


def write_logs(directory: Path, *, head: bool, steps: int, heldout: bool) -> None:
    """`metrics.jsonl` and `timing.jsonl`; one step was skipped, one is a spike."""
    lines, timing = [], []
    for step in range(10, steps + 1, 10):
        share = step / steps
        loss = 2.5 + 10.3 * 0.5 ** (12 * share) + 0.1 / step
        record = {"step": step, "split": "train", "loss": loss, "accuracy": 0.4 * share}
        record |= {"accept_len": 1 + 1.2 * share, "grad_norm": 0.3123, "updates": 10.0}
        record["learning_rate"] = 2e-3 * (1 - 0.9 * share)
        if head:
            record |= {"final_loss": loss, "base_loss": loss + 0.4, "lambda_base": 1 - share}
        lines.append(record)
        speeds = {"samples_per_second": 4.0123 + share, "tokens_per_second": 390.77 + step}
        speeds |= {"supervised_tokens_per_second": 201.3, "seconds_per_step": 0.99321}
        speeds |= {"mfu": 0.2143, "peak_memory_bytes": 1_812_345_678}
        timing.append({"step": step, "split": "train", **speeds})
        if step == 20:
            lines.append({"step": 17, "split": "skipped", "reason": "no_anchor", "lines": [3, 9]})
            spike = {"loss": 27.125, "median": 9.8712, "lines": [5]}
            lines.append({"step": 19, "split": "spike", **spike})
        if step % 40 == 0 and heldout:
            last = 6.1 - 3.2 * share
            record = {"step": step, "split": "heldout", "loss": last, "accuracy": 0.4321}
            record["accept_len"] = 1 + 1.22567 * share
            if head:
                record |= {"final_loss": last, "base_loss": last + 0.45}
                record["base_accept_len"] = 1 + 0.8666 * share
            lines.append(record)
            rollout = {"tau": 1 + 0.35 * share, "marginal_1": 0.2, "conditional_1": 0.2}
            lines.append({"step": step, "split": "rollout", **rollout})
    for name, records in (("metrics", lines), ("timing", timing)):
        text = "".join(json.dumps(record) + "\n" for record in records)
        (directory / f"{name}.jsonl").write_text(text)


def evaluation_of(
    *, sets: tuple[str, ...], head: bool = True, tau: float = 1.34, steps: int = 160
) -> dict[str, Any]:
    """An `evaluation.json`: the first set as good as `tau` says, later ones worse."""
    evaluator = {"target": "smollm2-135m-instruct", "target_sha256": "ab" * 32}
    evaluator |= {"chat_template": "cd" * 32, "chat_template_kwargs": {}, "step": steps}
    evaluator |= {"block_size": 4, "head": "domino" if head else None, "temperature": 0.0}
    evaluator |= {"seed": 0, "max_new_tokens": 64, "dtype": "float32"}
    plain, break_even = 15.0321, 1.73
    whole = plain * break_even
    head_ms = 1.2345 if head else 0.0
    parts = {"draft": 3.1111, "head": head_ms, "verification": whole - 5.5, "rest": 1.0159}
    cycle = {"context": 256, "proposals": 3, **parts, "sum": sum(parts.values())}
    cycle |= {"whole": whole, "plain": plain, "break_even_tau": break_even}
    cycle |= {"break_even_tau_if_one_step": 1.21, "measured": HARDWARE}
    training = {"first_loss": 12.95, "last_loss": 2.76, "steps": steps}
    return {
        "evaluator": evaluator,
        "training": training,
        "cycle": cycle,
        "sets": {name: _set(tau - 0.2 * place, head) for place, name in enumerate(sets)},
    }


def _set(tau: float, head: bool) -> dict[str, Any]:
    ways = {"serving": _way(tau), "ngram": _way(1.1234, compared=False)}
    ways["ngram"]["gain"] = {"ratio": tau / 1.1234, "interval": [tau / 1.16, tau / 1.09]}
    if head:
        ways["block"] = _way(tau + 0.0211, proposals=4)
        ways["head_off"] = _way(tau - 0.0712)
        ratio = tau / (tau - 0.0712)
        ways["head_off"]["gain"] = {"ratio": ratio, "interval": [ratio - 0.02, ratio + 0.02]}
    speed = {"prompts": 4, "tokens_per_second": 50.4321, "tokens_per_second_plain": 45.1234}
    speed |= {"speed_up": 50.4321 / 45.1234}
    pieces = [[text, place % 3 != 0] for place, text in enumerate(ANSWER)]
    examples = [{"prompt": "What is the capital of France, and where?", "pieces": pieces}]
    figures = {"file": "configs/prompts/everyday.jsonl", "sha256": "ef" * 32, "prompts": 80}
    figures |= {"replayed": False, "tokens": 5120, "measured": HARDWARE}
    return figures | {"ways": ways, "speed": speed, "examples": examples}


def _way(tau: float, *, proposals: int = 3, compared: bool = True) -> dict[str, Any]:
    first = (tau - 1) * 0.72
    marginal = [first * 0.55**place for place in range(proposals)]
    conditional: list[float | None] = [first] + [0.5512] * (proposals - 1)
    way: dict[str, Any] = {"proposals": proposals, "tau": tau}
    way |= {"interval": [tau - 0.0421, tau + 0.0433], "verifications": 3800}
    way |= {"committed": round(3800 * tau)}
    way["acceptance"] = {"marginal": marginal, "conditional": conditional}
    way["per_prompt"] = {"committed": [round(47.5 * tau)] * 80, "verifications": [47] * 80}
    if compared:
        way |= {"tokens_compared": 5120, "tokens_equal": 5120, "differences": []}
        way |= {"tie": 0.001, "lossless": True}
    return way
