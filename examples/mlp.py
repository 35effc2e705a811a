"""A fully connected network with pure functions: do norms allow larger learning rates?

    python examples/mlp.py

Six hidden layers are trained by gradient descent with momentum at six learning rates, without a
norm, with batch norm and with layer norm. There are two tasks: to classify scikit-learn's
handwritten digits, and a regression that predicts the lower half of a digit from the upper half.
Parameters, running statistics and momenta are arguments and results of `train_step`. A run stops
when its loss is not finite, and is marked in the figure.

It takes 1 min 40 s on two CPU cores. Expected: all three classify equally well (97 % of the test
images, batch norm 98 %). They stay within 5 points of that up to learning rate 0.1 without a norm
and with layer norm, and up to 1 with batch norm. The regression reaches R² 0.48 without a norm,
0.47 with batch norm and 0.34 with layer norm. At learning rate 3 the network without a norm also
learns it, and the two networks with norms do not.
"""

import argparse
import math
from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax
from figures import LOOKS, curve, save_figure
from image_datasets import Labelled, draw_batch, load_dataset
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

import jaxnorm as jn

HIDDEN = (128,) * 6
TASKS = ("classification", "regression")
NORMS = ("none", "batch", "layer", "rms")
DEFAULT = ["none", "batch", "layer"]
SHOWN = {"classification": (1e-4, 1e2), "regression": (1e-2, 1e1)}  # losses in the figure
NEAR = 0.05  # scores this close to the best count as learned


class Layer(NamedTuple):
    """The weights of a linear layer, and the scale and bias of the norm after it."""

    weights: jax.Array
    scale: jax.Array
    bias: jax.Array


class State(NamedTuple):
    """Everything that training changes."""

    layers: list[Layer]
    running: list[jn.BatchNormState]  # one for each hidden layer
    momenta: Any


@partial(jax.jit, static_argnames=("sizes", "optimizer"))
def initialize(seed: int, sizes: tuple[int, ...], optimizer: optax.GradientTransformation) -> State:
    """He's initial weights: the same for all norms and learning rates."""
    keys = jax.random.split(jax.random.key(seed), len(sizes) - 1)
    layers = [
        Layer(jax.nn.initializers.he_normal()(key, (n, m)), jnp.ones(m), jnp.zeros(m))
        for key, n, m in zip(keys, sizes, sizes[1:], strict=False)
    ]
    running = [jn.init_batch_norm_state(size) for size in sizes[1:-1]]
    return State(layers, running, optimizer.init(layers))


def apply(norm: str, layers: list[Layer], running: list, x: jax.Array, *, train: bool):
    """The network's output for x of shape (batch, features), and the new running statistics."""
    *hidden, last = layers
    moved = []
    for layer, state in zip(hidden, running, strict=True):
        x, params = x @ layer.weights, jn.NormParams(layer.scale, layer.bias)
        if norm == "batch":
            x, state = jn.batch_norm(x, state, params=params, train=train, momentum=0.9)
        elif norm == "layer":
            x = jn.layer_norm(x, params)
        elif norm == "rms":
            x = jn.rms_norm(x, params)
        else:
            x = x * layer.scale + layer.bias
        moved.append(state)
        x = jax.nn.relu(x)
    return x @ last.weights + last.bias, moved


def loss_of(task: str, output: jax.Array, target: jax.Array) -> jax.Array:
    """Cross-entropy of classes, or the mean square."""
    if task == "classification":
        return optax.softmax_cross_entropy_with_integer_labels(output, target).mean()
    return jnp.square(output - target).mean()


@partial(jax.jit, static_argnames=("task", "norm", "optimizer"), donate_argnames="state")
def train_step(state: State, x, target, *, rate, task, norm, optimizer):
    """One step of gradient descent with momentum."""

    def objective(layers):
        output, running = apply(norm, layers, state.running, x, train=True)
        return loss_of(task, output, target), running

    (loss, running), gradient = jax.value_and_grad(objective, has_aux=True)(state.layers)
    updates, momenta = optimizer.update(gradient, state.momenta)
    layers = jax.tree.map(lambda p, update: p - rate * update, state.layers, updates)
    return State(layers, running, momenta), {"loss": loss}


def score_of(task: str, norm: str, state: State, data: Labelled) -> float:
    """Return the fraction classified right, or the fraction of the variance explained (R²)."""
    output, _ = apply(norm, state.layers, state.running, jnp.asarray(data.images), train=False)
    if task == "classification":
        return float((output.argmax(-1) == data.labels).mean())
    unexplained = np.square(output - data.labels).mean()
    return float(1 - unexplained / np.square(data.labels - data.labels.mean(0)).mean())


def load(task: str) -> tuple[Labelled, Labelled]:
    """Digits for training and testing: rows of 64 pixels, or of the upper and the lower 32."""
    digits = load_dataset("digits")
    mean = digits.train.images.mean(0)  # subtracted, because all rows are similar otherwise

    def flat(part: Labelled) -> Labelled:
        pixels = (part.images - mean).reshape(-1, 64)
        return (
            Labelled(pixels, part.labels) if task == TASKS[0] else Labelled(*np.hsplit(pixels, 2))
        )

    return flat(digits.train), flat(digits.test)


