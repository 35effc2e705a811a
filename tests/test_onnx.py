"""ONNX's own node cases for all normalizations that it has, features first as ONNX has them."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jaxnorm as jn

pytest.importorskip("onnx", reason="ONNX is in the extra 'peers'")

# How many cases each has.
OPERATORS = {
    "BatchNormalization": 4,
    "GroupNormalization": 2,
    "InstanceNormalization": 2,
    "LRN": 2,
    "LayerNormalization": 19,
    "LpNormalization": 6,
    "MeanVarianceNormalization": 1,
    "RMSNormalization": 19,
}


@functools.cache  # they can be collected only once
def all_cases() -> list[Any]:
    from onnx.backend.test.case import node  # pyright: ignore[reportMissingImports] (optional)

    return [case for case in node.collect_testcases() if case.model and case.data_sets]


def cases(operator):
    for case in all_cases():
        node = case.model.graph.node[0]
        if node.op_type == operator and "expanded" not in case.name:
            attributes = {a.name: a.f or a.i or tuple(a.ints) or 0 for a in node.attribute}
            yield case.name, attributes, case.data_sets[0]


def normalize(operator, attributes, x, *arrays):
    """ONNX's outputs for its inputs and attributes."""
    epsilon = attributes.get("epsilon", 1e-5)
    params = jn.NormParams(*map(jnp.asarray, arrays[:2]))
    if operator == "BatchNormalization":
        train = bool(attributes.get("training_mode", 0))
        mean, var = map(jnp.asarray, arrays[2:])
        state = jn.BatchNormState(mean, var, jnp.zeros((), jnp.int32))
        y, state = jn.batch_norm(
            x,
            state,
            params=params,
            train=train,
            momentum=attributes.get("momentum", 0.9),
            epsilon=epsilon,
            feature_axis=1,
        )
        return (y, *state[:2]) if train else (y,)
    if operator == "GroupNormalization":
        groups = attributes["num_groups"]
        return (jn.group_norm(x, params, num_groups=groups, feature_axis=1, epsilon=epsilon),)
    if operator == "InstanceNormalization":
        return (jn.instance_norm(x, params, feature_axis=1, epsilon=epsilon),)
    if operator == "LRN":
        options = {"alpha": 1e-4, "beta": 0.75, "bias": 1.0, **attributes}
        options["k"] = options.pop("bias")
        return (jn.local_response_norm(x, feature_axis=1, **options),)
    if operator == "LpNormalization":
        return (jn.unit_norm(x, axis=attributes.get("axis", -1), ord=attributes.get("p", 2)),)
    if operator == "MeanVarianceNormalization":
        # ONNX adds 1e-9 to the standard deviation.
        axes = attributes.get("axes", (0, 2, 3))
        return (jn.layer_norm(x, axis=axes, epsilon=1e-18),)
    axis = tuple(range(attributes.get("axis", -1) % x.ndim, x.ndim))
    if operator == "RMSNormalization":
        return (jn.rms_norm(x, params, axis=axis, epsilon=epsilon),)
    mean, var, _ = jn.moments(x, axis)
    y = jn.layer_norm(x, params, axis=axis, epsilon=epsilon)
    kept = x.shape[: x.ndim - len(axis)] + (1,) * len(axis)
    return y, mean.reshape(kept), 1 / jnp.sqrt(var + epsilon).reshape(kept)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # ONNX divides by zero in other cases
@pytest.mark.parametrize("operator", OPERATORS)
def test_node_cases(operator):
    names = []
    for name, attributes, (inputs, outputs) in cases(operator):
        ours = normalize(operator, attributes, *inputs)
        assert len(ours) == len(outputs), name
        for result, expected in zip(ours, outputs, strict=True):
            # The cases were computed in float32, naively.
            np.testing.assert_allclose(result, expected, rtol=1e-5, atol=2e-6, err_msg=name)
        names.append(name)
    assert len(names) == OPERATORS[operator]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_these_are_all():
    """A case of a new operator, or of a new version of ONNX, is to be added above."""
    operators = [case.model.graph.node[0].op_type for case in all_cases()]
    found = {name for name in operators if "Normalization" in name or name == "LRN"}
    assert found == set(OPERATORS)
    assert sum(OPERATORS.values()) == 55
