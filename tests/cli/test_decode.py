"""`domino generate` and `domino evaluate` on a finished run."""

import io
import json
import re
import shlex
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from stand_in import SGLang, serving
from tiny import (
    MASK_TOKEN_ID,
    WORDS,
    add_token,
    quiet,
    run_config,
    seal,
    with_ends,
    write_conversations,
    write_target,
)
from whole_run import train

from domino_jax.base.errors import Untrained
from domino_jax.base.escapes import printable_text
from domino_jax.cli import measurement
from domino_jax.cli.loading import load_run
from domino_jax.config.run import load_config
from domino_jax.data.forms import read_conversations
from domino_jax.data.prompt import prompt_of
from domino_jax.decoding.decoder import Weights, make_decoder
from domino_jax.decoding.generate import Answer, generate
from domino_jax.draft.backbone import DraftModel
from domino_jax.target.decoder import Target
from domino_jax.target.fingerprint import tokenizer_fingerprint
from domino_jax.target.load import load_tokenizer
from domino_jax.training.checkpoint import load_draft, save_draft


@pytest.mark.parametrize(
    "options",
    [
        pytest.param("--plain", marks=pytest.mark.slow),
        pytest.param("--no-head", marks=pytest.mark.slow),
        "--temperature 0.8 --proposals serving --top-k 9 --top-p 0.9",
    ],
)
def test_generate_streams_an_answer(domino, trained: Path, options: str) -> None:
    words = ("--max-new-tokens", 8, *options.split())
    code, out, log = domino("generate", trained / "run", "a b c", *words)
    assert code == 0 and out.strip() and "tau" in log


# So hot that target and draft are nearly uniform: much of what is drafted is kept.
HOT = ("--temperature", 1000, "--max-new-tokens", 24)


def test_color_marks_what_was_drafted_and_changes_no_text(
    domino, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("generate", trained / "run", "a b c", *HOT)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    _, whole, log = domino(*words)
    assert "drafted and kept" not in log
    line = r"\d+ tokens, tau (\d\.\d\d), (\d+)% of drafted tokens kept, \d+\.\d tokens/s"
    found = re.fullmatch(line, log.splitlines()[-1])
    assert found and 1 < float(found[1]) <= 5 and 0 < int(found[2]) <= 100
    code, bracketed, log = domino(*words, "--color")
    assert code == 0 and "drafted and kept: ⟦⟧; the rest: the target's own\n" in log
    assert 0 < bracketed.count("⟦") == bracketed.count("⟧") < 24
    assert re.sub("[⟦⟧]", "", bracketed) == whole
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    _, coloured, log = domino(*words, "--color")
    assert "drafted and kept: green; " in log
    assert coloured == bracketed.replace("⟦", "\x1b[1;32m").replace("⟧", "\x1b[0m")
    monkeypatch.setenv("NO_COLOR", "1")
    assert domino(*words, "--color")[1] == bracketed


@pytest.mark.parametrize("option", [(), ("--color",)])
def test_an_answer_commands_no_terminal(
    domino, trained: Path, monkeypatch: pytest.MonkeyPatch, option: tuple[str, ...]
) -> None:
    """A token is a character here, so pieces end within a control sequence."""
    answer = "\x1b[2J\x1b]52;c;cm0=\x07\u202e\x9b\r\x08 \u0645\u06cc\u200c\u062e\n\t".ljust(64, ".")
    monkeypatch.setattr(
        "domino_jax.decoding.generate.TextStream._text", lambda _, ids: answer[: len(ids)]
    )
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    code, out, _ = domino("generate", trained / "run", "a b c", *HOT, *option)
    assert code == 0
    shown = re.sub("[⟦⟧]", "", out).removesuffix("\n")
    assert shown == printable_text(answer[:24])
    assert shown.startswith(r"\x1b[2J\x1b]52;c;cm0=\x07\u202e\x9b\r\x08")


@pytest.mark.parametrize(
    ("given", "message"),
    [(b"\xff", "standard input: not UTF-8 text"), (b" \n", "the prompt is empty")],
)
def test_a_prompt_that_cannot_be_read_is_refused(
    domino, trained: Path, monkeypatch: pytest.MonkeyPatch, given: bytes, message: str
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given)))
    code, out, log = domino("generate", trained / "run")
    assert (code, out) == (2, "") and message in log


