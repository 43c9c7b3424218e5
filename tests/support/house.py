"""The layers of the package: which file may import which, who names mesh axes and sections."""

import ast
import dataclasses
import re
import typing
from collections.abc import Iterator
from pathlib import Path

from domino_jax.config.run import RunConfig

TOP = Path(__file__).parents[2]
PACKAGE = TOP / "domino_jax"
# Folders of tests that mirror no folder of the package.
OTHER_TESTS = {"accelerator", "parity", "scripts"}

# Rank, folder, files. A file imports lower ranks and the files before it in its own row.
# Change this table when the design changes, never to make an import pass.
TABLE = (
    (0, "base", "escapes errors parse files output_paths lock finite marks progress chips"),
    (0, "base", "user_cache scopes"),
    (0.2, "config", "sizes schema heads model draft sections run"),
    (0.3, "", "sharding processes"),
    (1, "kernels", "causal_attention kv_cache matmul argmax softmax operands"),
    (1, "kernels", "block_attention_xla tpu_tiles block_attention_pallas_tpu block_attention"),
    (1, "kernels", "token_loss chunked_cross_entropy"),
    (1.5, "layers", "dense norm rotary attention"),
    (1.5, "formats", "safetensors rope_keys gguf gguf_tokenizer"),
    (2, "data", "renderer rendering template forms prefix_tokens prompt reading answer"),
    (2, "data", "conversations packing pipeline hidden_states"),
    (2, "target", "moe decoder decoder_keys tokens load gguf resolve fingerprint"),
    (2, "draft", "blocks mask head backbone build"),
    (2.5, "interop", "hf_config hf start engines"),
    (2.7, "decoding", "filters acceptance decoder speculate generate"),
    (2.8, "objective", "curriculum loss objectives metrics modules"),
    (2.9, "evaluation", "bootstrap counts compare prompt_lookup throughput replay evaluate timing"),
    (2.9, "evaluation", "answer_cache record responses servers endpoint"),
    (3, "training", "flops checkpoint_names log metrics accumulator optimizer step program"),
    (3, "training", "records checkpoint run_directory inputs run start preflight prepare rollout"),
    (3, "training", "preview skips speed trace eval loop"),
    (3.2, "datagen", "batch_log prompts regenerate capture"),
    (3.5, "plan", "hlo jaxpr_flops topology plan table"),
    (4, "page", "sources terminal growth cells verdict tables charts pictures notes document"),
    (
        5,
        "cli",
        "interrupts options shared loading config data train plan decode measurement evaluate",
    ),
    (5, "cli", "report checkpoint verbs"),
    (6, "", "__main__"),
)
# The package's `__init__` gathers the public names of ranks 0 to 3; a folder's `__init__` is the
# last file of its row.
RANK_OF_TOP = 3.4
ROWS: dict[tuple[float, str], list[str]] = {}
for _rank, _folder, _names in TABLE:
    ROWS.setdefault((_rank, _folder), []).extend(_names.split())
PLACES = {"": (RANK_OF_TOP, "top", 0)} | {
    f"{folder}.{name}".strip("."): (rank, f"{rank}/{folder}", order)
    for (rank, folder), names in ROWS.items()
    for order, name in enumerate((*names, "") if folder else names)
}
# References and tools of the tests: running the product needs none of them.
TEST_ONLY = {"torch", "nemo_automodel", "dflash", "chex", "pytest", "hypothesis"}
# Of processes that answer before jax is there, or must not hold a part of the device themselves.
WITHOUT_JAX = {
    *(f"base.{name}" for name in ("escapes", "errors", "parse", "files", "output_paths", "lock")),
    *(f"base.{name}" for name in ("finite", "marks", "progress", "chips", "user_cache", "scopes")),
    "processes",
    *(f"config.{name}" for name in ("schema", "sizes", "heads", "model", "draft", "sections")),
    "config.run",
    "training.flops",
    "training.log",
    "training.checkpoint_names",
    *(f"page.{name}" for name in ("sources", "growth", "cells", "verdict", "tables", "charts")),
    *(f"page.{name}" for name in ("pictures", "notes", "document")),
}
MESH_AXES = {"fsdp", "tensor"}
# A function that takes a whole configuration does not show which values it depends on: only where a
# run is prepared may a module import a section, or have a parameter of one.
KNOW_SECTIONS = ("config", "cli", "training.prepare")
_HINTS = typing.get_type_hints(RunConfig).values()
SECTIONS = {hint.__name__ for hint in (RunConfig, *_HINTS) if dataclasses.is_dataclass(hint)}
_MAKERS = {"load_config", "dump_config", "make_draft_config"}
# A module of sections as a whole, or what makes or takes a section; constants are free.
_SECTION_IMPORT = re.compile(
    r"domino_jax\.config|"
    rf"domino_jax\.config\.(run|sections|draft)(\.({'|'.join(SECTIONS | _MAKERS)}|\*))?"
)


