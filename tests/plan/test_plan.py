"""Plans: the search, the file, the table, the command, and what a compiled step must not hold.

What needs a compiler is skipped where its wheel is not installed; the reason names the extra.
"""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from availability import require_compiler
from doubles import slow_after
from rich.console import Console
from tiny import quiet, run_config, write_target

from domino_jax.base.errors import InputError
from domino_jax.base.files import write_json
from domino_jax.base.scopes import HEAD, STAGES, VOCABULARY_LOSS, stage_of
from domino_jax.config.draft import make_draft_config
from domino_jax.config.model import DecoderConfig
from domino_jax.config.run import load_config
from domino_jax.plan import hlo
from domino_jax.plan import plan as plan_module
from domino_jax.plan.plan import (
    Exchange,
    Outcome,
    Plan,
    compile_step,
    largest_batch,
    plan,
    read_plan,
    unknown_trip_count,
)
from domino_jax.plan.table import plan_table
from domino_jax.plan.topology import compiler_for, parse_device_spec
from domino_jax.training.prepare import Models, abstract_step, read_models

MADE = Plan(
    spec="v5e:2x2",
    device_kind="TPU v5e",
    devices=4,
    mesh={"data": 1, "fsdp": 4, "tensor": 1},
    batch_size=8,
    grad_accumulation=2,
    memory_bytes=16 * 2**30,
    fits=True,
    peak_bytes=3 * 2**30,
    argument_bytes=2**30,
    refusal=None,
    exchanges={"all-gather": Exchange(34, 34 * 2**20, largest=2**20, largest_in_loop=2**20)},
    buffers=(hlo.Buffer(2**30, "f32[16384,16384]", "target/mlp"),),
    bytes_moved=820 * 10**9,
    useful_flops={"target": 100e12},
    executed_flops={"target": 150e12, "other": 1e12},
    float32_flops=0.0,
    seconds_of_flops=0.19,
    seconds_of_bytes=1.0,
    compile_seconds=12.0,
    compiler="jax 1, libtpu 1",
    date="2026-11-24",
)
REFUSED = dataclasses.replace(
    MADE,
    spec="v5e:2x4",
    fits=False,
    peak_bytes=None,
    argument_bytes=None,
    refusal="RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
    "temporaries (20.50G) exceeds available HBM (15.75G).",
    exchanges={},
    buffers=(),
    bytes_moved=None,
    seconds_of_bytes=None,
)


def test_a_plan_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    for one in (MADE, REFUSED):
        write_json(tmp_path / "plan.json", dataclasses.asdict(one))
        assert read_plan(tmp_path / "plan.json") == one
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_a_changed_plan_is_not_used(tmp_path: Path) -> None:
    place = tmp_path / "plan.json"
    write_json(place, dataclasses.asdict(MADE))
    text = place.read_text()
    place.write_text(text.replace('"fits": true', '"fits": false'))
    with pytest.raises(InputError, match=r"plan\.json: changed .*; not used"):
        read_plan(place)
    for change in ({"exchanges": []}, {"buffers": [1]}, {"more": 1}):
        write_json(place, dataclasses.asdict(MADE) | change)
        with pytest.raises(InputError, match=r"plan\.json: not a plan of this version"):
            read_plan(place)


def test_a_refusal_tells_what_was_needed() -> None:
    assert REFUSED.needed_bytes == int(20.5 * 2**30)
    assert MADE.needed_bytes == MADE.peak_bytes
    assert dataclasses.replace(REFUSED, refusal="RESOURCE_EXHAUSTED").needed_bytes is None


def test_the_table_has_a_column_for_each_place() -> None:
    console = Console(width=140)
    with console.capture() as shown:
        console.print(plan_table([MADE, REFUSED]))
    rows = [line.split("│") for line in shown.get().splitlines() if "│" in line]
    lines = {name.strip(): rest for _, name, *rest in rows}

    def cells(name: str) -> list[str]:
        return [cell.strip() for cell in lines[name][:2]]

    assert cells("fits") == ["yes", "NO"]
    assert cells("peak memory of published") == [
        "3.00 GiB of 16.00 GiB",
        "20.50 GiB of 16.00 GiB, refused by the compiler",
    ]
    assert cells("all-gather") == ["34 x, 34.0 MiB; in loops 1.0 MiB each at most", "-"]
    assert cells("TFLOP useful / executed")[0] == "100.00 / 151.00"
    assert cells("bound by bytes") == ["1000 ms (763.68 GiB)", "-"]
    assert cells("largest buffers") == ["1.00 GiB f32[16384,16384] target/mlp", "-"]
    assert "launches, at most" not in lines


