"""A character transformer in nnx: layer or rms norm, before or after each block, or no norm.

    python examples/transformer.py
    python examples/transformer.py --text BOOK.txt --norms pre-rms --qk-norm --steps 5000

It learns the source of Python's standard library, computes in bfloat16 with float32 parameters, and
writes some text at the end. Pre-norm normalizes the inputs of attention and feed-forward, inside
the residual branch. Post-norm normalizes the sum after it. In both the norm follows a residual sum,
which jaxnorm takes in the same pass (jn.AddLayerNorm). --qk-norm normalizes queries and keys,
here with rms norm for each head, so the attention logits can't grow with their size.

It takes 7 min 20 s on two CPU cores. Expected, in bits per character of held-out text: 3.13 with
layer pre-norm, 3.12 with rms pre-norm, 3.00 with layer post-norm, 2.90 with no norm. With
--learning-rate 0.01: 2.77, 2.79, 4.57 and 2.65.
"""

import argparse
import math
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax
from figures import LOOKS, curve, save_figure
from flax import nnx
from matplotlib.figure import Figure
from storage import replacing
from text_dataset import KNOWN, decode, load_text, windows

import jaxnorm.nnx as jn

NORMS = ("pre-layer", "pre-rms", "post-layer", "post-rms", "none")
DEFAULT = ["pre-layer", "pre-rms", "post-layer", "none"]
FEATURES, HEADS, LAYERS, LENGTH = 64, 4, 6, 64


def no_norm(change: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the sum alone, where the norms return the normalized sum and the sum."""
    return change + x, change + x


ADD_NORMS = {"layer": jn.AddLayerNorm, "rms": jn.AddRMSNorm, "": lambda *_, **__: no_norm}
DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}


class Block(nnx.Module):
    """Attention and feed-forward, each with a residual connection.

    Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762 (post-norm); Xiong et al.,
    "On Layer Normalization in the Transformer Architecture", 2020, arXiv:2002.04745 (pre-norm);
    Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, arXiv:1910.07467; Henry et
    al., "Query-Key Normalization for Transformers", 2020, arXiv:2010.04245 (with the L2 norm).
    """

    def __init__(self, norm: str, qk_norm: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        """Initialize the weights."""
        self.place, _, kind = norm.partition("-")
        norm_of = partial(ADD_NORMS[kind], dtype=dtype, rngs=rngs)
        self.norms = nnx.List([norm_of(FEATURES), norm_of(FEATURES)])
        self.qk_norms = nnx.List(
            [jn.RMSNorm(FEATURES // HEADS, dtype=dtype, rngs=rngs) for _ in range(2 * qk_norm)]
        )
        linear = partial(nnx.Linear, dtype=dtype, rngs=rngs)
        self.qkv = linear(FEATURES, 3 * FEATURES, use_bias=False)
        self.out = linear(FEATURES, FEATURES)
        self.wide = linear(FEATURES, 4 * FEATURES)
        self.narrow = linear(4 * FEATURES, FEATURES)

    def __call__(self, x: jax.Array, change: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Map x, of shape (batch, time, features), and a change that is not yet added to it."""
        for norm, branch in zip(self.norms, (self.attend, self.feed), strict=True):
            if self.place == "post":
                x, _ = norm(branch(x), x)
            else:
                normed, x = norm(change, x)
                change = branch(normed)
        return x, change

    def attend(self, x: jax.Array) -> jax.Array:
        """Causal attention: mix each position with the positions before it."""
        q, k, v = jnp.unstack(self.qkv(x).reshape(*x.shape[:2], 3, HEADS, -1), axis=2)
        if self.qk_norms:
            q, k = self.qk_norms[0](q), self.qk_norms[1](k)
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.reshape(x.shape))

    def feed(self, x: jax.Array) -> jax.Array:
        """Two layers, applied to each position separately."""
        return self.narrow(nnx.gelu(self.wide(x)))