def public_modules() -> dict[str, str]:
    """Public name -> its module below the package, as `__init__.pyi` lists them, each once."""
    found: dict[str, str] = {}
    for node in ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            assert node.level == 1 and node.module
            for alias in node.names:
                assert alias.asname == alias.name and alias.name not in found
                found[alias.name] = node.module
    return found


def module_name(path: Path, package: Path = PACKAGE) -> str:
    """`domino_jax/draft/mask.py` -> `draft.mask`; a folder's `__init__.py` is the folder.

    The package's own `__init__.py` is "".
    """
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports(source: str, module: str) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of every import, at any depth, `from` names included."""
    # Any file under a folder lies beside the folder's own `__init__`, so a folder counts itself for
    # relative imports.
    folders = {folder for _, folder in ROWS}
    package = ["domino_jax", *module.split(".")] if module else ["domino_jax"]
    if module not in folders:
        package = package[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (base, node.module) if part)
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def place_of(name: str) -> tuple[float, str, int] | None:
    """Where the table puts `domino_jax.draft.mask.layer_spans`: its longest known prefix.

    None for a name of another package.
    """
    parts = name.split(".")
    if parts[0] != "domino_jax":
        return None
    # Two parts below the package name a file at most; what follows is a name inside it.
    known = [".".join(parts[1:end]) for end in (3, 2, 1) if ".".join(parts[1:end]) in PLACES]
    return PLACES[known[0]]


def wrong_imports(source: str, module: str) -> list[str]:
    """Imports of something that does not stand below the module, and of test tools."""
    rank, row, order = PLACES[module]
    found = []
    for line, name in imports(source, module):
        if name.split(".")[0] in TEST_ONLY:
            found.append(f"{module}:{line}: imports {name}, which only tests may need")
        if module in WITHOUT_JAX and name.split(".")[0] in ("jax", "flax"):
            found.append(f"{module}:{line}: imports {name}; it is read without jax")
        target = place_of(name)
        if target and not (target[0] < rank or (target[1] == row and target[2] < order)):
            found.append(f"{module}:{line}: imports {name}, which does not stand below it")
    return found


def mesh_axis_names(source: str, module: str) -> list[str]:
    """Mesh axes named outside the two files that define them."""
    if module in ("sharding", "config.sections"):
        return []
    return [
        f"{module}:{node.lineno}: names the mesh axis {node.value!r}; use logical axes"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and node.value in MESH_AXES
    ]


def sections_elsewhere(source: str, module: str) -> list[str]:
    """Imports and parameters of sections outside the modules that may know them."""
    if module.startswith(KNOW_SECTIONS):
        return []
    found = [
        f"{module}:{line}: imports {name}"
        for line, name in imports(source, module)
        if _SECTION_IMPORT.fullmatch(name)
    ]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            # Quoted annotations included.
            names = set(re.findall(r"\w+", ast.unparse(node.annotation))) & SECTIONS
            found += [f"{module}:{node.lineno}: takes {name}" for name in sorted(names)]
    return found


CHECKS = (wrong_imports, mesh_axis_names, sections_elsewhere)


def complaints(path: Path, package: Path = PACKAGE) -> list[str]:
    """What is against the rules in a file of the package or of a copy of it."""
    module, source = module_name(path, package), path.read_text(encoding="utf-8")
    if module not in PLACES:
        return [f"{module}: not in the table"]
    return [complaint for check in CHECKS for complaint in check(source, module)]
