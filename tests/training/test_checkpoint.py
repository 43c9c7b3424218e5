"""Checkpoints that can be trusted: damage is named and passed over, never trained on in silence."""

import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import orbax.checkpoint as ocp
import pytest
from directories import leftovers
from saved_bits import final_bits
from tiny import Heard, quiet, run_config, seal, write_conversations, write_target
from whole_run import train

from domino_jax.base.errors import InputError
from domino_jax.config.run import load_config
from domino_jax.target.fingerprint import target_fingerprint, tokenizer_fingerprint
from domino_jax.target.load import load_tokenizer
from domino_jax.training.checkpoint import (
    load_draft,
    open_checkpoints,
    save_draft,
    sound_checkpoint,
)
from domino_jax.training.log import read_metrics
from domino_jax.training.records import read_draft_record, read_run_record

STEPS: dict[str, Any] = {"steps": 6, "log_every": 5, "eval_every": 3}
STEPS |= {"checkpoint_every": 2, "keep_checkpoints": 3}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a target and a run of it that has the checkpoints 2, 4 and 6."""
    directory = tmp_path_factory.mktemp("trained")
    (directory / "target").mkdir()
    path = run_config(directory, write_target(directory / "target"), train=STEPS)
    train(load_config(path), reporter=quiet())
    return directory


@pytest.fixture
def place(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, which a test may damage; the config still names the one of all tests."""
    return shutil.copytree(trained, tmp_path / "place")


def resume(place: Path, *words: str) -> str:
    """What a start of the run in `place` says."""
    heard = Heard()
    train(load_config(place / "config.yaml", [f"run_dir={place / 'run'}", *words]), reporter=heard)
    return heard.text


def data_file(step: Path, item: str) -> Path:
    files = (step / item / "ocdbt.process_0" / "d").iterdir()
    return max(files, key=lambda path: path.stat().st_size)


def damaged(step: Path, how: str) -> None:
    match how:
        case "flip":
            file = data_file(step, "params")
            content = bytearray(file.read_bytes())
            content[-5] ^= 1
            file.write_bytes(content)
        case "position":
            (data,) = (step / "data").glob("process_*.json")
            data.write_text(data.read_text().replace('"next_index": ', '"next_index": 1'))
        case "truncate":
            data_file(step, "optimizer").write_bytes(b"")
        case "item":
            shutil.rmtree(step / "optimizer")
        case "empty":
            shutil.rmtree(step)
            step.mkdir()
        case "checksums":
            (step / "SHA256SUMS").unlink()
            # Also where the note of the newest checkpoint is gone.
            (step.parent.parent / "newest_checkpoint.json").unlink()


@pytest.mark.pitfall(
    "a flipped bit in a checkpoint trains on in silence",
    seen="training/checkpoint.py: no file looked at",
)
@pytest.mark.parametrize("how", ["flip", "position", "truncate", "item", "empty", "checksums"])
def test_damage_is_named_and_the_one_before_is_taken(place: Path, how: str) -> None:
    damaged(place / "run" / "checkpoints" / "6", how)
    said: list[str] = []
    assert sound_checkpoint(place / "run", reporter=Heard(lines=said)) == 4
    assert len(said) == 1 and f"{place}/run/checkpoints/6: damaged, not used: " in said[0]
    # Readers move nothing: the run may be training.
    assert load_draft(place / "run", reporter=Heard(lines=said)).step == 4
    assert (place / "run" / "checkpoints" / "6").is_dir()


