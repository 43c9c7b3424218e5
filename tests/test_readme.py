"""The commands that README.md prints, run in their order and as printed, on one device."""

import json
import re
import shlex
from pathlib import Path

import pytest
from commands import run_commands
from tiny import MASK_TOKEN_ID, write_target

from domino_jax.config.run import dump_config, load_config

TOP = Path(__file__).parent.parent
# Begin of a command -> why it is not run here.
NOT_RUN = {
    "scripts/": "installs an environment and takes minutes; run by hand and by the build server",
    "domino plan": "needs the compilers of the extras, and minutes; tests/plan runs it",
    "pip install": "these tests run in an environment that is installed already",
    ".venv/bin/python scripts/bench/benchmark_": "measures for minutes on a quiet machine",
    "domino train configs/smollm2-demo.yaml": "needs SmolLM2 and what scripts/demo left",
}
# What makes the published configuration one for the toy target.
TOY = (
    "draft.num_hidden_layers=1",
    "draft.target_layer_ids=[0,2]",
    "draft.block_size=4",
    f"draft.mask_token_id={MASK_TOKEN_ID}",
    "draft.emb_dim=8",
    "draft.gru_hidden_dim=8",
    "data.max_length=96",
    "loss.num_anchors=4",
    "dtype=float32",  # a CPU takes ten times as long for bfloat16
)


def printed_commands(text: str) -> list[str]:
    """The lines of the fenced blocks, without comments."""
    blocks = re.findall(r"^```\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    lines = [shlex.join(shlex.split(line, comments=True)) for line in "".join(blocks).splitlines()]
    return [line for line in lines if line]


def test_every_printed_command_runs_in_order(tmp_path: Path) -> None:
    commands = printed_commands((TOP / "README.md").read_text(encoding="utf-8"))
    assert all(any(command.startswith(begin) for command in commands) for begin in NOT_RUN)
    commands = [command for command in commands if not command.startswith(tuple(NOT_RUN))]
    # Few prompts and short answers; all else is as printed.
    for printed, toy in (("--count 20000", "--count 20"), ("-tokens 3072", "-tokens 64")):
        assert sum(printed in command for command in commands) == 1
        commands = [command.replace(printed, toy) for command in commands]
    verbs = [shlex.split(command)[:2] for command in commands]
    assert all(name == "domino" for name, _ in verbs)
    used = {"prompts", "regenerate", "train", "capture", "evaluate", "generate", "export", "import"}
    assert used <= {verb for _, verb in verbs}

    target = write_target(tmp_path / "DIR") / "config.json"
    settings = json.loads(target.read_text()) | {"max_position_embeddings": 512}
    target.write_text(json.dumps(settings))
    (tmp_path / "configs").mkdir()
    config = load_config(TOP / "configs/qwen3-8b.yaml", TOY)
    (tmp_path / "configs/qwen3-8b.yaml").write_text(dump_config(config))

    told = run_commands(map(shlex.split, commands), tmp_path)
    assert [code for code, _, _ in told] == [0] * len(commands), list(
        zip(commands, told, strict=True)
    )

    logs = dict(zip(commands, (log for _, _, log in told), strict=True))
    _, *answers = map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines())
    cut = sum(answer["finish_reason"] == "length" for answer in answers)
    assert cut
    regenerated = next(log for command, log in logs.items() if " regenerate " in command)
    assert f"{cut} of 20 answers ({cut / 20:.0%}) were cut at 64 tokens" in regenerated
    trained = next(log for command, log in logs.items() if "data.train=answers.jsonl" in command)
    assert f"answers.jsonl: {cut} of 20 lines ({cut / 20:.0%}) end with an unfinished" in trained
    assert (tmp_path / "runs/qwen3-8b/evaluation.json").is_file()
    assert (tmp_path / "runs/other/checkpoints").is_dir()


@pytest.mark.parametrize(
    "path", sorted((TOP / "configs").glob("*.yaml")), ids=lambda path: path.stem
)
def test_a_configuration_runs_on_one_device_as_it_stands(path: Path) -> None:
    config = load_config(path)
    assert config.mesh.data in (-1, 1) and config.mesh.fsdp == config.mesh.tensor == 1
    if "qwen3" in path.stem:
        assert config.data.eval is None
        (words,) = re.findall(r"domino train \S+ (mesh\.fsdp=8 .*)", path.read_text())
        node = load_config(path, words.split())
        assert node.mesh.fsdp == 8 and node.data.batch_size % 8 == 0
        for published in (config, node):
            assert published.data.batch_size * published.optimizer.grad_accumulation == 16
