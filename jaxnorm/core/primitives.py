"""Three primitives that a kernel can compute: value, tangent, cotangent.

    value(x, params)                               -> y, statistics
    tangent(x, params, statistics, tx, tparams)    -> ty, tstatistics     linear in the last two
    cotangent(x, params, statistics, dy)           -> dx, dparams         its transpose

Each is a formula, which is the truth: JAX makes from it the primitive's types, derivatives and
lowering. A kernel is a second lowering, which a platform may have and which may decline; nothing
above it changes. So there are no derivatives here, only the order of things: the value's
derivative is the tangent, the tangent's transpose is the cotangent.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jaxnorm import kernels
from jaxnorm.core.moments import Measure, Statistics, count_all, measure, measured
from jaxnorm.core.standardize import NormParams, standardize


class Setting(NamedTuple):
    """What is static in a primitive.

    Attributes:
      how: to measure.
      dtype: of y.
      required: whether it is an error if no kernel takes it.
      maps: how many leading axes vmap has given to x, the statistics, and their (co)tangents. The
        parameters have none.
      of_params: whether the cotangent is that of the parameters too.
    """

    how: Measure
    dtype: jnp.dtype
    required: bool
    maps: int = 0
    of_params: bool = True


def normalize(
    how: Measure,
    dtype: jnp.dtype,
    x: jax.Array,
    params: NormParams,
    where: jax.Array | None,
    implementation: str | None,
) -> tuple[jax.Array, Statistics]:
    """y and the statistics: by a kernel where one is built and takes these, else by the formula."""
    implementation = kernels.choose(implementation, how, dtype, x, where)
    if implementation == "xla":
        function = by_formula if how.devices.mapped else _by_formula_compiled
        return function(how, dtype, x, params, where)
    setting = Setting(how, dtype, required=implementation == "kernel")
    return _by_primitives(setting, x, params)


def by_formula(how, dtype, x, params, where):
    """The same by the formula."""
    stats = measure(how, x, where)
    return standardize(how, dtype, x, stats.mean, stats.rest, stats.rstd, params), stats


_by_formula_compiled = jax.jit(by_formula, static_argnums=(0, 1))


@functools.partial(jax.jit, static_argnums=0)
def _by_primitives(setting, x, params):
    y, *stats = value(setting, *_equally_varying((x, params)))
    return y, _statistics(setting.how, stats)


def _equally_varying(tree: Any) -> Any:
    """In shard_map the operands of a primitive must vary over the same axes."""
    leaves = jax.tree.leaves(tree)
    axes = frozenset().union(*(jax.typeof(leaf).manual_axis_type.varying for leaf in leaves))

    def cast(leaf):
        missing = tuple(axes - jax.typeof(leaf).manual_axis_type.varying)
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, tree)


def _parts(stats: Statistics) -> list[jax.Array]:
    """What of the statistics is not known from the shape."""
    return jax.tree.leaves(stats._replace(count=None))


def _statistics(how: Measure, parts: Sequence) -> Statistics:
    *means, var, rstd = parts
    mean, rest = means or (None, None)
    return Statistics(mean, rest, var, jnp.broadcast_to(count_all(how), var.shape), rstd)


def _value(setting, x, params):
    y, stats = by_formula(setting.how, setting.dtype, x, params, None)
    return [y, *_parts(stats)]


def _again(setting, parts, x, params):
    """The value, of which the statistics are given."""
    how, dtype = setting.how, setting.dtype
    stats = measured(how, x, _statistics(how, parts))
    y = standardize(how, dtype, x, stats.mean, stats.rest, stats.rstd, params)
    return [y, *_parts(stats)]


def _tangent(setting, x, params, parts, tx, tparams):
    tparams = jax.tree.map(jnp.zeros_like, params) if tparams is None else tparams
    return jax.jvp(functools.partial(_again, setting, parts), (x, params), (tx, tparams))[1]


def _cotangent(setting, x, params, parts, dy):
    pullback = jax.vjp(lambda *args: _again(setting, parts, *args)[0], x, params)[1]
    dx, dparams = pullback(dy)
    return [dx, *(jax.tree.leaves(dparams) if setting.of_params else ())]


class Operation:
    """A primitive, made of a formula, and of a kernel for the CPU if there is one.

    Attributes:
      formula: a function of (setting, *trees of arrays), which returns a list of arrays and does
        not know of maps.
      mapped: for each tree, whether it has the leading axes of vmap.
      kernel: the same function, which knows of them.
    """

    def __init__(self, formula: Callable, mapped: Sequence[bool], kernel: Callable | None = None):
        self.formula, self.mapped, self.kernel = formula, mapped, kernel
        self.primitive = Primitive(f"jaxnorm{formula.__name__}")
        self.primitive.multiple_results = True
        self.primitive.def_impl(self._run)
        self.primitive.def_abstract_eval(self._types)
        ad.primitive_jvps[self.primitive] = self._derivative
        batching.primitive_batchers[self.primitive] = self._batch
        mlir.register_lowering(self.primitive, self._lower)
        if kernel:
            mlir.register_lowering(self.primitive, self._lower_for_cpu, platform="cpu")

    def __call__(self, setting: Setting, *trees: Any) -> list[jax.Array]:
        leaves, tree = jax.tree.flatten(trees)
        return self.primitive.bind(*leaves, tree=tree, setting=setting)

    def on_leaves(self, tree: Any, setting: Setting) -> Callable:
        """The formula as a function of arrays."""

        def function(*leaves):
            return self.formula(setting, *tree.unflatten(leaves))

        axes = [0 if mapped else None for mapped in self._mapped_leaves(tree)]
        for _ in range(setting.maps):
            function = jax.vmap(function, axes)
        return function

    def _mapped_leaves(self, tree: Any) -> list[bool]:
        pairs = zip(self.mapped, tree.children(), strict=True)
        return [mapped for mapped, child in pairs for _ in range(child.num_leaves)]

    def _run(self, *leaves, **static):
        with jax.disable_jit(False):
            return jax.jit(functools.partial(self.primitive.bind, **static))(*leaves)

    def _types(self, *avals, tree, setting):
        return jax.make_jaxpr(self.on_leaves(tree, setting))(*avals).out_avals

    def _derivative(self, primals, tangents, *, tree, setting):
        return jax.jvp(
            self.on_leaves(tree, setting), primals, tuple(map(ad.instantiate_zeros, tangents))
        )

    def _batch(self, leaves, dims, *, tree, setting):
        if [dim is not None for dim in dims] == self._mapped_leaves(tree):
            leaves = [
                leaf if dim is None else jnp.moveaxis(leaf, dim, 0)
                for leaf, dim in zip(leaves, dims, strict=True)
            ]
            setting = setting._replace(maps=setting.maps + 1)
            results = self.primitive.bind(*leaves, tree=tree, setting=setting)
        else:
            results = jax.vmap(self.on_leaves(tree, setting), dims)(*leaves)
        return results, [0] * len(results)

    def _lower(self, ctx, *leaves, tree, setting):
        if self.kernel and setting.required:
            kernels.refuse("this program is compiled for another platform than the CPU")
        function = self.on_leaves(tree, setting)
        return mlir.lower_fun(function, multiple_results=True)(ctx, *leaves)

    def _lower_for_cpu(self, ctx, *leaves, tree, setting):
        kernel, reason = self.kernel, kernels.why_not_in(ctx)
        if reason and setting.required:
            kernels.refuse(reason)
        if reason or kernel is None:
            function = self.on_leaves(tree, setting)
        else:
            function = lambda *leaves: kernel(setting, *tree.unflatten(leaves))
        return mlir.lower_fun(function, multiple_results=True)(ctx, *leaves)


value = Operation(_value, (True, False), kernels.cpu.value)
tangent = Operation(_tangent, (True, False, True, True, False))
cotangent = Operation(_cotangent, (True, False, True, True), kernels.cpu.cotangent)


def _value_derivative(primals, tangents, *, tree, setting):
    x, params = tree.unflatten(primals)
    y, *parts = value(setting, x, params)
    tx, *tparams = tangents
    if all(type(t) is ad.Zero for t in tparams):
        tparams = None
    else:
        tparams = jax.tree.structure(params).unflatten(map(ad.instantiate_zeros, tparams))
    return [y, *parts], tangent(setting, x, params, parts, ad.instantiate_zeros(tx), tparams)


def _tangent_transpose(cotangents, *leaves, tree, setting):
    linear = [ad.is_undefined_primal(leaf) for leaf in leaves]
    x, params, parts, _, tparams = tree.unflatten(leaves)
    dy, *dparts = cotangents
    if type(dy) is not ad.Zero and all(type(d) is ad.Zero for d in dparts):
        setting = setting._replace(of_params=tparams is not None)
        dx, *dparams = cotangent(setting, x, params, parts, dy)
        # One tangent of the parameters is that of all maps.
        grads = [dx, *(jnp.sum(d, range(setting.maps)) for d in dparams)]
        grads = [None] * (len(leaves) - len(grads)) + grads
    else:
        # Somebody differentiates the statistics themselves: JAX transposes the formula.
        def function(*given):
            given = iter(given)
            filled = [
                next(given) if is_linear else leaf
                for leaf, is_linear in zip(leaves, linear, strict=True)
            ]
            return tangent.on_leaves(tree, setting)(*filled)

        zeros = [ad.zeros_like_aval(leaf.aval) for leaf in leaves if ad.is_undefined_primal(leaf)]
        found = iter(jax.vjp(function, *zeros)[1]([*map(ad.instantiate_zeros, cotangents)]))
        grads = [next(found) if is_linear else None for is_linear in linear]
    return [grad if is_linear else None for grad, is_linear in zip(grads, linear, strict=True)]


ad.primitive_jvps[value.primitive] = _value_derivative
ad.primitive_transposes[tangent.primitive] = _tangent_transpose
