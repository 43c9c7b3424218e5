"""The runs of the experiment: each is a configuration that trains, on answers that are there."""

from pathlib import Path

import experiment_runs as experiment
import pytest

from domino_jax.base.files import write_json
from domino_jax.config.run import load_config

TOP = Path(experiment.__file__).parents[2]
RUNS = [*experiment.trainings(), *experiment.trials()]


@pytest.mark.parametrize("training", RUNS, ids=lambda training: training.name)
def test_every_run_is_a_configuration(training: experiment.Training) -> None:
    answers = experiment.ANSWERS / f"train-{training.size}.jsonl.gz"
    words = [f"data.train={answers}", f"run_dir={training.directory}", *training.overrides]
    config = load_config(TOP / experiment.CONFIG, words)
    # Nothing but what it says differs from the run that it is compared with.
    base = experiment.TRIAL_BASE if training.name.startswith("trial-") else ()
    plain = load_config(TOP / experiment.CONFIG, [*words[:2], *base])
    assert (config == plain) == (training.overrides in (base, ("seed=0",)))
    assert (TOP / answers).is_file()


def test_runs_have_names_of_their_own_and_sets_that_are_there() -> None:
    names = [training.name for training in RUNS]
    assert len(set(names)) == len(names)
    assert all((TOP / path).is_file() for path in experiment.SETS)


def test_a_record_holds_the_evaluation_without_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(TOP)
    monkeypatch.setattr(experiment, "WORK", tmp_path)
    training = next(experiment.trials())
    training.directory.mkdir()
    sets = {"everyday": {"prompts": 80, "examples": [{"prompt": "a", "pieces": []}]}}
    write_json(training.directory / "evaluation.json", {"cycle": None, "sets": sets})
    record = experiment.record(training)
    assert record["sets"] == {"everyday": {"prompts": 80}} and record["cycle"] is None
    names = ("name", "size", "overrides")
    assert record["run"] == {name: getattr(training, name) for name in names}
    assert set(record["data"]) == {"lines", "answer_tokens", "unpacked_sha256"}
