"""A target read straight into the parts of a mesh: the whole's values, read once, little memory."""

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from copies import edited
from jax.sharding import Mesh
from safetensors.numpy import load_file, save_file
from tiny import stack_layers

from domino_jax.base.errors import InputError
from domino_jax.config.model import DecoderConfig
from domino_jax.formats.safetensors import StoredTensor
from domino_jax.sharding import MESH_AXES, make_mesh, parameter_shardings
from domino_jax.target.decoder import Target
from domino_jax.target.decoder_keys import read_decoder_config
from domino_jax.target.load import (
    TABLES,
    LoadedTarget,
    expected_tensors,
    load_sharded_target,
    load_target,
)

MESHES = {
    "one device": lambda: Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), MESH_AXES),
    "fsdp 8": lambda: make_mesh(data=1, fsdp=8),
    "replicas": lambda: make_mesh(data=8),
    "each 2": lambda: make_mesh(data=2, fsdp=2, tensor=2),
}
KINDS = [("llama", True), ("qwen2", True), ("qwen3", False), ("qwen3_moe", False)]
NORM = "model.layers.3.input_layernorm.weight"


def scanned(directory: Path, *, dtype: str = "float32", depth: int | None = None) -> Target:
    return Target(read_decoder_config(directory, dtype=dtype), depth=depth, scan_layers=True)


def expected_params(directory: Path, *, dtype: str = "float32", depth: int = 4) -> Any:
    """What `load_target` reads, its first layers stacked."""
    params = load_target(directory, dtype=dtype).params
    cut = {f"layers_{index}" for index in range(depth, 4)}
    return stack_layers({name: leaf for name, leaf in params.items() if name not in cut})


def split_in_files(source: Path, directory: Path, *, dtype: Any = np.float32) -> Path:
    """The same model as shards with their index, in another type."""
    tensors = {name: x.astype(dtype) for name, x in load_file(source / "model.safetensors").items()}
    places = {name: f"model-{number % 3}.safetensors" for number, name in enumerate(tensors)}
    for place in set(places.values()):
        held = {name: x for name, x in tensors.items() if places[name] == place}
        save_file(held, directory / place)
    index = {"metadata": {}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text((source / "config.json").read_text())
    return directory


def assert_same(loaded: LoadedTarget, expected: Any, model: Target, mesh: Mesh) -> None:
    chex.assert_trees_all_equal(jax.device_get(loaded.params), jax.device_get(expected))
    chex.assert_trees_all_equal_dtypes(loaded.params, expected)
    boxed = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 1), np.int32))["params"]
    assert jax.tree.map(lambda x: x.sharding, loaded.params) == parameter_shardings(boxed, mesh)


@pytest.mark.parametrize(
    ("kind", "tied", "mesh"),
    [(*kind, "each 2") for kind in KINDS] + [(*KINDS[-1], mesh) for mesh in list(MESHES)[:-1]],
)
def test_load_sharded_target_equals_the_whole(
    tiny: Callable[..., Any], kind: str, tied: bool, mesh: str
) -> None:
    directory, devices = tiny(kind, tied=tied).directory, MESHES[mesh]()
    model = scanned(directory)
    loaded = load_sharded_target(directory, model, devices)
    assert (loaded.path, loaded.config) == (directory, model.cfg)
    assert_same(loaded, expected_params(directory), model, devices)


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [(np.float16, "float32"), (ml_dtypes.bfloat16, "float32"), (np.float32, "bfloat16")],
)
def test_load_sharded_target_reads_shards_of_any_type(
    tiny: Callable[..., Any], tmp_path: Path, stored: Any, dtype: str
) -> None:
    single = tiny("qwen3_moe", tied=False).directory
    directory = split_in_files(single, tmp_path, dtype=stored)
    tensors = load_file(single / "model.safetensors")
    mesh, model = make_mesh(data=2, fsdp=2, tensor=2), scanned(directory, dtype=dtype, depth=2)
    loaded = load_sharded_target(directory, model, mesh)
    assert_same(loaded, expected_params(directory, dtype=dtype, depth=2), model, mesh)
    # From the file itself, as JAX rounds it.
    expert = tensors["model.layers.1.mlp.experts.5.up_proj.weight"].astype(stored)
    found = loaded.params["layers"]["layer"]["mlp"]["experts"]["up_proj"][1, 5]
    np.testing.assert_array_equal(found, jnp.asarray(expert, dtype))


def test_load_sharded_target_reads_layers_apart(tiny: Callable[..., Any]) -> None:
    directory, mesh = tiny("qwen3", tied=False).directory, make_mesh(data=1, fsdp=8)
    model = Target(read_decoder_config(directory, dtype="float32"))
    wanted = {("norm", "weight"), ("layers_3", "mlp", "up_proj", "weight")}
    params = load_sharded_target(directory, model, mesh, only=wanted.__contains__).params
    whole = load_target(directory).params
    assert params["layers_3"]["mlp"]["up_proj"]["weight"].addressable_data(0).shape == (64, 4)
    layer = {"mlp": {"up_proj": whole["layers_3"]["mlp"]["up_proj"]}}
    expected = {"norm": whole["norm"], "layers_3": layer}
    chex.assert_trees_all_equal(jax.device_get(params), jax.device_get(expected))


