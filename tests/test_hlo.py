"""The counter of bytes, on programs whose bytes are known."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from benchmarks.accelerators.hlo import Program

N = 4096
X = jax.ShapeDtypeStruct((N,), jnp.float32)
ROWS = jax.ShapeDtypeStruct((10, N), jnp.float32)
SIZE = 4 * N  # bytes of X


def traffic(f, *args, donate=()):
    return Program(
        jax.jit(f, donate_argnums=donate).lower(*args).compile().as_text() or ""
    ).traffic()


def is_about(found, arrays, sums=0):
    """Whether this many arrays are moved, to a hundredth.

    The XLA of jax 0.10.0 takes a sum of each 32 elements first, and writes and reads these.
    """
    in_two = arrays + sums * 2 / 32
    return any(found.main == pytest.approx(n * SIZE, rel=0.01) for n in (arrays, in_two))


def scan_sum(rows):
    return lax.scan(lambda total, row: (total + row, None), jnp.zeros(N), rows)[0]


def one_row(rows, i):
    return 2 * lax.dynamic_index_in_dim(rows, i, keepdims=False)


def set_row(rows, row, i):
    return lax.dynamic_update_index_in_dim(rows, row, i, 0)


@pytest.mark.parametrize(
    ("f", "args", "donate", "sizes"),
    [
        pytest.param(lambda x: x + 1, (X,), (), 2, id="copy"),
        pytest.param(lambda x: x + x, (X,), (), 2, id="an array that is read twice"),
        pytest.param(jnp.sum, (X,), (), 1, id="sum"),
        pytest.param(lambda x: (x + 1, jnp.sum(x)), (X,), (), None, id="two results"),
        # Each step reads a row and the total, and writes the total; once it is made of zeros.
        pytest.param(scan_sum, (ROWS,), (), 10 * 3 + 1, id="scan"),
        pytest.param(one_row, (ROWS, 3), (), 2, id="slice"),
        pytest.param(set_row, (ROWS, X, 3), (0,), 2, id="update in place"),
        pytest.param(lambda x: x.reshape(64, 64), (X,), (), None, id="reshape"),
    ],
)
def test_known_programs(f, args, donate, sizes):
    found = traffic(f, *args, donate=donate)
    if sizes is None:  # XLA may make one or two kernels of it
        assert found.main >= 2 * SIZE
    else:
        assert is_about(found, sizes, sums=f is jnp.sum)
    assert found.chip == 0


def test_a_branch_that_is_not_taken_is_not_counted():
    def f(x):
        return lax.cond(jnp.sum(x) > 0, lambda x: jnp.sort(jnp.sin(x)) + x, lambda x: x + 1, x)

    assert is_about(traffic(f, X), 1 + 2, sums=1)


def test_passes_are_reads_of_arrays_as_large_as_x():
    assert traffic(lambda x: x / jnp.sum(x), X).passes(N) == 2
    assert traffic(lambda x: jnp.sum(x[:100]), X).passes(N) == 0
    assert traffic(scan_sum, ROWS).passes(N) == 20


def test_kernels_count_as_often_as_they_are_started():
    assert traffic(lambda x: x + 1, X).kernels == 1
    assert traffic(lambda x: x / jnp.sum(x), X).kernels >= 2
    once = traffic(lambda rows: scan_sum(rows[:1]), ROWS).kernels
    assert traffic(scan_sum, ROWS).kernels >= 10 > once


TPU = """\
HloModule tiles

%fused (p: bf16[16,10]) -> bf16[16,10] {
  %p = bf16[16,10]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %n = bf16[16,10]{1,0:T(8,128)(2,1)S(1)} negate(%p)
}

ENTRY %main (x: bf16[16,10]) -> bf16[16,10] {
  %x = bf16[16,10]{1,0:T(8,128)(2,1)} parameter(0)
  %y = bf16[16,10]{1,0:T(8,128)(2,1)S(1)} fusion(%x), kind=kLoop, calls=%fused
  ROOT %z = bf16[16,10]{0,1:T(8,128)(2,1)} copy(%y)
}
"""


def test_tiles_are_padded_and_vmem_is_counted_apart():
    found = Program(TPU).traffic()
    row_tiles, column_tiles = 16 * 128, 16 * 128  # 10 columns fill 128, 16 columns too
    assert found.main == 2 * row_tiles + 2 * column_tiles
    assert found.chip == 2 * 2 * row_tiles


def test_a_text_that_is_no_program_is_an_error():
    with pytest.raises(ValueError, match="got no ENTRY"):
        Program("HloModule empty")


COPIES = """\
HloModule copies

ENTRY %main (x: f32[16,128]) -> f32[16,128] {
  %x = f32[16,128]{1,0:T(8,128)} parameter(0)
  %slice-start = (f32[16,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) slice-start(%x), slice={[0:8], [0:128]}
  %copy-start = (f32[16,128]{1,0:T(8,128)S(1)}, f32[16,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%x)
  ROOT %y = f32[16,128]{1,0:T(8,128)S(1)} copy-done(%copy-start)
}
"""  # noqa: E501 (a line of a program)


def test_a_copy_to_vmem_is_read_once_and_a_slice_as_a_slice():
    found = Program(COPIES).traffic()
    assert found.main == found.chip == 4 * (16 + 8) * 128
