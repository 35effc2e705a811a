"""Programs that trace norms; test_tracing.py runs each in a process of its own.

Only shapes go in. If something starts JAX's backends, the program names what did, and fails.
"""

import functools
import socket
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adding import ADD_NORMS
from more_norms import FAMILY
from norms import NORMS, norm_id

import jaxnorm as jn
from jaxnorm.kernels import cpu

MASK = np.arange(6)[:, None] < 5


def shape(*sizes, dtype=jnp.float32):
    """An array without numbers."""
    return jax.ShapeDtypeStruct(sizes, dtype)


X, FEATURES = shape(8, 6, 64), shape(64)
KEY = jax.eval_shape(lambda: jax.random.key(0))


def traced(name, function, *args):
    """Trace a function, its gradient, and that under `vmap`."""

    def gradient(args):
        def loss(args):
            return sum(jnp.sum(a.astype(jnp.float32)) for a in jax.tree.leaves(function(*args)))

        return jax.grad(loss)(args)

    more = jax.tree.map(lambda a: shape(2, *a.shape, dtype=a.dtype), args)
    jax.eval_shape(function, *args)
    jax.make_jaxpr(function)(*args)
    jax.make_jaxpr(gradient)(args)
    jax.make_jaxpr(jax.vmap(gradient))(more)
    not_started(name)


def refused(name, function, *args):
    """The error comes while tracing."""
    with pytest.raises(ValueError, match="implementation='kernel' must be"):
        jax.eval_shape(function, *args)
    not_started(name)


def not_started(name):
    """Fail if something started the backends."""
    from jax._src import xla_bridge

    if xla_bridge.backends_are_initialized():
        sys.exit(f"{name} started JAX's backends")


def functions():
    """Every norm, by all that may compute it."""
    for norm in NORMS:
        name, params = norm_id(norm), [shape(*norm.features(X.shape))] * 2
        by_kernel = lambda *args, norm=norm: norm(*args, implementation="kernel")
        masked = functools.partial(norm, where=MASK)
        refused(f"{name} with a mask, by the kernel", by_kernel, X, None, None, MASK)
        for dtype in (jnp.float32, jnp.bfloat16):
            x = shape(*X.shape, dtype=dtype)
            traced(name, norm, x, *params)
            traced(f"{name} with a mask", masked, x, *params)
        if not cpu.unavailable_reason():
            traced(f"{name} by the kernel", by_kernel, X)
        traced(
            f"{name} of parameters that no kernel takes", norm, X, shape(8, 1, 64), shape(1, 6, 1)
        )
    for add in ADD_NORMS:
        params = [shape(*add.norm.features(X.shape))] * 2
        traced(f"add {norm_id(add.norm)}", add, X, X, *params)
    for small in FAMILY:
        learned = [shape() if name == "alpha" else shape(4) for name in small.learned]
        traced(small.name, small.function, shape(8, 3, 4), *learned)
    w = shape(32, 64)
    traced("weight_norm", jn.weight_norm, w, FEATURES)
    traced("standardize_weight", jn.standardize_weight, w)
    state = jax.eval_shape(jn.init_spectral_norm_state, w, KEY)
    traced("spectral_norm", lambda *args: jn.spectral_norm(*args)[0], w, state)


MODULES: dict[str, dict[str, Any]] = {
    "AddLayerNorm": {},
    "AddRMSNorm": {},
    "BatchNorm": {"use_running_average": False},
    "DynamicErf": {},
    "DynamicTanh": {},
    "FilterResponseNorm": {},
    "GlobalResponseNorm": {},
    "GroupNorm": {"num_groups": 4},
    "InstanceNorm": {},
    "LayerNorm": {},
    "RMSNorm": {},
}


def linen():
    """`init` and `apply` of every module."""
    import flax.linen as nn

    import jaxnorm.linen as jl

    norms = [getattr(jl, name)(**options) for name, options in MODULES.items()]
    layers = [jl.StandardizedDense(8), jl.StandardizedConv(8, (3,))]

    class Weights(nn.Module):
        norm: Any
        options: Any

        @nn.compact
        def __call__(self, x):
            return self.norm(nn.Dense(8))(x, **self.options)

    wrapped = [Weights(jl.WeightNorm, {}), Weights(jl.SpectralNorm, {"update_stats": True})]
    for module in (*norms, *layers, *wrapped):
        args = (X, X) if type(module).__name__.startswith("Add") else (X,)
        variables = jax.eval_shape(module.init, KEY, *args)
        apply = lambda *args, module=module: module.apply(*args, mutable=["batch_stats"])[0]
        jax.eval_shape(apply, variables, *args)
        jax.make_jaxpr(apply)(variables, *args)
        not_started(f"linen.{type(module).__name__}")


def nnx():
    """The constructor, the call and `nnx.split` of every module."""
    from flax import nnx

    import jaxnorm.nnx as jx

    def make(name):
        return lambda: getattr(jx, name)(64, rngs=nnx.Rngs(0), **MODULES[name])

    rngs = lambda: nnx.Rngs(0)
    made = {name: make(name) for name in MODULES} | {
        "StandardizedLinear": lambda: jx.StandardizedLinear(64, 8, rngs=rngs()),
        "StandardizedConv": lambda: jx.StandardizedConv(64, 8, (3,), rngs=rngs()),
        "WeightNorm": lambda: jx.WeightNorm(nnx.Linear(64, 8, rngs=rngs()), rngs=rngs()),
        "SpectralNorm": lambda: jx.SpectralNorm(nnx.Linear(64, 8, rngs=rngs()), rngs=rngs()),
    }
    for name, constructor in made.items():
        module = nnx.eval_shape(constructor)
        args = (X, X) if name.startswith("Add") else (X,)
        nnx.eval_shape(lambda module, *args: module(*args), module, *args)
        graph, state = nnx.split(module)
        jax.make_jaxpr(lambda state, *args, graph=graph: nnx.merge(graph, state)(*args))(
            state, *args
        )
        not_started(f"nnx.{name}")


if __name__ == "__main__":
    not_started("importing jaxnorm")
    globals()[sys.argv[1]]()
    with socket.socket() as free:  # what several hosts would do now
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    jax.distributed.initialize(address, num_processes=1, process_id=0)
