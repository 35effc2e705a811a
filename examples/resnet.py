"""A small ResNet in linen: batch norm, group norm, or no norm at all.

    python examples/resnet.py
    python examples/resnet.py --dataset cifar10 --data-dir FOLDER --blocks 3 --steps 20000 --seeds 1

Batches are sharded over all devices. Batch norm uses the statistics of the whole batch, and its
running statistics in evaluation. Each network is then fine-tuned on the same images rotated by 90
degrees, four at a time. The statistics of so few images are poor, so it is usual to freeze the
running statistics; for comparison, batch norm is also fine-tuned without freezing them.

It takes 3 min 20 s on two CPU cores. Expected: 98.2 % of the test images correct with batch norm,
97.5 with group norm, 97.4 with none. After fine-tuning on rotated images: 80 % with frozen
statistics, 91 % with the statistics of each batch (the running ones are of upright images), 83 %
with group norm, 75 % with no norm, with standard deviations of 3 to 16 points over the seeds.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import common
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from figures import LOOKS, curve, save_figure
from image_datasets import NAMES, Labelled, draw_batch, load_dataset
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib.figure import Figure
from storage import UserError

import jaxnorm.linen as jn

STAGES = (16, 32, 64)  # channels; each stage but the first halves height and width
NORMS = ("batch", "group", "none")
TUNED = 4  # images in a step of fine-tuning


class Scale(nn.Module):
    """A learned scalar, initially zero: it makes a block without a norm start as zero.

    De and Smith, "Batch Normalization Biases Residual Blocks Towards the Identity Function in Deep
    Networks", 2020, arXiv:2002.10444 (SkipInit).
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Scale x."""
        return x * self.param("scale", nn.initializers.zeros, ())


class ResNet(nn.Module):
    """Residual blocks. The scale of the last norm of a block starts at zero, so only x passes.

    He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition", 2015, arXiv:1512.03385;
    the zero scale is from Goyal et al., "Accurate, Large Minibatch SGD", 2017, arXiv:1706.02677.
    """

    norm: str
    blocks: int  # in each stage, each of two convolutions

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Return logits of ten classes; `train`: batch norm uses the batch, on all devices."""

        def norm(scale_init=nn.initializers.ones) -> Callable:
            if self.norm == "batch":
                return jn.BatchNorm(
                    use_running_average=not train,
                    momentum=0.9,
                    scale_init=scale_init,
                    axis_name="devices",
                )
            if self.norm == "group":
                return jn.GroupNorm(num_groups=8, scale_init=scale_init)
            return Scale() if scale_init is nn.initializers.zeros else lambda x: x

        convolve = partial(nn.Conv, kernel_size=(3, 3), use_bias=self.norm == "none")
        x = nn.relu(norm()(convolve(STAGES[0])(x)))
        for channels in STAGES:
            for block in range(self.blocks):
                stride = 2 if block == 0 and channels != STAGES[0] else 1
                y = nn.relu(norm()(convolve(channels, strides=stride)(x)))
                y = norm(nn.initializers.zeros)(convolve(channels)(y))
                if stride > 1:
                    x = nn.Conv(channels, (1, 1), stride)(x)
                x = nn.relu(x + y)
        return nn.Dense(10)(x.mean((1, 2)))


class State(NamedTuple):
    """Everything that training changes."""

    params: Any
    batch_stats: Any  # empty without batch norm
    opt_state: Any


def make_mesh(count: int) -> Mesh:
    """Return a mesh of the first devices."""
    return jax.make_mesh((count,), ("devices",), (AxisType.Auto,), devices=jax.devices()[:count])


def start(
    params: Any, batch_stats: Any, optimizer: optax.GradientTransformation, mesh: Mesh
) -> State:
    """Return the first state, copied to all devices."""
    state = State(params, batch_stats, optimizer.init(params))
    return jax.tree.map(jnp.copy, jax.device_put(state, NamedSharding(mesh, P())))


