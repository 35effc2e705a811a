"""The five norms in each library on JAX. A library is imported when its function is called.

In all of them the statistics are computed from x, scale and bias are float32, features are last,
and y has the dtype of x. If a library can't do this, its note says so.
"""

import os
from typing import Any

import jax
import jax.numpy as jnp

import jaxnorm as jn
from benchmarks.programs.cases import EPSILON, MOMENTUM, Problem
from benchmarks.programs.jax_calls import JaxNorm


class UnableError(Exception):
    """A peer does not have this norm, or can't run it here; the message says why."""


def one_example(problem: Problem) -> jax.Array:
    """Return one example, for libraries that need it to create their variables."""
    return jnp.ones((1,) * (len(problem.shape) - 1) + problem.shape[-1:], problem.dtype)


def jaxnorm_norm(problem: Problem, **options: Any) -> JaxNorm:
    """jaxnorm's pure functions, called with the options."""
    options |= {"epsilon": EPSILON}
    norm_params = lambda params: jn.NormParams(params["scale"], params.get("bias"))
    if problem.norm == "batch":
        state = jn.init_batch_norm_state(problem.features)
        options |= {"momentum": MOMENTUM}
        apply = lambda x, params, state: jn.batch_norm(
            x, state, params=norm_params(params), **options
        )
        return JaxNorm(apply, state)
    if problem.norm == "group":
        options |= {"num_groups": problem.groups}
    function: Any = getattr(jn, f"{problem.norm}_norm")
    return JaxNorm(lambda x, params, state: (function(x, norm_params(params), **options), state))


def linen_norm(problem: Problem) -> JaxNorm:
    """`flax.linen`."""
    import flax.linen as nn

    options: dict[str, Any] = {"epsilon": EPSILON, "dtype": problem.dtype}
    if problem.norm == "batch":
        module = nn.BatchNorm(use_running_average=False, momentum=MOMENTUM, **options)
    elif problem.norm == "group":
        module = nn.GroupNorm(problem.groups, **options)
    else:
        classes = {"layer": nn.LayerNorm, "rms": nn.RMSNorm, "instance": nn.InstanceNorm}
        module = classes[problem.norm](**options)
    variables = module.init(jax.random.key(0), one_example(problem))
    state = {name: value for name, value in variables.items() if name != "params"}

    def apply(x, params, state):
        return module.apply({"params": params, **state}, x, mutable=list(state))

    return JaxNorm(apply, state)


def nnx_norm(problem: Problem) -> JaxNorm:
    """`flax.nnx`."""
    from flax import nnx

    options: dict[str, Any] = {"epsilon": EPSILON, "dtype": jnp.dtype(problem.dtype)}
    if problem.norm == "batch":
        options |= {"momentum": MOMENTUM}
    if problem.norm == "group":
        options |= {"num_groups": problem.groups}
    names = {"batch": "Batch", "layer": "Layer", "rms": "RMS", "group": "Group"}
    kind = getattr(nnx, f"{names.get(problem.norm, 'Instance')}Norm")
    module = kind(problem.features, rngs=nnx.Rngs(0), **options)
    definition, *parts = nnx.split(module, nnx.Param, ...)
    structures = [jax.tree.structure(part) for part in parts]

    def apply(x, params, state):
        leaves = [params[name] for name in sorted(params)], state  # sorted, as in nnx
        module = nnx.merge(definition, *map(jax.tree.unflatten, structures, leaves))
        y = module(x)
        return y, jax.tree.leaves(nnx.split(module, nnx.Param, ...)[2])

    return JaxNorm(apply, jax.tree.leaves(parts[1]))


