"""jaxnorm/_internals.py has all uses of internals of JAX and Flax, with fallbacks."""

import ast
import contextlib
import re
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from changes import with_kernels
from jax import export
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from maps import DATA, shard_map

import jaxnorm
from jaxnorm import _internals, kernels
from jaxnorm.kernels.request import Request

FOLDER = Path(jaxnorm.__file__).parent
MODULES = re.compile(r"jax\._src|jax\.interpreters|jax\.extend|flax\.(nnx|linen)\.")
STABLE = {"flax.linen.initializers", "flax.nnx.initializers"}  # in Flax's documentation
ATTRIBUTES = {"axis_context", "lowering_parameters", "manual_axis_type", "module_context"}


@contextlib.contextmanager
def mend():
    """What fails in here has changed in JAX or Flax."""
    try:
        yield
    except (AssertionError, AttributeError, ImportError, TypeError) as error:
        pytest.fail(f"mend jaxnorm/_internals.py, JAX or Flax has changed: {error!r}")


def internals(tree):
    """The internals that a file uses."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
            if node.attr in ATTRIBUTES or names[0].endswith(".sharding.spec"):
                yield names[0]
        else:
            continue
        yield from (name for name in names if MODULES.match(name) and name not in STABLE)


def test_no_other_file_uses_internals():
    used = {
        str(path.relative_to(FOLDER)): found
        for path in FOLDER.rglob("*.py")
        if (found := sorted(set(internals(ast.parse(path.read_text())))))
    }
    assert list(used) == ["_internals.py"], used


def lowered(function):
    """A primitive, and what `function(ctx)` gives in each lowering of it."""
    found = []

    def rule(ctx, x):
        found.append(function(ctx))
        return [x]

    primitive = _internals.Primitive("test_internals")
    primitive.def_abstract_eval(lambda x: x)
    _internals.register_lowering(primitive, rule)
    return found, primitive.bind


def over(axis_type):
    """An array that is sharded over eight devices."""
    mesh = jax.make_mesh((8,), ("data",), (axis_type,))
    return jax.device_put(jnp.ones((8, 3)), NamedSharding(mesh, PartitionSpec("data")))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_devices_of_a_program(axis_type):
    with mend():
        found, bind = lowered(_internals.devices_of)
        jax.jit(bind)(jnp.ones(3))
        assert found == [1]
        x = over(axis_type)
        jax.jit(bind)(x)
        assert found == [1, 8]
        jax.jit(shard_map("checked", bind, DATA, DATA, data=8)).lower(jnp.ones((8, 3)))
        assert found == [1, 8, 1]
        # Over the other axis XLA still divides.
        mesh = jax.make_mesh((4, 2), ("data", "model"), (AxisType.Auto,) * 2)
        partly = jax.shard_map(bind, mesh=mesh, in_specs=DATA, out_specs=DATA, axis_names={"data"})
        jax.jit(partly).lower(jnp.ones((8, 3)))
        assert found == [1, 8, 1, 8]


def test_exported_programs():
    with mend():
        found, bind = lowered(_internals.is_exported)
        jax.jit(bind)(jnp.ones(3))
        export.export(jax.jit(bind), platforms=("cpu", "tpu"))(jnp.ones(3))
        assert found[0] is False
        assert set(found[1:]) == {True}


def test_axes_of_a_mesh():
    with mend():
        sharded = []
        ask = lambda x: sharded.append([_internals.is_sharded(x, axis) for axis in range(2)])
        jax.jit(ask)(over(AxisType.Explicit))
        jax.jit(ask)(over(AxisType.Auto))
        assert sharded == [[True, False], [False, False]]
        varying = []

        def block(x):
            varying.extend(map(_internals.varying_axes, (x, jnp.ones(3))))
            jax.ShapeDtypeStruct((3,), jnp.float32, manual_axis_type=_internals.manual_axis_type(x))
            return x

        jax.eval_shape(shard_map("checked", block, DATA, DATA, data=8), jnp.ones((8, 3)))
        assert varying == [{"data"}, set()]


def test_flax_s_choices():
    with mend():
        one = jnp.ones(1, jnp.bfloat16)
        assert _internals.canonicalize_dtype(one, None, dtype=None) == jnp.bfloat16
        assert _internals.canonicalize_dtype(one, dtype=jnp.float32) == jnp.float32
        assert _internals.first_from(None, False, True, error_msg="") is False
    with pytest.raises(ValueError, match="neither"):
        _internals.first_from(None, None, error_msg="neither")


@pytest.mark.parametrize(
    "context",
    [
        {},
        {"axis_context": types.SimpleNamespace(device_count=8)},
        {"axis_context": types.SimpleNamespace(mesh=jax.sharding.AbstractMesh((8,), ("data",)))},
    ],
    ids=["nothing", "other names", "other names of manual axes"],
)
def test_an_unknown_axis_context_leaves_the_work_to_xla(context, change):
    """JAX has renamed what tells whether arrays are sharded, and whether a program is exported."""
    always = {
        "unavailable_reason": lambda: None,
        "opt_in_reason": lambda: None,
        "unsupported_reason": lambda request: None,
    }
    kernel: Any = types.SimpleNamespace(**always)
    ctx: Any = types.SimpleNamespace(module_context=types.SimpleNamespace(**context))
    request = Request((8, 1, 1, 64), np.dtype("float32"), np.dtype("float32"))
    assert _internals.is_exported(ctx)
    change(kernels, "KERNELS", with_kernels(tpu=kernel))
    assert kernels.for_program("tpu", ctx, request, required=False) is None
    with pytest.raises(ValueError, match=r"implementation='kernel' must.*over .*devices"):
        kernels.for_program("tpu", ctx, request, required=True)


def test_what_is_sharded_can_t_be_told(monkeypatch):
    monkeypatch.setattr(jax, "typeof", lambda x: types.SimpleNamespace())
    x: Any = None
    assert _internals.is_sharded(x, 0)


def test_a_change_names_the_file(monkeypatch):
    monkeypatch.setattr(jax, "typeof", lambda x: types.SimpleNamespace())
    with pytest.raises(pytest.fail.Exception, match=r"mend jaxnorm/_internals\.py"):
        test_axes_of_a_mesh()
