"""Norms of a residual sum by the kernel: memory, vmap, devices, and unsupported calls."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from adding import ADD_NORM_IDS, ADD_NORMS, draw
from jax.sharding import AxisType, PartitionSpec

import jaxnorm as jn

EACH = pytest.mark.parametrize("add", ADD_NORMS, ids=ADD_NORM_IDS)
LAYER, _, RMS = ADD_NORMS


def both(add, **options):
    """A function that gives the results, and all gradients."""

    def run(dy, d_residual_sum, *args):
        results, pullback = jax.vjp(functools.partial(add, **options), *args)
        return results, pullback((dy, d_residual_sum))

    return run


def arguments_of_both(add, *draw_how):
    example, residual, d_residual_sum = draw(add, *draw_how)
    args = (example.dy, d_residual_sum, example.x, residual, example.scale, example.bias)
    return jax.tree.map(jnp.asarray, args)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    ("add", "dtype"),
    [(LAYER, jnp.float32), (LAYER, jnp.bfloat16), (RMS, jnp.float32)],
    ids=["layer-float32", "layer-bfloat16", "rms-float32"],
)
def test_the_kernel_takes_a_twentieth_of_the_input(add, dtype):
    args = arguments_of_both(add, (64, 64, 256), dtype)
    compiled = jax.jit(both(add)).lower(*args).compile()
    text, memory = compiled.as_text() or "", compiled.memory_analysis()
    assert "jaxnorm_forward" in text
    assert "jaxnorm_backward" in text
    assert memory is not None
    assert memory.temp_size_in_bytes <= 0.05 * args[0].size * args[0].dtype.itemsize


@pytest.mark.usefixtures("kernel")
def test_the_kernel_under_vmap_of_some_arguments():
    """With each argument batched it computes all examples at once; else the formula does."""
    args = arguments_of_both(LAYER)
    formula = both(LAYER, implementation="xla")
    for batched in [(0, 1, 2, 3), (0, 2, 4)]:
        axes = tuple(0 if i in batched else None for i in range(len(args)))
        some = [jnp.stack([a, 2 * a]) if i in batched else a for i, a in enumerate(args)]
        ours, right = (
            jax.jit(jax.vmap(f, axes))(*some)
            for f in (both(LAYER, implementation="kernel"), formula)
        )
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(right), strict=True):
            # 4 units each, and sums of rows, which are added in another order.
            assert oracle.units(a, b) <= 32


@pytest.mark.usefixtures("kernel")
def test_each_device_calls_its_own_kernel_in_shard_map():
    args = arguments_of_both(RMS, (8, 30, 12))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    data, all_ = PartitionSpec("data"), PartitionSpec()
    sharded = jax.shard_map(
        functools.partial(RMS, implementation="kernel"),
        mesh=mesh,
        in_specs=(data, data, all_, all_),
        out_specs=data,
    )
    compiled = jax.jit(both(sharded)).lower(*args).compile()
    text = compiled.as_text() or ""
    assert "jaxnorm_backward" in text
    assert "all-gather" not in text
    ours, right = compiled(*args), both(RMS)(*args)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(right), strict=True):
        # 4 units each, and sums of rows, which are added in another order.
        assert oracle.units(a, b) <= 32


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda t: t.__name__)
def test_the_kernel_has_nan_where_the_formula_has_it(dtype):
    args = arguments_of_both(LAYER, (2, 3, 40), dtype)
    programs = [jax.jit(both(LAYER, implementation=how)) for how in ("kernel", "xla")]
    for bad in ({5: np.nan}, {5: np.inf}, {5: np.inf, 6: -np.inf}):
        row = args[3]
        for index, number in bad.items():
            row = row.at[0, 0, index].set(number)
        ours, formula = (program(*args[:3], row, *args[4:]) for program in programs)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(formula), strict=True):
            np.testing.assert_array_equal(np.isnan(a), np.isnan(b))


@pytest.mark.usefixtures("kernel")
def test_what_the_kernel_does_not_add_is_the_formula_s(rng):
    x = rng.standard_normal((3, 4, 6), np.float32)
    long = rng.standard_normal((1, 2**14 + 1)).astype(jnp.bfloat16)
    for a, axis in ((x, 0), (x, (0, 2)), (long, -1)):
        ours = jn.add_layer_norm(a, a, axis=axis)
        formula = jn.add_layer_norm(a, a, axis=axis, implementation="xla")
        jax.tree.map(np.testing.assert_array_equal, ours, formula)
