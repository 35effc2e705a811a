"""Whole training steps, with norms of jaxnorm or of Flax.

Parameters are float32, activations bfloat16, and the optimizer is SGD with momentum, as in mixed
precision training. Nothing is allocated: `training_step` returns a function and the shapes of its
arguments, for a compiler.

References:
  He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition", 2015, arXiv:1512.03385.
  Xiong et al., "On Layer Normalization in the Transformer Architecture", 2020, arXiv:2002.04745.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import jaxnorm.linen

LIBRARIES = {"jaxnorm": jaxnorm.linen, "Flax": nn}
RATE, MOMENTUM = 0.1, 0.9


class Block(nn.Module):
    """A bottleneck block of a residual network: 1x1, 3x3 and 1x1 convolutions."""

    features: int
    stride: int
    norm: Callable

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(nn.Conv, use_bias=False, dtype=x.dtype)
        y = nn.relu(self.norm()(conv(self.features, (1, 1))(x)))
        y = nn.relu(self.norm()(conv(self.features, (3, 3), self.stride)(y)))
        y = self.norm(scale_init=nn.initializers.zeros)(conv(4 * self.features, (1, 1))(y))
        if x.shape != y.shape:
            x = self.norm()(conv(4 * self.features, (1, 1), self.stride)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """ResNet-50, by default: images to logits."""

    library: str
    axis_name: str | None = None
    blocks: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(
            LIBRARIES[self.library].BatchNorm,
            use_running_average=False,
            axis_name=self.axis_name,
            dtype=x.dtype,
        )
        x = nn.Conv(self.width, (7, 7), 2, use_bias=False, dtype=x.dtype)(x)
        x = nn.max_pool(nn.relu(norm()(x)), (3, 3), (2, 2), "SAME")
        for stage, count in enumerate(self.blocks):
            for place in range(count):
                stride = 2 if stage and not place else 1
                x = Block(self.width * 2**stage, stride, norm)(x)
        return nn.Dense(1000)(jnp.mean(x, (1, 2)).astype(jnp.float32))


class AddLayerNorm(nn.Module):
    """Layer norm of a residual sum, and the sum: what Flax has for it."""

    dtype: Any = None

    @nn.compact
    def __call__(self, x, residual):
        residual_sum = x + residual
        return nn.LayerNorm(dtype=self.dtype)(residual_sum), residual_sum


def attention(h: jax.Array, heads: int) -> jax.Array:
    """Attention with its projections; for a module's `__call__`."""
    width = h.shape[-1]
    dense = functools.partial(nn.DenseGeneral, use_bias=False, dtype=h.dtype)
    q, k, v = (dense((heads, width // heads))(h) for _ in range(3))
    return dense(width, axis=(-2, -1))(jax.nn.dot_product_attention(q, k, v, is_causal=True))


def dense_layers(h: jax.Array) -> jax.Array:
    """Two dense layers; for a module's `__call__`."""
    dense = functools.partial(nn.Dense, use_bias=False, dtype=h.dtype)
    return dense(h.shape[-1])(nn.gelu(dense(4 * h.shape[-1])(h)))


class Layer(nn.Module):
    """A layer of a transformer that normalizes before attention and before its two dense layers."""

    norm: Callable
    heads: int

    @nn.compact
    def __call__(self, x, _):
        x = x + attention(self.norm()(x), self.heads)
        return x + dense_layers(self.norm()(x)), None


class AddingLayer(nn.Module):
    """The same with norms that add: what a branch computes is added by the norm that follows."""

    norm: Callable
    heads: int

    @nn.compact
    def __call__(self, x, branch):
        h, x = self.norm()(branch, x)
        h, x = self.norm()(attention(h, self.heads), x)
        return x, dense_layers(h)


class Transformer(nn.Module):
    """A language model: tokens to logits. With norms that add, the positions are a first branch."""

    library: str
    norm: str = "LayerNorm"
    scan: bool = False
    remat: bool = False
    layers: int = 12
    width: int = 768
    vocabulary: int = 32768

    @nn.compact
    def __call__(self, tokens):
        dtype, heads = jnp.bfloat16, self.width // 64
        has_residual = self.norm == "AddLayerNorm"
        of_flax = has_residual and self.library == "Flax"
        module: Any = AddLayerNorm if of_flax else getattr(LIBRARIES[self.library], self.norm)
        norm = functools.partial(module, dtype=dtype)
        layer = AddingLayer if has_residual else Layer
        if self.remat:
            layer = nn.remat(layer, prevent_cse=not self.scan)
        if self.scan:
            axes: Any = {"params": 0}
            layer = nn.scan(layer, axes, split_rngs={"params": True}, length=self.layers)
        x = nn.Embed(self.vocabulary, self.width, dtype=dtype)(tokens)
        branch = None
        if has_residual:
            positions = nn.Embed(tokens.shape[1], self.width, dtype=dtype)
            branch = jnp.broadcast_to(positions(jnp.arange(tokens.shape[1])), x.shape)
        for _ in range(1 if self.scan else self.layers):
            x, branch = layer(norm, heads)(x, branch)
        h = norm()(branch, x)[0] if has_residual else norm()(x)
        return nn.Dense(self.vocabulary, use_bias=False, dtype=dtype)(h)


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step: its name, its model but for the library, and the shapes of a batch.

    Attributes:
      name: for tables.
      model: makes the model, of a library.
      inputs: shape and dtype.
      labels: their shape.
      axis_name: over which `shard_map` divides the batch and the statistics are shared, or None.
    """

    name: str
    model: Callable
    inputs: jax.ShapeDtypeStruct
    labels: tuple[int, ...]
    axis_name: str | None = None

    @property
    def rows(self) -> bool:
        """Whether all its norms normalize rows, which the GPU kernel supports."""
        return self.name.startswith("transformer")


def steps(small: bool = False) -> list[Step]:
    """Return the training steps; small ones are for tests."""
    images = jax.ShapeDtypeStruct((4, 32, 32, 3) if small else (64, 224, 224, 3), jnp.bfloat16)
    tokens = jax.ShapeDtypeStruct((2, 64) if small else (8, 1024), jnp.int32)
    resnet = functools.partial(ResNet, **{"blocks": (1, 1), "width": 16} if small else {})
    sizes: dict[str, Any] = {"layers": 2, "width": 128, "vocabulary": 256} if small else {}
    transformer = functools.partial(Transformer, **sizes)
    named = lambda **options: functools.partial(transformer, **options)
    image = lambda name, axis: Step(
        name, functools.partial(resnet, axis_name=axis), images, images.shape[:1], axis
    )
    text = lambda name, **options: Step(name, named(**options), tokens, tokens.shape)
    return [
        image("ResNet-50", None),
        image("ResNet-50, axis name", "data"),
        text("transformer, layer norm", norm="LayerNorm"),
        text("transformer, layer norm, scan", norm="LayerNorm", scan=True),
        text("transformer, layer norm, scan and remat", norm="LayerNorm", scan=True, remat=True),
        text("transformer, add layer norm", norm="AddLayerNorm"),
        text("transformer, rms norm", norm="RMSNorm"),
        text("transformer, rms norm, remat", norm="RMSNorm", remat=True),
    ]


def training_step(step: Step, library: str) -> tuple[Callable, tuple]:
    """Return a function of (state, inputs, labels), and the shapes of its arguments."""
    model = step.model(library=library)
    optimizer = optax.sgd(RATE, MOMENTUM)

    def loss(params, stats, inputs, labels):
        variables = {"params": params, **stats}
        logits, stats = model.apply(variables, inputs, mutable=["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
        return jnp.mean(losses), stats

    def update(state, inputs, labels):
        params, stats, momentum = state
        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(
            params, stats, inputs, labels
        )
        if step.axis_name:
            value, grads = jax.lax.pmean((value, grads), step.axis_name)
        updates, momentum = optimizer.update(grads, momentum)
        return (optax.apply_updates(params, updates), stats, momentum), value

    def init(inputs):
        variables = step.model(library=library).init(jax.random.key(0), inputs)
        params = variables.pop("params")
        return params, variables, optimizer.init(params)

    state = jax.eval_shape(init, step.inputs)
    labels = jax.ShapeDtypeStruct(step.labels, jnp.int32)
    return update, (state, step.inputs, labels)
