"""Audits of the batch norms of an nnx model."""

from collections.abc import Callable
from typing import Any

from flax import nnx

from jaxnorm.nnx.instrumented import call_order, instrumented, norms_of
from jaxnorm.tools.audit import audit as audit_norms
from jaxnorm.tools.audit import check_options
from jaxnorm.tools.findings import Findings
from jaxnorm.tools.problems import NormStatistics
from jaxnorm.tools.programs import (
    StaticArguments,
    StaticResult,
    memoize,
    model_arguments,
    partition,
)


def audit(
    model: nnx.Module,
    *inputs: Any,
    significance: float = 0.001,
    batch_size: int | None = None,
    **call: Any,
) -> Findings:
    """Find faults in the batch norms of a model.

    A copy of the model is called once, in training mode. The model itself does not change, nor do
    its mode and its random numbers. The audit finds:

    - running statistics that were never updated, are not finite, are in half precision, or differ
      between devices that should agree;
    - batch statistics that differ from the running ones by more than sampling explains;
    - features of the batch that are constant or not finite;
    - a momentum that looks like PyTorch's (below 0.5), and an epsilon above the variance.

    The audit tests the significance of each difference between a batch and a running mean or
    variance. Each example, along the first axis of a norm's input, is one sample, because the
    positions of an image depend on each other. Norms with fewer than 8 examples are not tested. The
    running statistics count as an average over batches of `batch_size` examples, by default as many
    as in these inputs.

    For normal data, the chance that a sound model has such a finding is at most `significance`. In
    simulations of a norm with 4 to 256 features and 8 to 1000 examples, the rate was 0 to 1 times
    `significance` for normal data, up to 1.6 times for normal data after ReLU and for gamma data of
    shape 1, up to 6 times for shape 1/2, and up to 12 times if one feature in eight is skewed.
    Within networks it is lower, because norms make their inputs alike.

    A finding means that something differs; its `effect` estimates how much that matters.

    Args:
      model: any nnx module, whose batch norms are Flax's or jaxnorm's.
      *inputs: a batch, as in training: the arguments of the model, or one tuple of them as
        `recalibrate` takes it; of (images, labels) the images alone.
      significance: the chance of a finding by sampling alone, of all tests of the model together.
      batch_size: how many examples a batch of training had, if not as many as these inputs.
      **call: keywords of the model's call, such as `train=True`, if it has any.

    Returns:
      A list of `Finding`: path, problem, advice, figures and effect. `print` shows a table; its
      `norms` has what was measured of every batch norm, and `plot_audit` draws that.

    Raises:
      TypeError: the model is not an nnx module.
      ValueError: it has no batch norm, none is called in training mode, the significance is not
        between 0 and 1, or batch_size is not a positive integer.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxnorm.nnx as jn
      >>> from flax import nnx
      >>> model = jn.BatchNorm(2, momentum=0.9, rngs=nnx.Rngs(0))
      >>> x = jax.random.normal(jax.random.key(0), (100, 2))
      >>> jn.recalibrate(model, [x])
      >>> print(jn.audit(model, x))
      No findings in 1 batch norm, at significance 0.001.
      >>> [finding] = jn.audit(model, 2.0 * x + 1.0)
      >>> finding.problem
      'batch and running statistics differ'
      >>> round(finding.figures["mean_difference"], 1)
      1.1

    References:
      Wilson and Hilferty, "The Distribution of Chi-Square", 1931 (the cube root of a variance).
      Dunn, "Multiple Comparisons Among Means", 1961 (all tests together).
    """
    check_options(significance, batch_size)
    inputs = model_arguments(inputs[0]) if len(inputs) == 1 else inputs
    norms = norms_of(model)
    if not norms:
        raise ValueError("model must have a batch norm, got none; there is nothing to audit.")
    static, arrays = partition(call)
    observed, order = _program(static)(instrumented(model), arrays, *inputs)
    if not any(one.examples.any() for one in observed.values()):
        raise ValueError(
            "the model must have a batch norm that is called in training mode, got none; unfreeze "
            "some, or choose use_running_average by train() and eval()."
        )
    called = [*order.value, *(path for path in norms if path not in order.value)]
    audited = []
    for path in called:
        norm = norms[path]
        mean, var = norm.mean.get_value(), norm.var.get_value()
        audited.append(NormStatistics(path, mean, var, observed[path], norm.epsilon, norm.momentum))
    return audit_norms(audited, significance, batch_size)


@memoize
def _program(static: StaticArguments) -> Callable:
    """Make a program that returns the moments of batches and the order of the calls."""

    @nnx.jit
    def measure(copy, arrays, *inputs):
        with call_order() as order:
            copy(*inputs, **static.combine(arrays))
        observed = {path: norm.observed.get_value() for path, norm in norms_of(copy).items()}
        return observed, StaticResult(tuple(order))

    return measure