@pytest.fixture
def numbers_read(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How many numbers of each stored tensor were read."""
    read, counts = StoredTensor.read, Counter[str]()

    def counted(tensor: StoredTensor, part: tuple[slice, ...] = ()) -> np.ndarray:
        values = read(tensor, part)
        counts[tensor.name] += values.size
        return values

    monkeypatch.setattr(StoredTensor, "read", counted)
    yield counts


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("depth", [2, 4])
def test_load_sharded_target_reads_each_number_once_and_no_further_layer(
    tiny: Callable[..., Any], numbers_read: Counter[str], mesh: str, depth: int
) -> None:
    directory = tiny("qwen3_moe", tied=False).directory
    load_sharded_target(directory, scanned(directory, depth=depth), MESHES[mesh]())
    sizes = {name: x.size for name, x in load_file(directory / "model.safetensors").items()}
    run = {name for name in sizes if not re.search(r"layers\.[2-9]", name) or depth == 4}
    assert numbers_read == {name: sizes[name] for name in run}


def test_load_sharded_target_reads_tables_alone(
    tiny: Callable[..., Any], numbers_read: Counter[str]
) -> None:
    for tied, names in ((True, ("embed_tokens",)), (False, TABLES)):
        directory, mesh = tiny("llama", tied=tied).directory, make_mesh(data=2, fsdp=4)
        numbers_read.clear()
        model = scanned(directory)
        loaded = load_sharded_target(directory, model, mesh, only=lambda path: path[0] in TABLES)
        assert set(loaded.params) == set(names)
        assert sum(numbers_read.values()) == 352 * 32 * len(names)


@pytest.mark.parametrize("only", [lambda path: True, lambda path: path[0] in TABLES])
def test_load_sharded_target_refuses_a_missing_tensor_before_it_reads(
    llama: Path, tmp_path: Path, numbers_read: Counter[str], only: Any
) -> None:
    """Of a layer that does not run; `open_target` refuses all else as for `load_target`."""
    directory = edited(llama, tmp_path, tensors=lambda a: {k: a[k] for k in a if k != NORM})
    model, mesh = scanned(directory, depth=2), make_mesh(data=1, fsdp=8)
    with pytest.raises(InputError, match=f"missing tensor: {NORM}; expected 38, found 37"):
        load_sharded_target(directory, model, mesh, only=only)
    assert not numbers_read


# 4.06 GB in bfloat16, its largest stacked parameters 0.94 GB each.
LARGE = DecoderConfig(
    vocab_size=65536,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=4096,
    dtype="bfloat16",
)
LOADING = """
import json, sys
import jax
from domino_jax.sharding import make_mesh
from domino_jax.target.decoder_keys import read_decoder_config
from domino_jax.target.load import load_sharded_target
from domino_jax.target.decoder import Target

directory = sys.argv[1]
model = Target(read_decoder_config(directory, dtype="bfloat16"), scan_layers=True)
params = jax.tree.leaves(load_sharded_target(directory, model, make_mesh(data=1, fsdp=8)).params)
held = [0] * 8
for leaf in params:
    for shard in leaf.addressable_shards:
        held[shard.device.id] += shard.data.nbytes
print(json.dumps({"held": held, "whole": sum(leaf.nbytes for leaf in params)}), flush=True)
"""


def write_large_target(directory: Path, *, file_bytes: int = 10**9) -> None:
    """Random bfloat16 weights in several files with their index."""
    generator = np.random.default_rng(0)
    fields = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")
    fields += ("num_attention_heads", "num_key_value_heads", "max_position_embeddings")
    tree = {"model_type": "llama", "rms_norm_eps": LARGE.rms_norm_eps}
    tree |= {name: getattr(LARGE, name) for name in fields}
    (directory / "config.json").write_text(json.dumps(tree))
    held: dict[str, np.ndarray] = {}
    places: dict[str, str] = {}

    def write() -> None:
        place = f"model-{len(set(places.values())):05d}.safetensors"
        save_file(held, directory / place)
        places.update(dict.fromkeys(held, place))
        held.clear()

    for name, shape in expected_tensors(LARGE).values():
        # Bits of finite numbers below 2.
        bits = generator.integers(0, 0x4000, shape, np.uint16)
        held[name] = bits.view(ml_dtypes.bfloat16)
        if sum(x.nbytes for x in held.values()) > file_bytes:
            write()
    write()
    index = {"metadata": {}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def own_memory(process: int) -> int:
    """Bytes of a process in memory that are no mapped file: those are the page cache's to drop."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads Linux's /proc")
def test_the_host_holds_little_more_than_the_shards(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    try:
        write_large_target(tmp_path)
        assert len(list(tmp_path.glob("*.safetensors"))) > 3
        flags = "--xla_force_host_platform_device_count=8"
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        command = [sys.executable, "-c", LOADING, str(tmp_path)]
        peak, began = 0, time.monotonic()
        pipe = subprocess.PIPE
        with subprocess.Popen(command, env=environment, stdout=pipe, text=True) as loading:
            # From outside: the loading process would look at itself only between two reads.
            while loading.poll() is None:
                peak = max(peak, own_memory(loading.pid))
                time.sleep(0.002)
            assert loading.stdout is not None
            told = json.loads(loading.stdout.read())
        assert loading.returncode == 0
    finally:
        for path in tmp_path.glob("*.safetensors"):
            path.unlink()
    above = peak - sum(told["held"])
    figures = f"{above / 1e9:.2f} GB above {sum(told['held']) / 1e9:.2f} GB of shards"
    record_property("host_memory", figures)
    print(f"{figures}, {time.monotonic() - began:.0f} s")
    assert told["whole"] > 4e9
    # A norm of every layer is replicated; the rest is split evenly.
    assert max(told["held"]) < told["whole"] / 8 + 1e6
    assert above < 1.5e9
