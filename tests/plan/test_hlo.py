"""What is read from a compiled program's text, against counts by hand."""

import pytest

from domino_jax.plan.hlo import (
    Buffer,
    Collective,
    array_bytes,
    bytes_moved,
    collectives,
    largest_buffers,
    launches,
    read_program,
)

# Entry: a loop of 3 turns whose body holds a loop of unknown length, with one collective in each.
NESTED = """HloModule jit_step, is_scheduled=true

%inner_body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8,4]{1,0} get-tuple-element(%p), index=1
  %reduced = f32[8,4]{1,0} all-reduce(%x), channel_id=1, to_apply=%add, \
    metadata={op_name="jit(train_step)/head/while/body/psum"}
  ROOT %t = (s32[], f32[8,4]{1,0}) tuple(%i, %reduced)
}

%inner_condition (p: (s32[], f32[8,4])) -> pred[] {
  %p = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p = (s32[], f32[8,4]{1,0}) parameter(0)
  %start = (f32[2,4]{1,0}, f32[8,4]{1,0}) all-gather-start(%p#1), channel_id=2, dimensions={0}
  %done = f32[8,4]{1,0} all-gather-done(%start), \
    metadata={op_name="jit(train_step)/target/while/body/dot_general"}
  %inner = (s32[], /*index=1*/f32[8,4]{1,0}) while(%p), condition=%inner_condition, \
    body=%inner_body, metadata={op_name="jit(train_step)/head/while"}
  ROOT %t = (s32[], f32[8,4]{1,0}) tuple(%p#0, %done)
}

%condition (p: (s32[], f32[8,4])) -> pred[] {
  %p = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(4)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %one = s32[] constant(1)
  %from = s32[] copy(%one)
  %t = (s32[], f32[8,4]{1,0}) tuple(%from, %x)
  %loop = (s32[], f32[8,4]{1,0}) while(%t), condition=%condition, body=%body, \
    metadata={op_name="jit(train_step)/target/while"}KNOWN
  ROOT %out = f32[8,4]{1,0} get-tuple-element(%loop), index=1
}
"""


KNOWN = ', backend_config={"known_trip_count":{"n":"5"}}'


@pytest.mark.parametrize(("known", "trip_count"), [("", 3), (KNOWN, 5)])
def test_loops_are_counted_out(known: str, trip_count: int) -> None:
    program = read_program(NESTED.replace("KNOWN", known), unknown_trip_count=7)
    found = {one.kind: one for one in collectives(program)}
    gathered, reduced = found["all-gather"], found["all-reduce"]
    assert (gathered.times, gathered.bytes) == (trip_count, 128)
    assert (reduced.times, reduced.bytes) == (trip_count * 7, 128)
    assert gathered.loop == "jit(train_step)/target/while"
    assert reduced.loop == "jit(train_step)/head/while"


def test_a_program_without_entry_is_refused() -> None:
    with pytest.raises(ValueError, match="no entry computation"):
        read_program("HloModule nothing")


def test_array_bytes() -> None:
    shape = "(f32[2,3]{1,0}, /*index=1*/bf16[4]{0:T(8,128)(2,1)S(1)}, pred[])"
    assert array_bytes(shape) == [24, 8, 1]
    assert array_bytes(shape, main_memory=True) == [24, 1]
    assert array_bytes("(token[], s4[6]{0}, f8e4m3fn[3]{0})") == [0, 3, 3]