class Transformer(nnx.Module):
    """Maps characters to the logits of the next ones."""

    def __init__(self, norm: str, qk_norm: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        """Initialize the weights. All parameters are float32, those of the norms too."""
        self.embed = nnx.Embed(KNOWN, FEATURES, dtype=dtype, rngs=rngs)
        self.position = nnx.Embed(LENGTH, FEATURES, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List([Block(norm, qk_norm, dtype, rngs) for _ in range(LAYERS)])
        place, _, kind = norm.partition("-")
        self.last_norm = ADD_NORMS[kind if place == "pre" else ""](FEATURES, dtype=dtype, rngs=rngs)
        self.readout = nnx.Linear(FEATURES, KNOWN, dtype=dtype, rngs=rngs)

    def __call__(self, characters: jax.Array) -> jax.Array:
        """Map (batch, time) to float32 logits of shape (batch, time, KNOWN)."""
        x = self.embed(characters) + self.position(jnp.arange(characters.shape[1]))
        change = jnp.zeros_like(x)
        for block in self.blocks:
            x, change = block(x, change)
        normed, _ = self.last_norm(change, x)
        return self.readout(normed).astype(jnp.float32)


def loss_of(model: Transformer, pieces: jax.Array) -> jax.Array:
    """Return the cross-entropy of each next character."""
    logits = model(pieces[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, pieces[:, 1:]).mean()


@partial(jax.jit, static_argnames="graph", donate_argnames="state")
def train_step(state, pieces, *, graph):
    """One step of Adam."""
    model, optimizer = nnx.merge(graph, state)
    loss, gradient = nnx.value_and_grad(loss_of)(model, pieces)
    optimizer.update(model, gradient)
    return nnx.state((model, optimizer)), {"loss": loss, "gradient": optax.tree.norm(gradient)}


@partial(jax.jit, static_argnames="graph")
def evaluate(state, pieces, *, graph):
    """Return the loss on a batch."""
    return loss_of(nnx.merge(graph, state)[0], pieces)


@partial(jax.jit, static_argnames=("graph", "count"))
def write(state, prompt, key, *, graph, count):
    """Continue the prompt: sample each character from the LENGTH characters before it."""
    model, _ = nnx.merge(graph, state)

    def step(past, key):
        drawn = jax.random.categorical(key, model(past[None])[0, -1] / 0.8)  # temperature 0.8
        return jnp.append(past[1:], drawn), drawn

    return jax.lax.scan(step, prompt, jax.random.split(key, count))[1]


def study(args: argparse.Namespace) -> None:
    """Train with each norm, and report scores, figures and a text sample."""
    text = load_text(args.text)
    test = windows(text.test, 256, LENGTH + 1, np.random.default_rng(0))
    warm_up = min(100, args.steps // 10)
    schedule = optax.warmup_cosine_decay_schedule(0, args.learning_rate, warm_up, args.steps)
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))
    histories, rows, written = {}, [], []
    for norm, seed in product(args.norms, range(args.seeds)):
        model = Transformer(norm, args.qk_norm, DTYPES[args.dtype], nnx.Rngs(seed))
        graph, state = nnx.split((model, nnx.Optimizer(model, adam, wrt=nnx.Param)))

        def batch(number, seed=seed):
            rng = np.random.default_rng((seed, number))
            return (windows(text.train, args.batch_size, LENGTH + 1, rng),)

        step = partial(train_step, graph=graph)
        state, history = common.train(
            args, f"{norm}-{seed}", state, step, batch, data=text.digest()
        )
        histories.setdefault(norm, []).append(history)
        losses = [evaluate(state, part, graph=graph) for part in np.split(test, 8)]
        rows.append({"norm": norm, "seed": seed, "bits": float(np.mean(losses)) / math.log(2)})
        prompt = test[0, :LENGTH]
        drawn = write(state, prompt, jax.random.key(seed), graph=graph, count=args.write)
        written.append((rows[-1]["bits"], norm, decode(prompt), decode(drawn)))
    bits, norm, prompt, drawn = min(written)
    sample = f"{norm}, {bits:.3f} bits per character, continues {prompt[-40:]!r}:\n\n{drawn}\n"
    with replacing(args.out / "sample.txt") as unfinished:
        unfinished.write_text(sample)
    print(f"{sample}\n")
    common.report(args.out, rows)
    draw(args, histories, rows)


def draw(args: argparse.Namespace, histories: dict, rows: list[dict]) -> None:
    """Draw the loss of each norm, and the norm of its gradient."""
    figure = Figure((10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for norm in args.norms:
        place, _, kind = norm.rpartition("-")
        look = LOOKS[kind]
        bits = np.mean([row["bits"] for row in rows if row["norm"] == norm])
        style = {"color": look.color, "linestyle": ":" if place == "post" else "-"}
        steps, losses = curve(histories[norm])
        label = f"{place} {look.name}".strip()
        left.plot(steps, np.divide(losses, math.log(2)), label=f"{label}: {bits:.2f}", **style)
        right.semilogy(*curve(histories[norm], "gradient"), **style)
    left.legend(title="bits per character of held-out text", frameon=False)
    left.set(xlabel="step", ylabel="bits per character, training", title="loss")
    right.set(xlabel="step", ylabel="norm of the gradient", title="gradient, before it is clipped")
    save_figure(figure, args.out / "figure.png")


def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line and run the study."""
    parser = common.make_parser(
        "transformer",
        __doc__,
        NORMS,
        steps=500,
        seeds=1,
        batch_size=32,
        norms=DEFAULT,
        free=("write",),
    )
    add = parser.add_argument
    add("--qk-norm", action="store_true", help="normalize queries and keys")
    add("--text", type=Path, help="a text file to learn; default: Python's standard library")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of computations; default: %(default)s")
    add("--learning-rate", type=common.positive, default=0.002, help="default: %(default)s")
    add("--write", type=common.at_least(1), default=500, help="characters; default: %(default)s")
    return common.run(parser, argv, {"steps": 60, "norms": ["pre-layer", "none"]}, study)


if __name__ == "__main__":
    common.leave(main())
