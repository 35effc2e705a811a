"""Audits of the batch norms of a linen model."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict

from jaxnorm.linen.instrumented import by_structure, check_model, instrumented_call
from jaxnorm.tools.audit import audit as audit_norms
from jaxnorm.tools.audit import check_options
from jaxnorm.tools.findings import Findings
from jaxnorm.tools.problems import NormStatistics
from jaxnorm.tools.programs import (
    StaticArguments,
    StaticByKey,
    StaticResult,
    memoize,
    model_arguments,
    partition,
)


def audit(
    model: nn.Module,
    variables: Mapping[str, Any],
    *inputs: Any,
    significance: float = 0.001,
    batch_size: int | None = None,
    **call: Any,
) -> Findings:
    """Find faults in the batch norms of a model.

    The model is called once, in training mode; changes of its variables are dropped.
    `jaxnorm.nnx.audit` describes the findings, and how running and batch statistics are compared.

    Args:
      model: a linen module, whose batch norms are Flax's or jaxnorm's.
      variables: those of the model, with "params" and "batch_stats".
      *inputs: a batch, as in training: the arguments of the model, or one tuple of them as
        `recalibrate` takes it; of (images, labels) the images alone.
      significance: the chance of a finding by sampling alone, of all tests of the model together.
      batch_size: how many examples a batch of training had, if not as many as these inputs.
      **call: other arguments of `model.apply`, such as `train=True` if the model needs it to train,
        or `rngs`.

    Returns:
      A list of `Finding`: path, problem, advice, figures and effect. `print` shows a table; its
      `norms` has what was measured of every batch norm that is called, and `plot_audit` draws it.

    Raises:
      TypeError: the model is not a linen module, or the variables are no mapping.
      ValueError: the model calls no batch norm, or none in training mode, the variables have no
        running statistics, or the significance is not between 0 and 1.

    Examples:
      >>> import flax.linen as nn, jax, jaxnorm.linen as jn
      >>> model = nn.BatchNorm(use_running_average=False)
      >>> x = jax.random.normal(jax.random.key(0), (100, 2))
      >>> variables = model.init(jax.random.key(0), x)
      >>> jn.audit(model, variables, x)[0].problem
      'running statistics were never updated'
      >>> print(jn.audit(model, jn.recalibrate(model, variables, [x]), x))
      No findings in 1 batch norm, at significance 0.001.
    """
    check_model(model, variables)
    check_options(significance, batch_size)
    inputs = model_arguments(inputs[0]) if len(inputs) == 1 else inputs
    static, arrays = partition(call)
    observed, called = _program(by_structure(model), static)(variables, arrays, *inputs)
    modules = called.value
    if not modules:
        raise ValueError("model must have a batch norm, got none; there is nothing to audit.")
    stats: dict[Any, Any] = flatten_dict(variables.get("batch_stats", {}))
    missing = ["/".join(path) or "the model" for path in modules if (*path, "mean") not in stats]
    if missing:
        raise ValueError(
            "variables must have the running statistics of all batch norms in batch_stats, got "
            f"none of {', '.join(missing)}; pass what init returns, with its batch_stats."
        )
    if not any(one.examples.any() for one in observed.values()):
        raise ValueError(
            "the model must have a batch norm that is called in training mode, got none; pass what "
            "makes it train, such as train=True; unfreeze norms that are frozen."
        )
    audited = []
    for path, norm in modules.items():
        mean, var = (stats[(*path, name)] for name in ("mean", "var"))
        name = "/".join(path)
        audited.append(
            NormStatistics(name, mean, var, observed.get(path), norm.epsilon, norm.momentum)
        )
    return audit_norms(audited, significance, batch_size)


@memoize
def _program(model: StaticByKey, static: StaticArguments) -> Callable:
    """Make a program that returns the moments of batches and the batch norms that were called."""

    @jax.jit
    def measure(variables, arrays, *inputs):
        observed, called = instrumented_call(model.value, variables, inputs, static.combine(arrays))
        return observed, StaticResult(called)

    return measure