def test_a_checkpoint_is_hashed_once_it_is_complete(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orbax.checkpoint._src.metadata.checkpoint import _MetadataStoreImpl

    draft = load_draft(trained / "run", reporter=quiet())
    write = _MetadataStoreImpl.write

    def late(self: Any, *arguments: Any) -> None:
        time.sleep(0.5)  # the thread of Orbax that writes `_CHECKPOINT_METADATA`
        write(self, *arguments)

    monkeypatch.setattr(_MetadataStoreImpl, "write", late)
    save_draft(tmp_path, draft.params, draft.record)
    said: list[str] = []
    assert sound_checkpoint(tmp_path, reporter=Heard(lines=said)) == 0 and not said
    written = tmp_path / "checkpoints" / "0" / "_CHECKPOINT_METADATA"
    assert "item_handlers" in written.read_text()


def test_a_killed_save_leaves_no_checkpoint_or_a_sound_one(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = load_draft(trained / "run", reporter=quiet())

    def killed(*_: Any) -> None:
        raise InputError("killed")

    # Between the hashes and the rename.
    with monkeypatch.context() as patch:
        patch.setattr(ocp.path.atomicity.AtomicRenameTemporaryPath, "finalize", killed)
        with pytest.raises(InputError, match="killed"):
            save_draft(tmp_path, draft.params, draft.record)
    assert sound_checkpoint(tmp_path, reporter=quiet()) is None
    # Between the rename and the note of the newest checkpoint; the first is removed.
    with monkeypatch.context() as patch:
        patch.setattr("domino_jax.training.checkpoint.write_json", killed)
        with pytest.raises(InputError, match="killed"):
            save_draft(tmp_path, draft.params, draft.record)
    assert sound_checkpoint(tmp_path, reporter=quiet()) == 0
    assert leftovers(tmp_path / "checkpoints")[0] == "0"


def without_step(checkpoint: Path) -> None:
    """Makes a checkpoint of an earlier version."""
    metadata = checkpoint / "draft" / "metadata"
    tree = json.loads(metadata.read_text())
    del tree["step"]
    metadata.write_text(json.dumps(tree))
    seal(checkpoint)


def test_a_checkpoint_under_another_step_is_passed_over(place: Path) -> None:
    checkpoints = place / "run" / "checkpoints"
    shutil.copytree(checkpoints / "2", checkpoints / "8")
    (checkpoints / "4").rename(checkpoints / "5")
    (checkpoints / "6").rename(checkpoints / "4")
    said: list[str] = []
    assert sound_checkpoint(place / "run", reporter=Heard(lines=said)) == 2
    assert [line.partition("checkpoints/")[2] for line in said] == [
        f"{name}: damaged, not used: the state of step {step}, expected that of step {name}"
        for name, step in ((8, 2), (5, 4), (4, 6))
    ]
    with pytest.raises(InputError, match="no undamaged checkpoint is left"):
        load_draft(place / "run", reporter=quiet(), step=8)
    assert sound_checkpoint(place / "run", reporter=quiet(), set_aside=True) == 2
    assert {path.name for path in (place / "run" / "set_aside").iterdir()} == {"4", "5", "8"}
    assert {path.name for path in checkpoints.iterdir()} == {"2"}


def test_an_earlier_checkpoint_without_its_step_is_taken_at_its_own(place: Path) -> None:
    checkpoints = place / "run" / "checkpoints"
    for step in ("2", "4", "6"):
        without_step(checkpoints / step)
    assert "resuming at step 6 of 6" in resume(place)
    (checkpoints / "4").rename(checkpoints / "7")
    message = r"checkpoints/7: the state of step 4, expected .* rename the directory to 4"
    with pytest.raises(InputError, match=message):
        resume(place, "train.extra_steps=3")


def test_an_import_is_step_0(trained: Path, tmp_path: Path) -> None:
    draft = load_draft(trained / "run", reporter=quiet())
    save_draft(tmp_path, draft.params, draft.record)
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "0").rename(checkpoints / "3")
    with pytest.raises(InputError, match="no undamaged checkpoint is left"):
        load_draft(tmp_path, reporter=quiet())


def test_a_damaged_run_ends_with_the_same_bits(trained: Path, place: Path) -> None:
    damaged(place / "run" / "checkpoints" / "6", "flip")
    damaged(place / "run" / "checkpoints" / "4", "position")
    said = resume(place)
    for words in ("checkpoints/6: damaged", "moved to", "resuming at step 2 of 6"):
        assert words in said
    assert {path.name for path in (place / "run" / "set_aside").iterdir()} == {"4", "6"}
    chex.assert_trees_all_equal(final_bits(trained / "run", 6), final_bits(place / "run", 6))
    for name in ("metrics.jsonl", "config.yaml"):
        here, there = ((one / "run" / name).read_text() for one in (place, trained))
        assert here.replace(str(place), str(trained)) == there


@pytest.mark.pitfall(
    "a run that lost its checkpoints begins again without a word",
    seen="training/checkpoint.py: none left taken for none saved",
)
@pytest.mark.parametrize("how", ["all damaged", "checkpoints/ gone", "all gone"])
def test_a_run_without_a_good_checkpoint_never_begins_again(place: Path, how: str) -> None:
    checkpoints = place / "run" / "checkpoints"
    if how == "checkpoints/ gone":
        shutil.rmtree(checkpoints)
    for step in list(checkpoints.iterdir()) if checkpoints.is_dir() else []:
        shutil.rmtree(step)
        if how == "all damaged":
            step.mkdir()
    for attempt in (resume, lambda place: load_draft(place / "run", reporter=quiet())):
        with pytest.raises(InputError, match="no undamaged checkpoint is left"):
            attempt(place)


def test_a_newest_checkpoint_that_is_gone_is_missed(trained: Path, place: Path) -> None:
    shutil.rmtree(place / "run" / "checkpoints" / "6")
    assert "checkpoints/6: the newest checkpoint is gone" in resume(place)
    chex.assert_trees_all_equal(final_bits(trained / "run", 6), final_bits(place / "run", 6))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"step": "6"}', '{"step": 6'])
def test_the_note_of_the_newest_checkpoint_is_read_strictly(place: Path, content: str) -> None:
    (place / "run" / "newest_checkpoint.json").write_text(content)
    with pytest.raises(InputError, match=r"newest_checkpoint\.json"):
        sound_checkpoint(place / "run", reporter=quiet())


def test_a_changed_note_of_the_newest_checkpoint_is_refused(place: Path) -> None:
    note = place / "run" / "newest_checkpoint.json"
    shutil.rmtree(place / "run" / "checkpoints" / "6")
    note.write_text(note.read_text().replace("6", "4", 1))  # 6 would not be missed
    with pytest.raises(InputError, match=r"newest_checkpoint\.json: changed .*; remove the file"):
        sound_checkpoint(place / "run", reporter=quiet())
    note.write_text('{"step": 6}\n')  # of an earlier version
    heard = Heard()
    assert sound_checkpoint(place / "run", reporter=heard) == 4 and "is gone" in heard.text


def test_one_step_can_be_asked_for(place: Path) -> None:
    assert load_draft(place / "run", reporter=quiet(), step=4).step == 4
    with pytest.raises(InputError, match="no checkpoint 5; there are 6, 4, 2"):
        load_draft(place / "run", reporter=quiet(), step=5)
    damaged(place / "run" / "checkpoints" / "4", "flip")
    with pytest.raises(InputError, match="no undamaged checkpoint is left"):
        load_draft(place / "run", reporter=quiet(), step=4)


def edited_rows(place: Path, edit: Callable[[list[str]], list[str]]) -> str:
    rows = place / "rows.jsonl"
    rows.write_text("".join(edit(rows.read_text().splitlines(keepends=True))))
    return f"data.train={rows}"


def changed_words(place: Path) -> str:
    return edited_rows(place, lambda lines: [lines[0].replace(': "', ': "a '), *lines[1:]])


def reordered(place: Path) -> str:
    return edited_rows(place, lambda lines: lines[::-1])


def longer(place: Path) -> str:
    return edited_rows(place, lambda lines: [*lines, lines[0]])


def other_heldout(place: Path) -> str:
    return f"data.eval={write_conversations(place / 'heldout.jsonl', 5, seed=9)}"


def other_weights(place: Path) -> str:
    from safetensors.numpy import load_file, save_file

    path = place / "target" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1.5
    save_file(tensors, path)
    return f"target={place / 'target'}"


def other_template(place: Path) -> str:
    path = place / "target" / "chat_template.jinja"
    path.write_text(path.read_text() + "{# other #}")
    return f"target={place / 'target'}"


@pytest.mark.pitfall(
    "resumed with other data, weights, tokens or another template",
    seen="training/run_directory.py: inputs not compared; the template not compared",
)
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (changed_words, "data.train: was 24 rows, sha256"),
        (reordered, "data.train: was 24 rows, sha256"),
        (longer, "is 25 rows, sha256"),
        (other_heldout, "data.eval: was 5 rows"),
        (other_weights, "target: was sha256"),
        (other_template, "chat template sha256"),
    ],
)
def test_what_changed_is_named(place: Path, change: Any, named: str) -> None:
    with pytest.raises(InputError) as refused:
        resume(place, change(place))
    said = str(refused.value)
    assert named in said and "use another run_dir" in said and len(said) <= 500, said


