"""The counter of bytes of Pallas's kernels, on kernels whose bytes are known, and on ours."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from benchmarks import accelerators
from benchmarks.chips import CHIPS, compiled
from benchmarks.hlo import Program
from benchmarks.kernel_calls import with_residual
from benchmarks.pallas_bytes import calls_of, moved, said
from benchmarks.programs import arguments
from jaxnorm.kernels import tpu

# conftest.py keeps compiled programs; those of a chip that is not there can't be loaded again.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache"),
    pytest.mark.thorough,
]

X = jax.ShapeDtypeStruct((1024, 256), jnp.float32)
SIZE = 4 * 1024 * 256


def kernel_of(grid, index, *, rows=128, says):
    """Writes one block after the other; `index` tells which block of x each step reads."""

    def body(x_ref, y_ref):
        y_ref[...] = x_ref[...] + 1

    return pl.pallas_call(
        body,
        grid=grid,
        in_specs=[pl.BlockSpec((rows, 256), index)],
        out_specs=pl.BlockSpec((rows, 256), lambda *at: (at[-1], 0)),
        out_shape=X,
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=round(says)),
    )


KNOWN = {
    "copy": (kernel_of((8,), lambda i: (i, 0), says=2 * SIZE), 2),
    "the last block is smaller": (kernel_of((6,), lambda i: (i, 0), rows=184, says=2 * SIZE), 2),
    "a block that stays": (kernel_of((8,), lambda i: (0, 0), says=1.125 * SIZE), 1.125),
    "everything twice": (kernel_of((2, 8), lambda _, i: (i, 0), says=4 * SIZE), 4),
}


@pytest.mark.parametrize(("f", "sizes"), KNOWN.values(), ids=KNOWN)
def test_known_kernels(f, sizes):
    (call,) = calls_of(f, X)
    assert moved(call) == said(call) == sizes * SIZE


@pytest.mark.parametrize(("f", "sizes"), KNOWN.values(), ids=KNOWN)
def test_a_program_counts_what_its_kernel_moves(f, sizes):
    chip = CHIPS["v5e"]
    if chip.missing:
        pytest.skip("libtpu is in the extra 'tpu'")
    assert Program(compiled(chip, f, (X,)).as_text()).traffic().main == sizes * SIZE


def kernels_of(problem):
    """All calls of our kernels for a problem."""
    x, params, _ = arguments(problem)
    forward, backward = with_residual(tpu, problem)
    kept = jax.eval_shape(forward, x, x, params)[1:]
    alone = lambda x, params: forward(x, None, params)
    return (
        calls_of(forward, x, x, params)
        + calls_of(backward, kept, params, x, x)
        + calls_of(alone, x, params)
        + calls_of(functools.partial(backward, dtotal=None), kept, params, x)
    )


@pytest.mark.parametrize(
    "problem", accelerators.FOR_KERNELS, ids=lambda p: re.sub(r"\W", "-", accelerators.name_of(p))
)
def test_our_kernels_move_what_they_say(problem):
    calls = kernels_of(problem)
    assert len(calls) == 4
    for call in calls:
        assert moved(call) == said(call)


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