def haiku_norm(problem: Problem) -> JaxNorm:
    """Return Haiku's norm.

    It computes in the wider dtype of x and scale, so y is rounded to the dtype of x.
    """
    import haiku as hk  # pyright: ignore[reportMissingImports] (optional)

    both = {"create_scale": True, "create_offset": True, "eps": EPSILON}
    modules = {
        "batch": lambda: hk.BatchNorm(decay_rate=MOMENTUM, **both),
        "layer": lambda: hk.LayerNorm(axis=-1, param_axis=-1, **both),
        "rms": lambda: hk.RMSNorm(axis=-1, param_axis=-1, eps=EPSILON),
        "group": lambda: hk.GroupNorm(problem.groups, **both),
        "instance": lambda: hk.InstanceNorm(**both),
    }
    options = {"is_training": True} if problem.norm == "batch" else {}
    pure = hk.transform_with_state(lambda x: modules[problem.norm]()(x, **options))
    theirs, state = pure.init(jax.random.key(0), one_example(problem))
    ((path, templates),) = theirs.items()

    def apply(x, params, state):
        params = {"scale": params["scale"]} | (
            {"offset": params["bias"]} if "bias" in params else {}
        )
        params = {name: a.reshape(templates[name].shape) for name, a in params.items()}
        y, state = pure.apply({path: params}, state, None, x)
        return y.astype(x.dtype), state

    return JaxNorm(apply, state)


def equinox_norm(problem: Problem) -> JaxNorm:
    """Return Equinox's norm.

    Its modules take one example, with features first unless rows are normalized.
    """
    import equinox as eqx  # pyright: ignore[reportMissingImports] (optional)

    state: Any = ()
    if problem.norm == "batch":
        make: Any = eqx.nn.make_with_state(eqx.nn.BatchNorm)
        module, state = make(
            problem.features, "batch", EPSILON, momentum=MOMENTUM, mode="batch", dtype=jnp.float32
        )
    elif problem.norm in ("layer", "rms"):
        layer = problem.norm == "layer"
        kind = eqx.nn.LayerNorm if layer else eqx.nn.RMSNorm
        module = kind(problem.features, EPSILON, use_bias=layer)
    else:
        groups = problem.groups if problem.norm == "group" else problem.features
        module = eqx.nn.GroupNorm(groups, problem.features, EPSILON)
    learned = lambda module: [module.weight] + [module.bias] * (problem.norm != "rms")

    def apply(x, params, state):
        values = [params[name] for name in ("scale", "bias") if name in params]
        norm = eqx.tree_at(learned, module, values)
        if problem.norm in ("layer", "rms"):
            return jax.vmap(norm)(x).astype(x.dtype), state
        first = jnp.moveaxis(x, -1, 1)
        if problem.norm == "batch":
            mapped = jax.vmap(norm, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
            y, state = mapped(first, state)
        else:
            y = jax.vmap(norm)(first)
        return jnp.moveaxis(y, 1, -1).astype(x.dtype), state

    transposed = problem.norm not in ("layer", "rms")
    return JaxNorm(apply, state, "features first only, with transposes" * transposed)


def keras_norm(problem: Problem) -> JaxNorm:
    """Return Keras's norm, on JAX."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras  # pyright: ignore[reportMissingImports] (optional)

    if keras.backend.backend() != "jax":
        raise UnableError(
            f"KERAS_BACKEND must be jax, got {keras.backend.backend()}; unset it, and the backend "
            "in keras.json."
        )
    policy = "mixed_bfloat16" if problem.dtype == "bfloat16" else problem.dtype
    options: dict[str, Any] = {"epsilon": EPSILON, "dtype": policy}
    layers = keras.layers
    layer: Any = {
        "batch": lambda: layers.BatchNormalization(momentum=MOMENTUM, **options),
        "layer": lambda: layers.LayerNormalization(**options),
        "rms": lambda: layers.RMSNormalization(**options),
        "group": lambda: layers.GroupNormalization(problem.groups, **options),
        "instance": lambda: layers.GroupNormalization(-1, **options),
    }[problem.norm]()
    layer.build(problem.shape)
    ours = {"gamma": "scale", "scale": "scale", "beta": "bias"}
    names = [ours[variable.name] for variable in layer.trainable_variables]
    state = [variable.value for variable in layer.non_trainable_variables]
    training = {"training": True} if problem.norm == "batch" else {}

    def apply(x, params, state):
        return layer.stateless_call([params[name] for name in names], state, x, **training)

    return JaxNorm(apply, state)