@pytest.mark.pitfall(
    "mask token aliases eos, pad or bos, or changes on resume or import",
    seen="training/run_directory.py: mask_token_id free to change",
)
def test_a_run_directory_belongs_to_its_settings(place: Path) -> None:
    with pytest.raises(InputError, match=r"draft\.mask_token_id 2 -> 9.*use another run_dir"):
        resume(place, "draft.mask_token_id=9")
    with pytest.raises(InputError, match=r"target_layer_ids \[0, 2\] -> \[0, 1\]"):
        resume(place, "draft.target_layer_ids=[0,1]")
    resume(place, "train.log_every=1")  # changes no number


def test_a_run_of_another_version_is_not_resumed(place: Path) -> None:
    for step in ("2", "4", "6"):
        checkpoint = place / "run" / "checkpoints" / step
        stored = checkpoint / "run" / "metadata"
        stored.write_text(stored.read_text().replace('"options": {}', '"dpace_alpha": 0.5'))
        seal(checkpoint)
    message = r"loss\.dpace_alpha, loss\.options: .*another version.*use another run_dir"
    with pytest.raises(InputError, match=message):
        resume(place)


@pytest.mark.pitfall(
    "an unfinished save picked up",
    seen="training/checkpoint.py: the newest directory taken, finished or not",
)
def test_an_unfinished_save_is_never_picked_up(place: Path) -> None:
    leftover = place / "run" / "checkpoints" / "8.orbax-checkpoint-tmp"
    (leftover / "params").mkdir(parents=True)
    assert load_draft(place / "run", reporter=quiet()).step == 6
    assert "resuming at step 6 of 6" in resume(place)