def compile_step(
    model: ResNet, optimizer: optax.GradientTransformation, mesh: Mesh, *, frozen: bool = False
) -> Callable:
    """Return a training step; `frozen`: with the running statistics, which do not change."""

    @partial(jax.jit, donate_argnums=0)
    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(), P("devices"), P("devices")),
        out_specs=P(),
    )
    def train_step(state, images, labels):
        def mean_loss(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, updates = model.apply(
                variables, images, train=not frozen, mutable=["batch_stats"]
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return jax.lax.pmean(losses.mean(), "devices"), updates.get("batch_stats", {})

        # The parameters are replicated, so JAX sums their gradient over the devices.
        (loss, stats), gradient = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        return State(optax.apply_updates(state.params, updates), stats, opt_state), {"loss": loss}

    return train_step


@partial(jax.jit, static_argnames="model")
def classify(model: ResNet, state: State, images: jax.Array) -> jax.Array:
    """Return the most likely class of each image, with the running statistics."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits: Any = model.apply(variables, images, train=False)
    return logits.argmax(-1)


def accuracy(model: ResNet, state: State, data: Labelled, size: int = 500) -> float:
    """Return the fraction of images classified correctly."""
    parts = range(0, len(data.labels), size)
    classes = [classify(model, state, data.images[i : i + size]) for i in parts]
    return float((np.concatenate(classes) == data.labels).mean())


def on_its_side(data: Labelled) -> Labelled:
    """Return the same images, rotated by 90 degrees."""
    return Labelled(np.rot90(data.images, axes=(1, 2)).copy(), data.labels)


def study(args: argparse.Namespace) -> None:
    """Train with each norm, fine-tune, and report scores and figures."""
    train, test = load_dataset(args.dataset, args.data_dir)
    mesh, one = make_mesh(jax.device_count()), make_mesh(1)
    if args.batch_size % mesh.size:
        raise UserError(
            f"--batch-size must be a multiple of the {mesh.size} devices, got {args.batch_size}"
        )
    optimizer = optax.sgd(
        optax.warmup_cosine_decay_schedule(0, args.learning_rate, args.steps // 10, args.steps),
        momentum=0.9,
    )
    tuner = optax.sgd(args.learning_rate / 20, momentum=0.9)
    histories, rows = {}, []
    for norm, seed in product(args.norms, range(args.seeds)):
        model = ResNet(norm, args.blocks)
        batch = partial(draw_batch, train, args.batch_size, seed)
        variables = jax.jit(partial(model.init, train=False))(
            jax.random.key(seed), train.images[:1]
        )
        state = start(variables["params"], variables.get("batch_stats", {}), optimizer, mesh)
        step = compile_step(model, optimizer, mesh)
        state, history = common.train(args, f"{norm}-{seed}", state, step, batch)
        histories.setdefault(norm, []).append(history)
        row = {"norm": norm, "seed": seed, "accuracy": accuracy(model, state, test)}

        side = on_its_side(test)
        row["on_their_side"] = accuracy(model, state, side)
        batch = partial(draw_batch, on_its_side(train), TUNED, seed)
        for name, frozen in (("frozen", True), ("not_frozen", False)):
            if norm != "batch" and not frozen:  # there is nothing to freeze
                row["not_frozen"] = None
                continue
            tuned = start(state.params, state.batch_stats, tuner, one)
            step = compile_step(model, tuner, one, frozen=frozen)
            tuned, _ = common.train(
                args, f"{norm}-{seed}-{name}", tuned, step, batch, steps=args.tune_steps
            )
            row[name] = accuracy(model, tuned, side)
        rows.append(row)
    common.report(args.out, rows)
    draw(args, histories, rows)


def draw(args: argparse.Namespace, histories: dict, rows: list[dict[str, Any]]) -> None:
    """Draw the losses, and the accuracies before and after fine-tuning."""
    figure = Figure((11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.3))
    kinds = {
        "accuracy": "upright",
        "on_their_side": "on their side,\nas trained",
        "frozen": "tuned (running\nstatistics frozen)",
        "not_frozen": "tuned\n(not frozen)",
    }
    for place, norm in enumerate(args.norms):
        name, color, _ = LOOKS[norm]
        left.semilogy(*curve(histories[norm]), color=color, label=name)
        for index, kind in enumerate(kinds):
            if kind == "not_frozen" and norm != "batch":
                continue
            scores = [100 * row[kind] for row in rows if row["norm"] == norm]
            x = index + 0.27 * (place - (len(args.norms) - 1) / 2) * (kind != "not_frozen")
            right.bar(x, np.mean(scores), 0.25, color=color)
            right.plot([x] * len(scores), scores, ".", color="gray", markersize=4)
            right.annotate(f"{np.mean(scores):.1f}", (x, 103), ha="center", color=color)
    left.set(xlabel="step", ylabel="training loss (mean over seeds)", title="training, upright")
    left.legend(frameon=False)
    right.set_xticks(range(len(kinds)), kinds.values())
    right.set(ylabel="test accuracy (%), a dot for each seed", ylim=(0, 110), title=args.dataset)
    save_figure(figure, args.out / "figure.png")


def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line and run the study."""
    parser = common.make_parser("resnet", __doc__, NORMS, steps=300, seeds=3, batch_size=64)
    add = parser.add_argument
    add("--dataset", choices=NAMES, default="digits")
    add("--data-dir", type=Path, help="folder of the published files")
    add("--blocks", type=common.at_least(1), default=1, help="in each stage; default: %(default)s")
    add("--learning-rate", type=common.positive, default=0.1, help="default: %(default)s")
    add("--tune-steps", type=common.at_least(1), default=200, help="default: %(default)s")
    return common.run(parser, argv, {"steps": 60, "seeds": 1, "tune_steps": 60}, study)


if __name__ == "__main__":
    common.leave(main())
