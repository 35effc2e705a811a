"""How good a tuned model is, and how far the running statistics of its batch norms are off."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from image_datasets import Labelled

import jaxnorm.nnx as jn


@partial(nnx.jit, static_argnames="size")
def logits_of(model, images, size):
    """Logits in training mode in batches of this size, or for size 0 in evaluation mode."""

    def apply(images):
        copy = nnx.clone(model)
        copy.train() if size else copy.eval()
        return copy(images)

    batches = images.reshape(-1, size or len(images), *images.shape[1:])
    return jax.vmap(apply)(batches).reshape(len(images), 10)


def accuracy(model: nnx.Module, data: Labelled, size: int = 0) -> float:
    """Return the fraction of images classified correctly; `size` as in logits_of."""
    return float((logits_of(model, data.images, size).argmax(-1) == data.labels).mean())


@nnx.jit
def distances(model, images):
    """Return how far the running statistics of each norm are from the statistics of images.

    That is the Wasserstein distance of two normal distributions with these moments, divided by the
    standard deviation of the second, as the root mean square over features.
    """
    measured = nnx.clone(model)
    jn.unfreeze(measured)
    jn.recalibrate(measured, [images])
    norms = lambda model: [m for _, m in nnx.iter_modules(model) if isinstance(m, jn.BatchNorm)]
    found = []
    for norm, right in zip(norms(model), norms(measured), strict=True):
        mean, var = right.mean[...], right.var[...]
        square = (norm.mean[...] - mean) ** 2 + (jnp.sqrt(norm.var[...]) - jnp.sqrt(var)) ** 2
        found.append(jnp.sqrt((square / (var + norm.epsilon)).mean()))
    return jnp.stack(found)


def score(model: nnx.Module, new: Labelled, old: Labelled, size: int) -> dict[str, Any]:
    """Return the scores of a model: on new images, on old images, and after folding.

    The gap is the accuracy on new images in training mode, in batches of a size, minus that in
    evaluation mode.
    """
    folded = jn.fold(model, new.images)
    difference = logits_of(folded, new.images, 0) - logits_of(model, new.images, 0)
    return {
        "new": (evaluated := accuracy(model, new)),
        "gap": accuracy(model, new, size) - evaluated,
        "old": accuracy(model, old),
        "distance": np.asarray(distances(model, new.images)),
        "folded": accuracy(folded, new),
        "difference": float(jnp.abs(difference).max()),
    }


def summary(way: str, scores: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of a way: means and standard deviations over seeds, and the largest difference."""
    row: dict[str, Any] = {"way": way}
    for key in ("new", "gap", "old", "distance", "folded"):
        values = [score[key] for score in scores]
        row[key] = float(np.mean(values))
        if key in ("new", "gap", "old"):
            row[f"{key}_sd"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return row | {"difference": max(score["difference"] for score in scores)}