def test_the_metrics_log_drops_what_a_resumed_run_does_again(trained: Path, place: Path) -> None:
    log = place / "run" / "metrics.jsonl"
    log.write_text(log.read_text() + '{"step": 9, "split": "train"}\n{"step": 10, "spl')
    resume(place)
    assert log.read_bytes() == (trained / "run" / "metrics.jsonl").read_bytes()


def test_inputs_may_move(place: Path) -> None:
    moved = shutil.move(place / "rows.jsonl", place / "moved.jsonl")
    said = resume(place, f"data.train={moved}", f"target={place / 'target'}")
    assert "already trained for 6 steps" in said


def test_a_finished_run_is_extended(place: Path) -> None:
    message = r"train\.steps 6 -> 9\).*train\.extra_steps=N trains N steps further"
    with pytest.raises(InputError, match=message):
        resume(place, "train.steps=9")
    said = resume(place, "train.extra_steps=3")
    assert "resuming at step 6 of 9" in said
    # Two ways to nine steps, one number.
    whole = place / "whole"
    words = [f"run_dir={whole}", "train.extra_steps=3"]
    train(load_config(place / "config.yaml", words), reporter=quiet())
    chex.assert_trees_all_equal(final_bits(whole, 9), final_bits(place / "run", 9))
    last = read_metrics(whole)[-2]
    assert (last["step"], last["lambda_base"]) == (9, 0)
    assert last["learning_rate"] == pytest.approx(6e-5)


def test_a_dry_run_of_a_run_that_is_there_says_where_it_goes_on(domino: Any, trained: Path) -> None:
    path = trained / "config.yaml"
    code, out, _ = domino("train", path, "--dry-run", "train.extra_steps=4")
    assert code == 0 and "10 of 8 rows: 3.33 epochs; the run resumes at step 6" in out
    code, out, log = domino("train", path, "--dry-run", "draft.emb_dim=4")
    assert (code, out) == (2, "") and "draft.emb_dim 8 -> 4" in log


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path: Path) -> None:
    import orbax.checkpoint as ocp

    with open_checkpoints(tmp_path, keep=1, keep_best="heldout") as checkpoints:
        for step, accept_len in enumerate((1.5, 3.0, None, 2.0, 2.5, None), start=1):
            items = ocp.args.Composite(draft=ocp.args.JsonSave({"step": step}))
            metrics = None if accept_len is None else {"heldout": {"accept_len": accept_len}}
            checkpoints.save(step, args=items, metrics=metrics)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"2", "6"}


