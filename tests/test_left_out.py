"""docs/left_out.md: its code runs, with the results that the page states."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jaxnorm as jn

PAGE = (Path(__file__).parent.parent / "docs" / "left_out.md").read_text()
EXAMPLE: Any = (1, 2, 3)  # the type checker infers an integer
TOL = 1e-5  # some ten roundings of numbers up to ten, in float32


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """What the blocks define, one after the other."""
    names: dict[str, Any] = {}
    with jax.numpy_rank_promotion("allow"):  # as JAX is by default
        for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
            exec(block, names)
    return names


@pytest.fixture
def images(rng):
    return rng.standard_normal((3, 4, 5, 8)).astype(np.float32) + 1


def test_virtual_batch_norm_is_batch_norm_of_the_reference_and_the_example(page, images, rng):
    reference = rng.standard_normal((6, 4, 5, 8)).astype(np.float32)
    y = page["virtual_batch_norm"](images, jn.moments(reference, (0, 1, 2)))
    for example, result in zip(images, y, strict=True):
        together = np.concatenate([reference, example[None]])
        np.testing.assert_allclose(result, oracle.batch_norm(together)[-1], atol=TOL)


def test_recent_moments_are_those_of_all_batches(page, images):
    first, second = images[:1], images[1:]
    merged = page["recent_moments"](first, [jn.moments(second, (0, 1, 2))])
    mean, var, count = oracle.statistics(oracle.wide(images), (0, 1, 2))
    for result, right in zip(merged, (mean, var, count), strict=True):
        np.testing.assert_allclose(result, np.broadcast_to(right.ravel(), 8), rtol=TOL)


def test_switchable_norm_is_each_of_its_three_norms_if_one_wins(page, images):
    truths = (
        oracle.instance_norm(images, epsilon=1e-5),
        oracle.layer_norm(images, axis=EXAMPLE, epsilon=1e-5),
        oracle.batch_norm(images),
    )
    for index, right in enumerate(truths):
        weights = jnp.where(jnp.arange(3) == index, 100.0, 0.0)
        with jax.numpy_rank_promotion("allow"):
            y = page["switchable_norm"](images, jn.init_params(8), weights, weights)
        np.testing.assert_allclose(y, right, atol=TOL)


def test_evonorm_is_its_formula(page, images):
    groups = oracle.wide(images).reshape(3, 4, 5, 2, 4)
    std = np.sqrt(groups.var((1, 2, 4), keepdims=True) + 1e-5)
    right = (groups / (1 + np.exp(-2 * groups)) / std).reshape(images.shape)
    with jax.numpy_rank_promotion("allow"):
        y = page["evonorm_s0"](images, jnp.full(8, 2.0), jn.init_params(8), num_groups=2)
    np.testing.assert_allclose(y, right, atol=TOL)


def test_placements_are_of_the_shape_of_the_stream(page):
    assert len(page["outputs"]) == 5
    for y in page["outputs"].values():
        assert y.shape == page["stream"].shape
    added, _ = jn.add_layer_norm(jnp.tanh(page["stream"]), page["stream"])
    np.testing.assert_allclose(page["outputs"]["post-norm"], added, atol=TOL)


def test_llama_rounds_before_the_product(page):
    """As its authors write it, in PyTorch."""
    torch = pytest.importorskip("torch", reason="PyTorch is in the extra 'peers'")
    x, weight = (
        torch.tensor(np.asarray(page[name], np.float32)).bfloat16() for name in ("half", "weight")
    )
    wide = x.float()
    normalized = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).type_as(x)
    twice = np.asarray(page["rounded_twice"], np.float32)
    np.testing.assert_array_equal(twice, (normalized * weight).float().numpy())
    once = np.asarray(page["rounded_once"], np.float32)
    right = oracle.rms_norm(np.asarray(page["half"], np.float32), np.asarray(weight.float()))
    assert np.abs(once - right).max() < np.abs(twice - right).max()
