"""docs/library.md runs as it stands, and its table has every public name."""

import re
from typing import Any

import chex
import jax
import numpy as np
import pytest
from documents import blocks, page, section
from house import public_modules
from tiny import CONFIG, write_target

import domino_jax

PAGE = page("docs/library.md")


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the page's blocks leave behind, run one after the other where `DIR` is a target."""
    directory = tmp_path_factory.mktemp("library")
    write_target(directory / "DIR")
    space: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        for body in blocks(PAGE, "python"):
            # One space for all, as a reader would paste them; the first names stay known by theirs.
            before = dict(space)
            exec(body, space)
            for name in ("states", "losses", "params"):
                if name in before and before[name] is not space[name]:
                    space[f"first_{name}"] = before[name]
    return space | {"directory": directory}


def test_a_draft_is_trained_on_arrays_and_exported(ran: dict[str, Any]) -> None:
    losses = ran["losses"]
    assert len(losses) == 5 and losses[-1] < 0.95 * losses[0]
    config, stored = domino_jax.load_hf_draft(ran["directory"] / "draft")
    assert config == ran["config"]
    rounded = jax.tree.map(lambda x: np.asarray(x, "bfloat16"), ran["first_params"])
    chex.assert_trees_all_equal(stored, jax.tree.map(np.float32, rounded))


def test_micro_batches_are_weighted_by_what_they_hold(ran: dict[str, Any]) -> None:
    means, total = ran["means"], ran["total"]
    assert total["batches"] == 2
    assert means["loss"] == pytest.approx(float(total["loss_sum"] / total["loss_weight"]), rel=1e-6)
    # The second is shorter: as a mean of means it would weigh as much as the first.
    second = ran["sums"]
    assert second["loss_weight"] < 0.4 * total["loss_weight"]
    assert float(second["loss_sum"] / second["loss_weight"]) != pytest.approx(means["loss"])


def test_a_target_decodes_with_the_draft(ran: dict[str, Any]) -> None:
    figures, answers = ran["figures"], ran["answers"]
    assert figures.comparison.lossless and figures.comparison.tokens_compared > 0
    assert len(answers) == 2 and all(len(answer.tokens) <= 16 for answer in answers)
    assert ran["target"].config == CONFIG


def test_states_of_a_target_fit_the_trainer(ran: dict[str, Any]) -> None:
    for name in ("states", "lm_head", "embed_tokens"):
        chex.assert_type(ran[name], np.float32)
    chex.assert_equal_shape([ran["states"], ran["first_states"]])
    chex.assert_shape([ran["lm_head"], ran["embed_tokens"]], (32, 16))


def test_the_table_has_every_public_name_and_its_file() -> None:
    table = section(PAGE, "Every public name")
    rows = re.findall(r"^\| `(\w+)` \| .+ \| `([\w/.]+)` \|$", table, flags=re.MULTILINE)
    expected = {name: f"{at.replace('.', '/')}.py" for name, at in public_modules().items()}
    assert dict(rows) == expected | {"__version__": "__init__.py"}
    assert len(rows) == len(domino_jax.__all__)