def study(args: argparse.Namespace) -> None:
    """Train with every norm at every learning rate."""
    optimizer = optax.trace(decay=0.9)
    histories, rows = {}, []
    for task in args.tasks:
        train, test = load(task)
        sizes = (train.images.shape[1], *HIDDEN, 10 if task == TASKS[0] else 32)
        for norm, rate in product(args.norms, args.learning_rates):
            step = partial(train_step, rate=rate, task=task, norm=norm, optimizer=optimizer)
            scores, histories[task, norm, rate] = [], []
            for seed in range(args.seeds):
                batch = partial(draw_batch, train, args.batch_size, seed)
                state = initialize(seed, sizes, optimizer)
                try:
                    name = f"{task}-{norm}-{rate}-{seed}"
                    state, history = common.train(args, name, state, step, batch)
                    scores.append(score_of(task, norm, state, test))
                except common.DivergedError as error:  # divergence is a result of this study
                    print(error)
                    history = error.history
                histories[task, norm, rate].append(history)
            score = float(np.mean(scores)) if len(scores) == args.seeds else math.nan
            rows.append(
                {"task": task, "norm": norm, "learning_rate": rate, "finite_runs": len(scores)}
                | {"test_score": score}
            )
    common.report(args.out, rows)
    print(*conclude(rows), sep="\n")
    draw(args, histories, rows)


def conclude(rows: list[dict[str, Any]]) -> list[str]:
    """Describe how well each norm learns, and up to which learning rate."""
    said = []
    for task, norm in dict.fromkeys((row["task"], row["norm"]) for row in rows):
        mine = [row for row in rows if (row["task"], row["norm"]) == (task, norm)]
        mine = [row for row in mine if not math.isnan(row["test_score"])]
        text = f"{task}, {LOOKS[norm].name}: "
        if mine:
            best = max(mine, key=lambda row: row["test_score"])
            near = [row for row in mine if row["test_score"] > best["test_score"] - NEAR]
            text += f"{best['test_score']:.3f} at learning rate {best['learning_rate']:g}, and "
            text += f"within {NEAR} of it up to {max(row['learning_rate'] for row in near):g}"
        said.append(text if mine else f"{text}every learning rate diverged")
    return said


def draw(args: argparse.Namespace, histories: dict, rows: list[dict[str, Any]]) -> None:
    """Draw the training loss of each norm at each rate, and the scores against the rate."""
    figure = Figure((3 * len(args.norms) + 4, 3.4 * len(args.tasks)), layout="constrained")
    grid = figure.subplots(len(args.tasks), len(args.norms) + 1, squeeze=False)
    colors = colormaps["viridis_r"](np.linspace(0.1, 1, len(args.learning_rates)))
    for (*panels, last), task in zip(grid, args.tasks, strict=True):
        for axes, norm in zip(panels, args.norms, strict=True):
            for rate, color in zip(args.learning_rates, colors, strict=True):
                for runs in histories[task, norm, rate]:
                    if runs:
                        axes.semilogy(*curve([runs]), color=color, label=f"{rate:g}")
                        if len(runs) < args.steps:
                            last_loss = np.clip(runs[-1]["loss"], *SHOWN[task])
                            axes.plot(len(runs), last_loss, "x", color=color, clip_on=False)
            axes.set(ylim=SHOWN[task], title=f"{task}, {LOOKS[norm].name}", xlabel="step")
            axes.sharey(panels[0])
        panels[0].set_ylabel("training loss")
        for norm in args.norms:
            mine = [row for row in rows if (row["task"], row["norm"]) == (task, norm)]
            name, color, marker = LOOKS[norm]
            x, y = zip(*((row["learning_rate"], row["test_score"]) for row in mine), strict=True)
            last.semilogx(x, y, color=color, marker=marker, label=name)
        last.set(title=f"{task}, test", xlabel="learning rate", ylim=(-0.05, 1.05))
        last.set_ylabel("accuracy" if task == TASKS[0] else "R²")
        last.legend(frameon=False)
    handles = [Line2D([], [], color=color) for color in colors]
    figure.legend(
        handles,
        [f"{rate:g}" for rate in args.learning_rates],
        title="learning rate (a line for each seed; a cross where it stopped, its loss not finite)",
        loc="outside lower center",
        ncols=len(handles),
        frameon=False,
    )
    save_figure(figure, args.out / "figure.png")


def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line and run the study."""
    parser = common.make_parser(
        "mlp",
        __doc__,
        NORMS,
        steps=300,
        seeds=3,
        batch_size=64,
        norms=DEFAULT,
        checkpoint_every=300,
        free=("tasks", "learning_rates"),
    )
    add = parser.add_argument
    add("--tasks", type=common.one_of(TASKS), default=list(TASKS), help="default: both")
    rates = "0.01,0.03,0.1,0.3,1,3"
    add("--learning-rates", type=common.numbers, default=rates, help="default: %(default)s")
    return common.run(parser, argv, {"steps": 100, "seeds": 1}, study)


if __name__ == "__main__":
    common.leave(main())
