"""JAX primitives for the three operations of a norm.

Each operation (operations.py) has a formula, which gives the primitive its types, its derivatives
and its lowering for every platform. If a platform has a kernel that supports the call, the lowering
calls that kernel instead. Two rules connect the operations: the derivative of `forward` is `jvp`,
and the transpose of `jvp` is `vjp`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxnorm import kernels
from jaxnorm._internals import (
    Primitive,
    Zero,
    add_tangents,
    instantiate_zeros,
    is_undefined_primal,
    lower_fun,
    primitive_batchers,
    primitive_jvps,
    primitive_transposes,
    register_lowering,
    varying_axes,
    zeros_like_aval,
)
from jaxnorm.core import operations, taylor
from jaxnorm.core.moments import Statistics
from jaxnorm.core.spec import NormSpec
from jaxnorm.core.standardize import NormParams
from jaxnorm.core.sums import sum_axes


def norm_by_primitives(
    spec: NormSpec, x: jax.Array, residual: jax.Array | None, params: NormParams
) -> tuple[jax.Array, Statistics, jax.Array | None]:
    """Compute y, the statistics, and the residual sum if there is one, by the primitives."""
    y, *stats = forward(spec, *_equally_varying((x, residual, params)))
    residual_sum = stats.pop() if spec.has_residual else None
    return y, operations.statistics_of(spec, stats), residual_sum


def _equally_varying(tree: Any) -> Any:
    """Cast the operands of a primitive so that in shard_map they vary over the same axes."""
    leaves = jax.tree.leaves(tree)
    axes = frozenset().union(*map(varying_axes, leaves))

    def cast(leaf):
        missing = tuple(axes - varying_axes(leaf))
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, tree)


class Operation:
    """A primitive of one operation.

    Attributes:
      formula: a function of a spec and trees of arrays; without the axes that `vmap` adds.
      batched: for each tree, whether its arrays have the axes that `vmap` adds.
      by_kernel: a function of a kernel and the same, with those axes; None if no kernel has it.
    """

    def __init__(
        self, formula: Callable, batched: Sequence[bool], by_kernel: Callable | None = None
    ):
        self.formula, self.batched, self.by_kernel = formula, batched, by_kernel
        self.primitive = Primitive(f"norm_{formula.__name__}")
        self.primitive.multiple_results = True
        self.compiled = jax.jit(self.primitive.bind, static_argnames=("tree", "spec"))
        self.primitive.def_impl(self._run)
        self.primitive.def_abstract_eval(self._types)
        primitive_jvps[self.primitive] = self._derivative
        primitive_batchers[self.primitive] = self._batch
        taylor.define(self.primitive, self.on_leaves)
        register_lowering(self.primitive, functools.partial(self._lower, None))
        for platform in kernels.PLATFORMS:
            lower = functools.partial(self._lower, platform)
            register_lowering(self.primitive, lower, platform=platform)

    def __call__(self, spec: NormSpec, *trees: Any) -> list[jax.Array]:
        leaves, tree = jax.tree.flatten(trees)
        return self.primitive.bind(*leaves, tree=tree, spec=spec)

    def on_leaves(self, tree: Any, spec: NormSpec) -> Callable:
        """Return the formula as a function of arrays."""

        def function(*leaves):
            return self.formula(spec, *tree.unflatten(leaves))

        axes = [0 if batched else None for batched in self._batched_leaves(tree)]
        return operations.over_batch(spec, function, axes)

    def _batched_leaves(self, tree: Any) -> list[bool]:
        pairs = zip(self.batched, tree.children(), strict=True)
        return [batched for batched, child in pairs for _ in range(child.num_leaves)]

    def _run(self, *leaves, **static):
        with jax.disable_jit(False):
            return self.compiled(*leaves, **static)

    def _types(self, *avals, tree, spec):
        return jax.make_jaxpr(self.on_leaves(tree, spec))(*avals).out_avals

    def _derivative(self, primals, tangents, *, tree, spec):
        # Operands whose tangents are zero stay constants: JAX can't transpose a barrier if it does
        # not know that tangents are zero.
        moves = [type(tangent) is not Zero for tangent in tangents]
        chosen = lambda leaves: [a for a, moved in zip(leaves, moves, strict=True) if moved]

        def function(*leaves):
            given = iter(leaves)
            pairs = zip(primals, moves, strict=True)
            return self.on_leaves(tree, spec)(*(next(given) if m else a for a, m in pairs))

        return jax.jvp(function, chosen(primals), chosen(tangents))

    def _batch(self, leaves, dims, *, tree, spec):
        if [dim is not None for dim in dims] == self._batched_leaves(tree):
            leaves = [
                leaf if dim is None else jnp.moveaxis(leaf, dim, 0)
                for leaf, dim in zip(leaves, dims, strict=True)
            ]
            spec = spec._replace(batch_dims=spec.batch_dims + 1)
            results = self.primitive.bind(*leaves, tree=tree, spec=spec)
        else:
            results = jax.vmap(self.on_leaves(tree, spec), dims)(*leaves)
        return results, [0] * len(results)

    def _lower(self, platform, ctx, *leaves, tree, spec):
        function = self.on_leaves(tree, spec)
        if self.by_kernel:
            avals = tree.unflatten(ctx.avals_in)
            params = avals[self.batched.index(False)]
            request = operations.request(spec, avals[0].dtype, params)
            required = spec.implementation == "kernel"
            kernel = kernels.for_program(platform, ctx, request, required=required)
            if kernel:
                by_kernel = functools.partial(self.by_kernel, kernel, spec)
                function = lambda *leaves: by_kernel(*tree.unflatten(leaves))
        return lower_fun(function, multiple_results=True)(ctx, *leaves)


forward = Operation(operations.forward, (True, True, False), operations.forward_by_kernel)
jvp = Operation(operations.jvp, (True, False, True, True, False))
vjp = Operation(operations.vjp, (True, False, True, True, True), operations.vjp_by_kernel)


def _forward_jvp(primals, tangents, *, tree, spec):
    x, residual, params = tree.unflatten(primals)
    results = forward(spec._replace(differentiated=True), x, residual, params)
    stats = results[1:]
    tx, *tparams = tangents
    if spec.has_residual:
        x, tx = stats.pop(), add_tangents(tx, tparams.pop(0))
    if all(type(t) is Zero for t in tparams):
        tparams = None
    else:
        tparams = jax.tree.structure(params).unflatten(map(instantiate_zeros, tparams))
    return results, jvp(spec, x, params, stats, instantiate_zeros(tx), tparams)


def _jvp_transpose(cotangents, *leaves, tree, spec):
    linear = [is_undefined_primal(leaf) for leaf in leaves]
    x, params, stats, _, tparams = tree.unflatten(leaves)
    dy, *dstats = cotangents
    d_residual_sum = dstats.pop() if spec.has_residual else None
    if type(dy) is not Zero and all(type(d) is Zero for d in dstats):
        spec = spec._replace(param_gradients=tparams is not None)
        d_residual_sum = None if type(d_residual_sum) is Zero else d_residual_sum
        dx, *dparams = vjp(spec, x, params, stats, dy, d_residual_sum)
        # All examples that `vmap` has added share one tangent of the parameters.
        added = tuple(range(spec.batch_dims))
        grads = [dx, *(sum_axes(d, added) for d in dparams)]
        grads = [None] * (len(leaves) - len(grads)) + grads
    else:
        # The statistics themselves are differentiated: JAX transposes the formula.
        def function(*given):
            given = iter(given)
            filled = [
                next(given) if is_linear else leaf
                for leaf, is_linear in zip(leaves, linear, strict=True)
            ]
            return jvp.on_leaves(tree, spec)(*filled)

        zeros = [zeros_like_aval(leaf.aval) for leaf in leaves if is_undefined_primal(leaf)]
        found = iter(jax.vjp(function, *zeros)[1]([*map(instantiate_zeros, cotangents)]))
        grads = [next(found) if is_linear else None for is_linear in linear]
    return [grad if is_linear else None for grad, is_linear in zip(grads, linear, strict=True)]


primitive_jvps[forward.primitive] = _forward_jvp
primitive_transposes[jvp.primitive] = _jvp_transpose