def test_the_table_shows_names_as_they_are() -> None:
    buffers = (hlo.Buffer(2**30, "f32[a]", "[/bold]:smile:\x1b[2J"),)
    odd = dataclasses.replace(MADE, spec="[/red]", device_kind="[b]", buffers=buffers)
    console = Console(width=140)
    with console.capture() as shown:
        console.print(plan_table([odd]))
    for name in ("[/red]", "4 x [b]", r"f32[a] [/bold]:smile:\x1b[2J"):
        assert name in shown.get()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans of this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A run of the toy target, of which nothing but config.json and the tokenizer is left."""
    target = write_target(tmp_path / "target")
    (target / "model.safetensors").unlink()
    path = run_config(tmp_path, target, dtype="bfloat16")
    (tmp_path / "rows.jsonl").unlink()
    return path


def test_the_command_plans_and_keeps_the_plan(domino, config: Path) -> None:
    spec = "h100:1"
    require_compiler(spec)
    file = config.parent / "plans.json"
    code, out, log = domino("plan", config, "--on", spec, "--json", file)
    assert code == 0 and "yes" in out and out.endswith(f"{file}\n")
    assert f"compiling for {spec}, batch 8\n" in log
    (made,) = json.loads(file.read_text())
    assert made["fits"] and 0 < made["argument_bytes"] < made["peak_bytes"] < 2**30
    assert made["launches"] > 0
    code, _, log = domino("plan", config, "--on", spec, "--json", file)
    assert code == 0 and "planned before" in log and "compiling" not in log
    assert json.loads(file.read_text()) == [made | {"cached": True}]


@pytest.mark.parametrize(
    ("spec", "words", "message"),
    [
        ("v9:2x2", (), "--on 'v9:2x2': expected v4:AxBxC"),
        ("v5e:2x2", ("--json", "nowhere/a"), "--json nowhere/a: no directory nowhere; make it"),
        ("v5e:2x2", ("mesh.data=3",), "mesh: mesh data=3"),
        ("h100:1", ("target=nowhere",), "nowhere: no such directory"),
        ("v5e:2x2", ("data.batch_size=6",), "data.batch_size 6 must be a multiple of 4, the parts"),
        ("v5e:3x5", (), "--on v5e:3x5: no such topology: "),
    ],
)
def test_bad_input_is_one_line(
    domino, config: Path, spec: str, words: tuple[str, ...], message: str
) -> None:
    if spec != "v9:2x2":
        require_compiler(spec)
    code, _, log = domino("plan", config, "--on", spec, *words)
    assert code == 2 and log.splitlines()[-1].startswith(f"error: {message}")


@pytest.mark.slow
def test_what_does_not_fit_is_exit_code_1(domino, config: Path) -> None:
    require_compiler("v5e:2x2")
    words = ("data.batch_size=4194304", "data.max_length=1024")
    code, out, _ = domino("plan", config, "--on", "v5e:2x2", *words)
    assert code == 1 and "NO" in out and "refused by the compiler" in " ".join(out.split())
    assert "v5e:2x2: the compiler refused: RESOURCE_EXHAUSTED: " in out
    assert "more of 16.00 GiB" not in out  # what it said was understood


def test_the_command_says_where_no_batch_fits(domino, config: Path) -> None:
    require_compiler("v5e:2x2")
    described = config.parent / "target" / "config.json"
    wide = json.loads(described.read_text()) | {"intermediate_size": 2**22}
    described.write_text(json.dumps(wide))
    words = ("data.max_length=1024", "data.batch_size=4", "--largest-batch")
    code, out, log = domino("plan", config, "--on", "v5e:2x2", *words)
    assert code == 1 and out.endswith("v5e:2x2: largest data.batch_size that fits: none\n")
    assert "v5e:2x2: batch 4 does not fit\n" in log


# A small step in the proportions of a real one: the vocabulary is wide, and no two sizes are equal.
SMALL = DecoderConfig(
    vocab_size=8192,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=1024,
    qk_norm=True,
    dtype="bfloat16",
)
SMALL_HEAD = SMALL.vocab_size * SMALL.hidden_size * 2
SMALL_BOUND = SMALL_HEAD // 16  # as 64 MiB are to the head of Qwen3-8B


@pytest.mark.parametrize("first", [4, 14, 160])
@pytest.mark.parametrize("most", [0, 4, 9, 28, 156, 160, 164])
def test_largest_batch_asks_for_no_size_twice(first: int, most: int) -> None:
    asked: list[int] = []

    def planned(rows: int) -> Plan:
        asked.append(rows)
        return dataclasses.replace(MADE, batch_size=rows, fits=rows <= most)

    found = largest_batch(first, planned, multiple_of=4)
    assert (found.batch_size, found.fits) == (most // 4 * 4 or 4, most >= 4)
    assert asked[0] == first // 4 * 4 and not [rows for rows in asked if rows % 4]
    assert len(set(asked)) == len(asked) <= 2 * math.log2(max(first, most) / 4 + 1) + 2


@pytest.mark.parametrize("spec", slow_after(1, ["v5e:2x2", "h100:4"]))
def test_a_small_step_holds_no_more_than_it_should(
    spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_compiler(spec)
    compiler = compiler_for(parse_device_spec(spec))
    length = 640
    sections = {
        "draft": {"emb_dim": 64, "gru_hidden_dim": 128, "block_size": 8, "mask_token_id": 2},
        "data": {"max_length": length, "batch_size": 4},
        "loss": {"num_anchors": 48, "logits_mib": 4.0},
        "mesh": {"fsdp": 4},
    }
    config = load_config(run_config(tmp_path, tmp_path, dtype="bfloat16", **sections))
    draft = make_draft_config(config.draft, SMALL, special_ids={}, dtype="bfloat16")
    abstract = abstract_step(config, Models(SMALL, draft), compiler.devices)
    outcomes = []

    def compiled(*arguments: Any) -> Outcome:
        outcomes.append(compile_step(*arguments))
        return outcomes[0]

    monkeypatch.setattr(plan_module, "compile_step", compiled)
    made = plan(abstract, compiler, cache=tmp_path, reporter=quiet())
    assert made.fits and 0 < made.argument_bytes < made.peak_bytes < 2**30
    assert set(made.useful_flops) == set(STAGES) - {"update"}
    assert all(made.executed_flops[stage] >= size for stage, size in made.useful_flops.items())
    assert (made.launches is None) == compiler.spec.is_tpu

    trip_count = unknown_trip_count(abstract)
    assert trip_count > 1  # there is a loop to stay out of
    program = hlo.read_program(outcomes[0].text, unknown_trip_count=trip_count)
    found = hlo.collectives(program)
    heads = [one for one in found if one.kind == "all-gather" and SMALL_HEAD in one.arrays]
    assert [(one.times, one.loop) for one in heads] == [(1, None)]
    large = [one for one in found if one.loop and one.bytes > SMALL_BOUND]
    stages = {stage_of(path) for one in large for path in (one.loop or "", one.path)}
    assert not stages & {HEAD, VOCABULARY_LOSS}, large

    buffers = hlo.largest_buffers(program, 10**6)
    scores = re.compile(rf"f32\[([\d,]*,)?{length},{length}\]")
    assert not [one for one in buffers if scores.fullmatch(one.shape)]

    if not compiler.spec.is_tpu:
        # A GPU stands still where a loop asks whether to go on: the loss's pieces alone do.
        visited = [visit.computation.operations.values() for visit in program.visits]
        loops = [one for operations in visited for one in operations if one.opcode == "while"]
        waiting = [one for one in loops if "known_trip_count" not in one.attributes]
        assert len(loops) > 2 and {stage_of(one.path) for one in waiting} == {VOCABULARY_LOSS}

    assert made.float32_flops <= sum(made.executed_flops.values()) / 1000


NODE = ("mesh.fsdp=8", "data.batch_size=16", "optimizer.grad_accumulation=1")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "words", "gib"),
    [
        ("v5p:2x2x2", NODE, 16),
        ("v6e:2x4", NODE, 32),
        ("h100:1", ("data.batch_size=1", "optimizer.grad_accumulation=1"), 34),
    ],
)
def test_the_published_recipe_fits(
    tmp_path: Path, spec: str, words: tuple[str, ...], gib: int
) -> None:
    require_compiler(spec)
    tree = {"model_type": "qwen3", "max_position_embeddings": 40960, "rms_norm_eps": 1e-6}
    tree |= {"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288}
    tree |= {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    tree |= {"num_hidden_layers": 36, "rope_theta": 1000000}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    path = Path(__file__).parents[2] / "configs/qwen3-8b.yaml"
    config = load_config(path, [*words, f"target={tmp_path}"])
    models = read_models(config, reporter=quiet())
    compiler = compiler_for(parse_device_spec(spec))
    step = abstract_step(config, models, compiler.devices)
    made = plan(step, compiler, cache=tmp_path / "plans", reporter=quiet())
    assert made.fits and made.refusal is None
    assert made.peak_bytes is not None and made.peak_bytes <= gib * 2**30
    assert made.launches is None if compiler.spec.is_tpu else made.launches <= 3000
    a_row = sum(made.useful_flops.values()) / config.data.batch_size
    assert a_row == pytest.approx(118e12, rel=0.02)  # counted by hand
    assert not [one for one in made.exchanges.values() if one.largest_in_loop > 64 * 2**20]