@pytest.mark.slow  # a CPU takes a minute for bfloat16
def test_decoding_computes_as_the_run_was_trained(domino, trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = (f"run_dir={run}", "dtype=bfloat16", "train.steps=1", "data.eval=null")
    assert domino("train", trained / "config.yaml", *words)[0] == 0
    short, prompts = ("--max-new-tokens", 4), trained / "prompts.jsonl"
    for place, own in ((run, "bfloat16"), (trained / "run", "float32")):
        code, _, log = domino("generate", place, "a b c", *short)
        assert code == 0 and f"of {place}, computed in {own}, as it was trained\n" in log
        assert f"loading the target {trained / 'target'}, {own}\n" in log
    for option, dtype in (((), "bfloat16"), (("--dtype", "float32"), "float32")):
        code, out, log = domino("evaluate", run, prompts, "--limit", 1, *short, *option)
        assert code == 0 and f"4 new tokens, {dtype}" in " ".join(out.split())
        assert ("as it was trained" in log) == (not option)
        assert json.loads((run / "evaluation.json").read_text())["evaluator"]["dtype"] == dtype


def test_a_server_of_the_draft_is_measured_beside_it(domino, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "run", tmp_path / "run")
    loaded, drafter = load_run(trained / "run", None, step=None, max_new_tokens=8)
    decoder = make_decoder(
        Target(loaded.config), DraftModel(drafter.record.config), proposals="serving", stop_ids=(0,)
    )

    def decode(prompt: np.ndarray, limit: int, stop_ids: list[int]) -> Answer:
        assert limit == 8 and tuple(stop_ids) == decoder.stop_ids
        weights = Weights(loaded.params, drafter.params)
        (answer,) = generate(decoder, weights, [prompt], max_new_tokens=limit)
        return answer

    engine, prompts = SGLang(decode), trained / "prompts.jsonl"
    short = ("--limit", 2, "--max-new-tokens", 8, "--timed", 0)
    words = ("evaluate", tmp_path / "run", prompts, *short)
    with serving(engine) as url:
        code, out, log = domino(*words, "--endpoint", url)
    assert code == 0 and "asked 2/2" in log and "endpoint: tau, over ours" in out
    usable = read_conversations(prompts).conversations
    asked = [prompt_of(each, loaded.tokenizer).tolist() for each in usable[:2]]
    assert [question["input_ids"] for question in engine.asked] == asked
    figures = json.loads((tmp_path / "run" / "evaluation.json").read_text())["sets"]["prompts"]
    endpoint, serving_here = figures["endpoint"], figures["ways"]["serving"]
    assert (endpoint["url"], endpoint["server"]) == (url, "SGLang 0.5.19")
    assert endpoint["ratio"] == 1 and endpoint["per_prompt"] == serving_here["per_prompt"]
    assert endpoint["tokens_equal"] == endpoint["tokens_compared"] == figures["tokens"]


def test_special_tokens_in_text_are_reported(domino, trained: Path, tmp_path: Path) -> None:
    run, answers = tmp_path / "run", tmp_path / "answers.jsonl"
    shutil.copytree(trained / "run", run)
    texts = ("a", "b <|im_end|> <|im_start|> assistant c") * 4
    lines = [{"messages": [{"role": "user", "content": text}]} for text in texts]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    short = ("--max-new-tokens", 4)
    words = "a message holds the text of a special token, in 4 of 8 lines, first '<|im_end|>' in "
    code, _, log = domino("evaluate", run, prompts, *short, "--timed", 0)
    assert code == 0 and f"{prompts}: {words}line 2" in log
    code, _, log = domino("regenerate", prompts, answers, "--target", trained / "target", *short)
    assert code == 0 and f"{prompts}: {words}line 2" in log
    train = ("train", trained / "config.yaml", f"data.train={answers}", f"run_dir={tmp_path / 'x'}")
    code, _, log = domino(*train, "--dry-run")
    assert code == 0 and f"{answers}: {words}line " in log
    code, _, log = domino(*train, "--dry-run", "data.special_tokens_in_text=refuse")
    assert code == 2 and "4 of 8 lines hold an answer that is not trained (50%)" in log
    assert "a message holds the text of the special token '<|im_end|>'" in log


def test_the_end_tokens_of_the_directory_end_answers(domino, trained: Path, tmp_path: Path) -> None:
    """In every verb that decodes: with all tokens but the mask token, answers are of one token."""
    everything = set(range(len(WORDS))) - {MASK_TOKEN_ID}
    target = with_ends(trained / "target", tmp_path / "target", *everything)
    run, prompts = tmp_path / "run", trained / "prompts.jsonl"
    shutil.copytree(trained / "run", run)
    for record in (run / "checkpoints").glob("*/draft/metadata"):
        record.write_text(json.dumps(json.loads(record.read_text()) | {"target": str(target)}))
        seal(record.parent.parent)
    code, _, log = domino("generate", run, "a b c", "--max-new-tokens", 8)
    assert code == 0 and log.splitlines()[-1].startswith("1 tokens, ")
    words = ("--max-new-tokens", 8, "--timed", 0)
    assert domino("evaluate", run, prompts, *words)[0] == 0
    figures = json.loads((run / "evaluation.json").read_text())["sets"]["prompts"]
    assert figures["tokens"] == figures["prompts"] == 3
    answers = tmp_path / "answers.jsonl"
    words = ("--target", target, "--max-new-tokens", 8)
    code, _, log = domino("regenerate", prompts, answers, *words)
    assert code == 0 and "were cut" not in log
    # A prompt of one word is too short, so none is ever kept.
    words = ("--target", target, "--count", 1, "--batch-size", 2, "--max-new-tokens", 8)
    code, _, log = domino("prompts", tmp_path / "drawn.jsonl", *words)
    last = log.splitlines()[-1]
    assert code == 2 and " too short" in last and "without an end" not in last


def test_a_prompt_with_a_token_outside_the_vocabulary_is_refused(
    domino, trained: Path, tmp_path: Path
) -> None:
    """A tokenizer of more tokens than the target has embeddings for, in every verb that decodes."""
    place = Path(shutil.copytree(trained, tmp_path / "place"))
    target, run, prompts = place / "target", place / "run", place / "prompts.jsonl"
    add_token(target)
    changed = tokenizer_fingerprint(target, load_tokenizer(target))
    for record in (run / "checkpoints").glob("*/draft/metadata"):
        changes = {"target": str(target), "tokenizer_sha256": changed}
        record.write_text(json.dumps(json.loads(record.read_text()) | changes))
        seal(record.parent.parent)
    question = {"messages": [{"role": "user", "content": "a <new> b"}]}
    prompts.write_text(prompts.read_text() + json.dumps(question) + "\n")
    words = ("--target", target, "--max-new-tokens", 8)
    for verb, source in (
        (("generate", run, "a <new> b"), "the prompt"),
        (("evaluate", run, prompts, "--max-new-tokens", 8), f"{prompts}:4"),
        (("regenerate", prompts, tmp_path / "answers.jsonl", *words), f"{prompts}:4"),
    ):
        code, out, log = domino(*verb)
        message = f"error: {source}: token '<new>' (id 32) is outside the target's vocab_size 32;"
        assert (code, out) == (2, "") and log.splitlines()[-1].startswith(message), log
    template = target / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_start|>", "<|im_start|><new>"))
    code, _, log = domino("prompts", tmp_path / "drawn.jsonl", "--count", 1, *words)
    source = "the opening of a user's turn"
    assert code == 2 and log.splitlines()[-1].startswith(f"error: {source}: token '<new>' (id 32)")
    assert not list(tmp_path.glob("*.jsonl*"))


@pytest.mark.pitfall(
    "trained at 98 %, served at 10 %: another chat template",
    seen="cli/loading.py: the hashes not compared",
)
def test_another_chat_template_is_refused(domino, trained: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)

    def refused(**changes: object) -> str:
        for record in (copy / "run" / "checkpoints").glob("*/draft/metadata"):
            tree = json.loads(record.read_text())
            record.write_text(json.dumps(tree | {"target": str(copy / "target")} | changes))
            seal(record.parent.parent)
        code, _, log = domino("generate", copy / "run", "a b")
        assert code == 2, log
        return log.splitlines()[-1]

    assert "the target has changed" in refused(target_sha256=None)  # never in a checkpoint
    template = copy / "target" / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant ", "model "))
    assert "the chat template of" in refused()


@pytest.fixture(scope="module")
def overflowing_draft(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose draft has finite parameters, and no finite logits."""
    stored = load_draft(trained / "run", reporter=quiet())
    run = tmp_path_factory.mktemp("draft") / "run"
    save_draft(
        run, jax.tree.map(lambda leaf: jnp.full_like(leaf, 3e38), stored.params), stored.record
    )
    return run


@pytest.fixture(scope="module")
def overflowing_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose target has finite weights, and no finite logits; its draft is sound."""
    directory = tmp_path_factory.mktemp("target")
    (directory / "target").mkdir()
    file = write_target(directory / "target") / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"][:] = 3e38
    save_file(tensors, file)
    config = run_config(directory, directory / "target", train={"steps": 1})
    with pytest.raises(Untrained):
        train(load_config(config), reporter=quiet())
    write_conversations(directory / "prompts.jsonl", 2, seed=5, answers=False)
    return directory


@pytest.mark.parametrize(
    "line",
    [
        "generate {run} 'a b'",
        "evaluate {run} {prompts}",
        "evaluate {run} {prompts} --replay --timed 0",
    ],
)
def test_no_verb_decodes_a_draft_without_finite_logits(
    domino, trained: Path, overflowing_draft: Path, line: str
) -> None:
    words = shlex.split(line.format(run=overflowing_draft, prompts=trained / "prompts.jsonl"))
    code, out, log = domino(*words, "--max-new-tokens", 8)
    assert (code, out) == (2, "") and "Traceback" not in log
    assert log.splitlines()[-1].startswith("error: the draft's logits are not finite in ")
    assert "(--step)" in log.splitlines()[-1]
    assert not (overflowing_draft / "evaluation.json").exists()


@pytest.mark.parametrize(
    "line",
    [
        "generate run 'a b'",
        "generate run 'a b' --plain --temperature 1 --top-k 3",
        "evaluate run prompts.jsonl",
        "evaluate run prompts.jsonl --temperature 1 --timed 1",
        "regenerate prompts.jsonl answers.jsonl --target target",
        "prompts written.jsonl --count 1 --target target",
    ],
)
def test_no_verb_decodes_a_target_without_finite_logits(
    domino, overflowing_target: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    monkeypatch.chdir(overflowing_target)
    code, out, log = domino(*shlex.split(line), "--max-new-tokens", 8)
    assert (code, out) == (2, "") and "Traceback" not in log
    assert log.splitlines()[-1].startswith("error: the target's logits are not finite in ")
    assert "use another copy of its weights" in log.splitlines()[-1]
    written = ("run/evaluation.json", "answers.jsonl", "written.jsonl")
    assert not any(Path(name).exists() for name in written)


def test_no_changed_figure_is_read_in_silence(
    domino, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setattr(measurement, "user_cache", lambda name, *, needs: cache / name)
    run = Path(shutil.copytree(trained / "run", tmp_path / "run"))
    evaluation, metrics = run / "evaluation.json", run / "metrics.jsonl"
    words = ("evaluate", run, trained / "prompts.jsonl", "--max-new-tokens", 4, "--limit", 2)
    words = (*words, "--timed", 0, "--replay")
    assert domino(*words)[0] == 0
    whole = json.loads(evaluation.read_text())
    assert "notice" not in whole["training"]
    # The cache of the target's answers.
    (cached,) = (cache / "answers").iterdir()
    text = cached.read_text()
    cached.write_text(text.replace('"stopped": [', '"stopped": [true, ', 1))
    code, _, log = domino(*words, "--append")
    assert code == 0 and "the target's answers are decoded again" in " ".join(log.split())
    assert cached.read_text() == text
    assert (
        json.loads(evaluation.read_text())["sets"]["prompts"]["ways"]
        == (whole["sets"]["prompts"]["ways"])
    )
    # The log: the newest checkpoint has its hash.
    log_text = metrics.read_text()
    metrics.write_text(log_text.replace('"accept_len"', '"accept_leo"', 1))
    code, _, log = domino(*words)
    notice = json.loads(evaluation.read_text())["training"]["notice"]
    assert code == 0 and f"{metrics}: its first" in " ".join(log.split())
    assert notice.startswith("metrics.jsonl: its first ") and notice.endswith("; restore it")
    metrics.write_text(log_text)
    # The evaluation itself: one value, and sets as nobody wrote them.
    whole = json.loads(evaluation.read_text())
    for change in ([], {"ways": {"serving": {"tau": None}}}):
        changed = whole | {"sets": {"other": change}}
        for tree in (changed, {name: changed[name] for name in changed if name != "sha256"}):
            evaluation.write_text(json.dumps(tree))
            code, out, log = domino(*words, "--append")
            assert (code, out) == (2, "") and "run `domino evaluate` again" in log, log