# A slice of stacked weights, an update in place, a branch, a call, a gather inside a kernel.
KERNELS = """HloModule jit_step

%slice (p0: f32[34,8,4], p1: s32[]) -> f32[1,8,4] {
  %p0 = f32[34,8,4]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  ROOT %cut = f32[1,8,4]{2,1,0} dynamic-slice(%p0, %p1, %p1, %p1), dynamic_slice_sizes={1,8,4}
}

%outer (p0: s32[], p1: f32[34,8,4]) -> f32[1,8,4] {
  %p0 = s32[] parameter(0)
  %p1 = f32[34,8,4]{2,1,0} parameter(1)
  ROOT %inner = f32[1,8,4]{2,1,0} fusion(%p1, %p0), kind=kLoop, calls=%slice
}

%update (p0: f32[6,4], p1: f32[1,4], p2: s32[]) -> f32[6,4] {
  %p0 = f32[6,4]{1,0} parameter(0)
  %p1 = f32[1,4]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  ROOT %put = f32[6,4]{1,0} dynamic-update-slice(%p0, %p1, %p2, %p2)
}

%exchange (p0: f32[2,4]) -> f32[8,4] {
  %p0 = f32[2,4]{1,0} parameter(0)
  ROOT %whole = f32[8,4]{1,0} all-gather(%p0), channel_id=9, dimensions={0}
}

%left (p: f32[2,4]) -> f32[2,4] {
  %p = f32[2,4]{1,0} parameter(0)
  ROOT %copied = f32[2,4]{1,0} copy(%p)
}

%right (p: f32[2,4]) -> f32[2,4] {
  ROOT %p = f32[2,4]{1,0} parameter(0)
}

ENTRY %main (w: f32[34,8,4], s: f32[6,4], r: f32[1,4], i: s32[], q: f32[2,4], c: pred[]) -> \
    f32[6,4] {
  %w = f32[34,8,4]{2,1,0} parameter(0)
  %s = f32[6,4]{1,0} parameter(1)
  %r = f32[1,4]{1,0} parameter(2)
  %i = s32[] parameter(3)
  %q = f32[2,4]{1,0} parameter(4)
  %c = pred[] parameter(5)
  %layer = f32[1,8,4]{2,1,0} fusion(%i, %w), kind=kLoop, calls=%outer, \
    metadata={op_name="jit(train_step)/jvp(target)/Target/while/body/dynamic_slice"}
  %fetch = ((f32[6,4]{1,0}), f32[2,4]{1,0}, u32[]) slice-start(%s), slice={[0:2], [0:4]}
  %fetched = f32[2,4]{1,0} slice-done(%fetch)
  %begun = (f32[2,4]{1,0}, f32[8,4]{1,0}) fusion-start(%q), kind=kCustom, calls=%exchange
  %ended = f32[8,4]{1,0} fusion-done(%begun)
  %again = f32[8,4]{1,0} fusion(%q), kind=kCustom, calls=%exchange
  %either = f32[2,4]{1,0} conditional(%c, %q, %q), true_computation=%left, \
    false_computation=%right
  ROOT %stored = f32[6,4]{1,0} fusion(%s, %r, %i), kind=kLoop, calls=%update
}
"""


KERNELS_PROGRAM = read_program(KERNELS)


def test_kernels_are_counted_and_names_for_what_exists_are_not() -> None:
    # layer, fetched, ended, again, copied, stored.
    assert launches(KERNELS_PROGRAM) == 6


def test_a_collective_that_kernels_repeat_is_counted_once() -> None:
    (gathered,) = collectives(KERNELS_PROGRAM)
    assert gathered == Collective("all-gather", 128, 1, loop=None, path="", arrays=(128,))


def test_bytes_moved_of_a_slice_and_of_an_update_in_place() -> None:
    # Written, read two kernels deep, the index; then one that is prefetched.
    slice_moves = 128 + 128 + 4 + 32 + 32
    gathers = 2 * (128 + 32)
    copy = 32 + 32
    update = 16 + 16 + 4  # the row written, the row read, the index
    assert bytes_moved(KERNELS_PROGRAM) == slice_moves + gathers + copy + update


def test_largest_buffers_name_their_scope() -> None:
    first, second, third = largest_buffers(KERNELS_PROGRAM, 3)
    assert first == Buffer(128, "f32[1,8,4]", "target/Target/dynamic_slice")
    assert second == Buffer(128, "f32[8,4]", "the compiler's own")
    assert third.bytes == 96
