"""The kernel over devices, in exported programs, and under jit's own options."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import example_of
from jax import export
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from norms import NORMS, norm_id

pytestmark = pytest.mark.usefixtures("kernel")
EACH_NORM = pytest.mark.parametrize("norm", NORMS, ids=norm_id)
SHAPE = (8, 30, 12)
DATA, ALL = PartitionSpec("data"), PartitionSpec()


def backward(norm):
    """A function that gives y and all gradients."""

    def both(x, scale, bias, dy):
        y, pullback = jax.vjp(norm, x, scale, bias)
        return y, *pullback(dy)

    return both


def arguments(norm):
    example = example_of(norm, SHAPE)
    return jax.tree.map(jnp.asarray, (*example[:3], example.dy))


def assert_close(ours, expected):
    for a, b in zip(ours, expected, strict=True):
        # Rounding of sums over 240 terms, in another order.
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@EACH_NORM
def test_jit_over_a_sharded_batch_calls_no_kernel_and_gathers_nothing(norm, axis_type):
    args = arguments(norm)
    expected = jax.jit(backward(norm))(*args)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        place = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))
        placed = [place(a, s) for a, s in zip(args, (DATA, ALL, ALL, DATA), strict=True)]
        compiled = jax.jit(backward(norm)).lower(*placed).compile()
        text = compiled.as_text() or ""
        assert "jaxnorm_" not in text
        assert "all-gather" not in text
        results = compiled(*placed)
        assert results[0].sharding.spec[0] == results[1].sharding.spec[0] == "data"
        assert_close(results, expected)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("norm", [norm for norm in NORMS if norm.name != "batch"], ids=norm_id)
def test_in_shard_map_each_device_calls_its_own(norm, check_vma):
    args = arguments(norm)
    expected = jax.jit(backward(norm))(*args)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.shard_map(
        functools.partial(norm, implementation="kernel"),
        mesh=mesh,
        in_specs=(DATA, ALL, ALL),
        out_specs=DATA,
        check_vma=check_vma,
    )
    compiled = jax.jit(backward(sharded)).lower(*args).compile()
    text = compiled.as_text() or ""
    assert "jaxnorm_forward" in text
    assert "jaxnorm_backward" in text
    assert "all-gather" not in text
    assert_close(compiled(*args), expected)


def test_a_batch_norm_in_shard_map_has_statistics_of_its_own():
    norm, (x, scale, bias, _) = NORMS[0], arguments(NORMS[0])
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    local = jax.shard_map(
        functools.partial(norm, implementation="kernel"),
        mesh=mesh,
        in_specs=(DATA, ALL, ALL),
        out_specs=DATA,
    )
    parts = [norm(x[i : i + 2], scale, bias) for i in range(0, 8, 2)]
    assert_close([jax.jit(local)(x, scale, bias)], [jnp.concatenate(parts)])


@EACH_NORM
def test_an_exported_program_runs_where_there_is_no_kernel(norm):
    args = arguments(norm)
    exported = export.export(jax.jit(backward(norm)))(*args)
    assert "@jaxnorm_" not in exported.mlir_module()  # a call; sources have names without the @
    data = exported.serialize()
    assert b"jaxnorm_forward" not in data
    assert_close(export.deserialize(data).call(*args), jax.jit(backward(norm))(*args))


@EACH_NORM
def test_the_input_can_be_donated(norm):
    f = functools.partial(norm, implementation="kernel")
    x, *params, _ = arguments(norm)
    expected = np.asarray(jax.jit(f)(x, *params))
    given = x.copy()
    donated = jax.jit(f, donate_argnums=0)(given, *params)
    assert given.is_deleted()
    np.testing.assert_array_equal(donated, expected)
    np.testing.assert_array_equal(jax.jit(f)(x, *params), expected)  # x is as it was


@EACH_NORM
def test_a_second_call_does_not_trace_again(norm):
    traces = []

    @jax.jit
    def f(x):
        traces.append(1)
        return jax.grad(lambda x: jnp.sum(norm(x, implementation="kernel") ** 3))(x)

    for _ in range(3):
        f(jnp.ones(SHAPE))
    assert len(traces) == 1