def test_what_is_best_may_change_between_two_starts(tmp_path: Path) -> None:
    import orbax.checkpoint as ocp

    items = ocp.args.Composite(draft=ocp.args.JsonSave({}))
    with open_checkpoints(tmp_path, keep=1, keep_best="heldout") as checkpoints:
        checkpoints.save(1, args=items, metrics={"heldout": {"accept_len": 9.0}})
    with open_checkpoints(tmp_path, keep=1, keep_best="rollout") as checkpoints:
        for step, tau in ((2, 1.5), (3, 1.25)):
            checkpoints.save(step, args=items, metrics={"rollout": {"tau": tau}})
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"2", "3"}


@pytest.mark.parametrize(("by", "figure"), [("heldout", "accept_len"), ("rollout", "tau")])
def test_a_run_keeps_its_best_checkpoint(place: Path, by: str, figure: str) -> None:
    words = [f"train.keep_best={by}", "train.keep_checkpoints=1", "train.steps=9"]
    words += ["train.checkpoint_every=3", f"run_dir={place / 'best'}"]
    if by == "rollout":
        words += ["train.rollout_every=3", "train.rollout_tokens=8"]
    run = train(load_config(place / "config.yaml", words), reporter=quiet())
    measured = {line["step"]: line[figure] for line in read_metrics(run) if line["split"] == by}
    best = max(measured, key=lambda step: (measured[step], step))
    assert {int(path.name) for path in (run / "checkpoints").iterdir()} == {best, 9}
    assert load_draft(run, reporter=quiet(), step=best).step == best


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("keep_best=tau", "must be one of heldout, rollout or null, found 'tau'"),
        ("keep_best=rollout", "rollout_every null must be a multiple of checkpoint_every"),
        ("keep_best=rollout rollout_every=3", "rollout_every 3 must be a multiple of checkpoint"),
        ("keep_best=heldout", "eval_every 3 must be a multiple of checkpoint_every 2"),
        ("extra_steps=-1", r"extra_steps must be at least 0 and below 2\*\*31, found -1"),
    ],
)
def test_settings_of_checkpoints_are_checked(trained: Path, words: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config(trained / "config.yaml", [f"train.{word}" for word in words.split()])


def test_the_best_held_out_checkpoint_needs_held_out_rows(trained: Path) -> None:
    words = ("train.keep_best=heldout", "data.eval=null", "train.checkpoint_every=3")
    with pytest.raises(InputError, match=r"data\.eval is missing"):
        load_config(trained / "config.yaml", words)


def test_a_run_record_says_what_the_run_reads(trained: Path) -> None:
    place = trained / "run" / "checkpoints" / "6"
    draft, run = read_draft_record(place), read_run_record(place)
    assert run.inputs.keys() == {"tokenizer", "data.train", "data.eval", "target"}
    assert draft.target_sha256 and run.inputs["target"].endswith(draft.target_sha256)


def other_tokens(target: Path) -> None:
    path = target / "tokenizer.json"
    tree = json.loads(path.read_text())
    words = tree["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    path.write_text(json.dumps(tree))


@pytest.mark.pitfall(
    "resumed with other data, weights, tokens or another template",
    seen="cli/loading.py: not compared",
)
@pytest.mark.parametrize(
    ("change", "named"), [(other_weights, "the target"), (other_tokens, "the tokenizer")]
)
def test_a_draft_is_not_used_with_another_target(
    place: Path, domino: Any, change: Callable[[Path], Any], named: str
) -> None:
    draft = load_draft(place / "run", reporter=quiet())
    record = draft.record
    target = place / "target"
    hashes = target_fingerprint(target), tokenizer_fingerprint(target, load_tokenizer(target))
    assert hashes == (record.target_sha256, record.tokenizer_sha256)
    save_draft(place / "alone", draft.params, dataclasses.replace(record, target=str(target)))
    change(place if change is other_weights else target)
    code, _, errors = domino("generate", place / "alone", "a", "--max-new-tokens", 2)
    assert code == 2 and f"{named} has changed since" in errors.splitlines()[-1], errors
