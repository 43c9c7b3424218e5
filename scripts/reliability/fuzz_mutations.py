"""Bad inputs made from good ones: another kind of value, a key twice, a huge number, a flipped bit.

Purely random bytes are refused by the first line of any parser. What finds holes is an input that
is right but for one place, so every mutation starts from a valid one.
"""

import copy
import json
import random
import struct
from typing import Any

NUMBERS = (
    0, -1, 1, 2, 7, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**62, 2**63, 2**64, -(2**63),
    10**30, 10**63, 10**64,
)  # fmt: skip
FLOATS = (
    0.0, -0.0, 0.5, 1.0, 1.5, -1.0, 1e-6, 1e-30, 1e-300, 1e38, 1e39, 1e300,
    float("nan"), float("inf"), -float("inf"),
)  # fmt: skip
TEXTS = (
    "", " ", "x", "null", "true", "1", "1e-3", "nan", ".inf", "0x_", "010", "1:30", "2001-99-99",
    "2001-01-01", "~", "\0", "a\0b", "\ud800", "\x1b[31m", "a\nb", "\u202e", "../..", "/dev/zero",
    "/dev/stdin", "/proc/self/mem", "x" * 1000, "x" * 300_000, "[" * 3000, "{{ 'x' * 10 ** 10 }}",
    "full_attention", "bfloat16", "float64",
)  # fmt: skip
INSERTED = (b"\0", b"\xff", b"\xef\xbb\xbf", b"[" * 200, b"{", b"}", b'"', b"\n", b": ", b"&a *a ")


def odd_value(rng: random.Random) -> Any:
    """A value that may stand where another is expected."""
    kind = rng.randrange(7)
    if kind == 0:
        return rng.choice((None, True, False))
    if kind == 1:
        return rng.choice(NUMBERS)
    if kind == 2:
        return rng.choice(FLOATS)
    if kind == 3:
        return rng.choice(TEXTS)
    if kind == 4:
        return [odd_value(rng) for _ in range(rng.choice((0, 1, 1, 2, 5)))]
    if kind == 5:
        return {str(rng.choice(TEXTS[:20])): odd_value(rng) for _ in range(rng.choice((0, 1, 2)))}
    deep: Any = rng.choice((1, "x"))
    for _ in range(rng.choice((10, 63, 64, 65, 300))):
        deep = [deep] if rng.random() < 0.5 else {"a": deep}
    return deep


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything inside a tree."""
    found = [path] if path else []
    children = tree if isinstance(tree, dict) else {}
    if isinstance(tree, list):
        children = dict(enumerate(tree[:20]))
    for key, child in children.items():
        found += places(child, (*path, key))
    return found


def mutated_tree(rng: random.Random, tree: Any) -> Any:
    """A copy of a tree with a value, a key or a part of it changed."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2))):
        path = rng.choice(places(tree) or [()])
        if not path:
            return odd_value(rng)
        parent = _at(tree, path[:-1])
        key, action = path[-1], rng.randrange(10)
        old = parent[key]
        if action == 0:
            del parent[key]
        elif action == 1 and isinstance(parent, dict):
            parent[rng.choice((f"{key}x", key[:-1], str(rng.choice(TEXTS[:20]))))] = parent.pop(key)
        elif action == 2 and isinstance(old, int | float) and not isinstance(old, bool):
            near = (-old, old + 1, old - 1, old * 2, old * 1000, float(old), str(old), [old])
            parent[key] = rng.choice(near)
        elif action == 3 and isinstance(old, list) and old:
            parent[key] = rng.choice((old[:-1], old + old, old[::-1], old * 50, old[0]))
        else:
            parent[key] = odd_value(rng)
    return tree


def mutated_text(rng: random.Random, text: str) -> bytes:
    """Text of a file, damaged as text: cut, doubled, a character changed, other bytes put in."""
    return mutated_bytes(rng, text.encode("utf-8", "surrogatepass"))


def mutated_bytes(rng: random.Random, raw: bytes, *, head: int | None = None) -> bytes:
    """Bytes with a few places changed; with `head` they lie among the first so many."""
    raw, end = bytearray(raw), min(head or len(raw), len(raw))
    for _ in range(rng.choice((1, 1, 2, 5))):
        at, action = rng.randrange(max(end, 1)), rng.randrange(8)
        if action == 0:
            del raw[at:]
        elif action == 1 and raw:
            raw[min(at, len(raw) - 1)] ^= 1 << rng.randrange(8)
        elif action == 2:
            raw[at:at] = raw[at : at + rng.randrange(1, 60)]
        elif action == 3:
            del raw[at : at + rng.randrange(1, 20)]
        elif action == 4:
            raw[at:at] = rng.choice(INSERTED)
        elif action == 5:
            size = rng.choice((0, 1, 2**31, 2**32, 2**60, 2**63, 2**64 - 1))
            raw[at : at + 8] = struct.pack("<Q", size)
        elif action == 6:
            raw[at : at + 4] = struct.pack("<I", rng.choice((0, 1, 9, 2**16, 2**31, 2**32 - 1)))
        else:
            raw[at : at + rng.randrange(1, 40)] = rng.randbytes(rng.randrange(1, 40))
        end = min(end, len(raw))
    return bytes(raw)


def doubled_key(rng: random.Random, tree: Any) -> tuple[Any, str] | None:
    """A mapping of the tree written as JSON with one key twice; None where there is no key."""
    mappings = {path: _at(tree, path) for path in [(), *places(tree)]}
    holders = [path for path, held in mappings.items() if isinstance(held, dict) and held]
    if not holders:
        return None
    path = rng.choice(holders)
    key = rng.choice(list(mappings[path]))

    def written(value: Any, here: tuple[Any, ...]) -> str:
        if isinstance(value, dict):
            parts = [f"{json.dumps(k)}: {written(v, (*here, k))}" for k, v in value.items()]
            if here == path:
                again = rng.choice((0, 1, 2.5, "x", True, None))
                parts.append(f"{json.dumps(key)}: {json.dumps(again)}")
            return "{" + ", ".join(parts) + "}"
        if isinstance(value, list):
            return "[" + ", ".join(written(v, (*here, i)) for i, v in enumerate(value)) + "]"
        return json.dumps(value)

    return key, written(tree, ())


def _at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree
