"""Which norm at which batch size? Train one small network with each norm and compare.

    python examples/compare_norms.py

Each norm gets the same convolutional network, initial weights, batches, optimizer and learning
rates, on real images: scikit-learn's handwritten digits, or others with --dataset. A table and
conclusions are printed; figure.png and runs.csv, with every run, are written to --out. After an
interruption the same command continues where it stopped.

It takes 1 min 40 s on two CPU cores, most of it compilation. Expected accuracy: batch norm 98 % at
batch sizes 2 to 64 and 97 % at 256; the other norms 96 to 98 % and 89 to 91 %; no norm 94 to 97 %
and 89 %.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import leave
from comparison import (
    CURVE_POINTS,
    Run,
    Study,
    conclude,
    draw,
    read_runs,
    tabulate,
    write_runs,
)
from figures import LOOKS
from image_datasets import NAMES, Dataset, Labelled, load_dataset
from storage import UserError
from tqdm import tqdm

import jaxnorm.linen as jn

# Layer and rms norm have statistics over all of one image, as in Wu & He, "Group Normalization"
# (arXiv:1803.08494), and scale each channel like the other norms.
WHOLE_IMAGE = {"reduction_axes": (1, 2, 3), "feature_axes": -1}
NORMS: dict[str, Callable[[bool, float], Callable[[jax.Array], jax.Array]]] = {
    "none": lambda train, momentum: lambda x: x,
    "batch": lambda train, momentum: jn.BatchNorm(use_running_average=not train, momentum=momentum),
    "layer": lambda train, momentum: jn.LayerNorm(**WHOLE_IMAGE),
    "group": lambda train, momentum: jn.GroupNorm(num_groups=4),
    "instance": lambda train, momentum: jn.InstanceNorm(),
    "rms": lambda train, momentum: jn.RMSNorm(**WHOLE_IMAGE),
}
CONVOLUTIONS = ((8, 1), (16, 2), (16, 1))  # channels and stride of each
# Without --steps all runs see this number of images, so small batches take more steps.
IMAGES_SEEN = 16_384
# At batch size 64; at others it is scaled by the square root of the ratio, the usual rule for Adam.
# It is the highest of 0.005, 0.01, 0.02 and 0.04 that works for every norm: at 0.04 layer and rms
# norm lose 7 and 10 points at batch size 256.
LEARNING_RATE = 0.02
RECIPE = 1  # increase it with every change to this file that changes the results of a run


class Network(nn.Module):
    """Three convolutions, each with a norm and a ReLU, then a mean over pixels and a layer."""

    norm: str
    momentum: float = 0.9

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Return the logits of ten classes for images of shape (count, height, width, channels)."""
        for channels, stride in CONVOLUTIONS:
            # A 3 x 3 convolution as a product with patches, with the same initialization. At batch
            # size 256, in a loop on the CPU, it is about ten times as fast as XLA's convolution.
            x = nn.Dense(channels)(patches(x, stride))
            x = nn.relu(NORMS[self.norm](train, self.momentum)(x))
        return nn.Dense(10)(x.mean(axis=(1, 2)))


def patches(x: jax.Array, stride: int) -> jax.Array:
    """Put the 3 x 3 neighbours of every stride-th pixel side by side in its channels."""
    height, width = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    x = jnp.concatenate([x[:, i : i + height : stride] for i in range(3)], axis=-1)
    return jnp.concatenate([x[:, :, j : j + width : stride] for j in range(3)], axis=-1)


def make_settings(dataset: str, steps: int | None, batch_size: int) -> dict:
    """Return the settings that comparable runs at a batch size share: columns of runs.csv."""
    return {
        "dataset": dataset,
        "device": jax.devices()[0].device_kind,
        "recipe": RECIPE,
        "learning_rate": round(LEARNING_RATE * (batch_size / 64) ** 0.5, 6),
        "steps": steps or max(1, IMAGES_SEEN // batch_size),
    }


def train_cell(
    data: Dataset, norm: str, batch_size: int, seeds: Iterable[int], settings: dict
) -> Iterator[Run]:
    """Train with one norm at one batch size: compile once, then run seed after seed.

    Seeds are not batched with vmap: on the CPU that takes longer to compile and, for large batches,
    to run. Also, this way each run is timed and saved separately.
    """
    steps = settings["steps"]
    # Running statistics average over about the last tenth of the steps, when the learning rate is
    # almost zero and the weights hardly change. They keep exp(-10) of their initial values.
    net = Network(norm, momentum=max(0.0, 1 - 10 / steps))
    train = compile_training(net, data.train, batch_size, settings)
    count = len(data.test.labels)
    seen = Labelled(data.train.images[:count], data.train.labels[:count])
    for seed in seeds:
        variables = initialize(Network(norm), jax.random.key(seed), seen.images[:1])
        batches = jnp.asarray(draw_batches(len(data.train.labels), batch_size, steps, seed))
        start = time.perf_counter()
        variables, losses = jax.block_until_ready(train(variables, *data.train, batches))
        seconds = time.perf_counter() - start
        test_accuracy = measure_accuracy(Network(norm), variables, data.test)
        in_training = measure_accuracy(net, variables, data.test, batch_size, train=True)
        parts = np.array_split(np.asarray(losses), min(CURVE_POINTS, steps))
        curve = [f"{part.mean():.5g}" for part in parts]
        yield Run(
            norm=norm,
            batch_size=batch_size,
            seed=seed,
            **settings,
            test_accuracy=round(test_accuracy, 6),
            train_accuracy=round(measure_accuracy(Network(norm), variables, seen), 6),
            train_eval_gap=round(in_training - test_accuracy, 6),
            final_loss=float(curve[-1]),
            ms_per_step=round(1000 * seconds / steps, 4),
            losses=" ".join(curve),
        )


@partial(jax.jit, static_argnames="net")
def initialize(net: Network, key: jax.Array, image: jax.Array) -> Mapping:
    """Return initial variables: for a key the same weights for all norms."""
    return net.init(key, image, train=False)


def draw_batches(count: int, batch_size: int, steps: int, seed: int) -> np.ndarray:
    """Return the images of each step: whole epochs, one after another, each shuffled."""
    rng = np.random.default_rng(seed)
    epochs = -(-steps * batch_size // count)
    order = np.concatenate([rng.permutation(count) for _ in range(epochs)])
    return order[: steps * batch_size].reshape(steps, batch_size).astype(np.int32)


def compile_training(net: Network, data: Labelled, batch_size: int, settings: dict) -> Callable:
    """Compile a whole run, from variables, images, labels and batches to variables and losses."""
    steps = settings["steps"]

    def schedule(step):  # warm-up over a tenth of the steps, cosine to zero
        warm_up = jnp.minimum(1.0, (step + 1) / max(1, steps // 10))
        return settings["learning_rate"] * warm_up * 0.5 * (1 + jnp.cos(jnp.pi * step / steps))

    optimizer = optax.flatten(optax.adam(schedule))  # one vector compiles faster than many

    def loss_of(params, state, images, labels):
        variables = {"params": params, **state}
        logits, state = net.apply(variables, images, train=True, mutable=list(state))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), state

    def run(variables, images, labels, batches):
        def step(carry, batch):
            params, state, moments = carry
            differentiate = jax.value_and_grad(loss_of, has_aux=True)
            (loss, state), gradient = differentiate(params, state, images[batch], labels[batch])
            with jax.numpy_dtype_promotion("standard"):  # optax.adam needs it
                updates, moments = optimizer.update(gradient, moments)
            return (optax.apply_updates(params, updates), state, moments), loss

        params = variables["params"]
        state = {name: value for name, value in variables.items() if name != "params"}
        (params, state, _), losses = jax.lax.scan(
            step, (params, state, optimizer.init(params)), batches
        )
        return {"params": params, **state}, losses

    variables = jax.eval_shape(partial(initialize, net), jax.random.key(0), data.images[:1])
    batches = jax.ShapeDtypeStruct((steps, batch_size), jnp.int32)
    return jax.jit(run).lower(variables, *data, batches).compile()


def measure_accuracy(
    net: Network, variables: Mapping, data: Labelled, batch_size: int = 256, *, train: bool = False
) -> float:
    """Return the accuracy, in full batches: the last is filled with images of the first."""
    count = len(data.labels)
    batches = np.resize(np.arange(count, dtype=np.int32), (-(-count // batch_size), batch_size))
    classes = classify(net, variables, data.images, batches, train)
    return float((np.ravel(classes)[:count] == np.asarray(data.labels)).mean())


@partial(jax.jit, static_argnames=("net", "train"))
def classify(net: Network, variables: Mapping, images: jax.Array, batches: jax.Array, train: bool):
    """Return the most likely class of each image of each batch."""

    def classify_batch(batch):
        logits, _ = net.apply(variables, images[batch], train=train, mutable=["batch_stats"])
        return logits.argmax(axis=-1)

    return jax.lax.map(classify_batch, batches)


def do_study(args: argparse.Namespace, path: Path) -> Study:
    """Do the missing runs, and save each of them."""
    settings = partial(make_settings, args.dataset, args.steps)
    runs = {(run.norm, run.batch_size, run.seed): run for run in read_runs(path)}
    for run in runs.values():
        for name, wanted in settings(run.batch_size).items():
            if getattr(run, name) != wanted:
                raise UserError(
                    f"the runs in {path} must have the settings of this study, but at batch size "
                    f"{run.batch_size} have {name} {getattr(run, name)} and not {wanted}: "
                    "choose another --out, or the same settings"
                )
    data = load_dataset(args.dataset, args.data_dir)
    if max(args.batch_sizes) > len(data.train.labels):
        raise UserError(
            f"--batch-sizes must not exceed the {len(data.train.labels)} training images, but "
            f"one is {max(args.batch_sizes)}: omit it"
        )
    data = jax.tree.map(jnp.asarray, data)
    cells = [(norm, size) for size in args.batch_sizes for norm in args.norms]
    done = sum((*cell, seed) in runs for cell in cells for seed in range(args.seeds))
    # A progress bar on a terminal, otherwise one line for each cell.
    with tqdm(total=len(cells) * args.seeds, initial=done, unit="run", disable=None) as bar:
        for norm, size in cells:
            seeds = [seed for seed in range(args.seeds) if (norm, size, seed) not in runs]
            if not seeds:
                continue
            bar.set_description(f"{LOOKS[norm].name}, batch size {size}")
            if bar.disable:
                print(f"{LOOKS[norm].name}, batch size {size}", file=sys.stderr, flush=True)
            for run in train_cell(data, norm, size, seeds, settings(size)):
                runs[norm, size, run.seed] = run
                write_runs(path, runs.values())
                bar.update()
    cells = {cell: [runs[*cell, seed] for seed in range(args.seeds)] for cell in cells}
    return Study(args.norms, args.batch_sizes, args.seeds, cells)


def read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(
        description="Compare norms over batch sizes.", allow_abbrev=False
    )
    parser.add_argument("--dataset", choices=NAMES, default="digits")
    parser.add_argument("--data-dir", type=Path, help="folder with the published files")
    parser.add_argument("--norms", default=",".join(NORMS), help="default: %(default)s")
    parser.add_argument("--batch-sizes", default="2,4,16,64,256", help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=4, help="how many; default: %(default)s")
    parser.add_argument("--steps", type=int, help=f"default: {IMAGES_SEEN} / batch size")
    parser.add_argument(
        "--out", type=Path, default=Path("compare_norms"), help="folder for the results"
    )
    args = parser.parse_args(argv)
    args.norms = list(dict.fromkeys(args.norms.replace(" ", "").split(",")))
    for norm in args.norms:
        if norm not in NORMS:
            raise UserError(f"--norms must be some of {','.join(NORMS)}, but has {norm!r}")
    given = args.batch_sizes
    try:
        args.batch_sizes = sorted({int(size) for size in given.split(",")})
    except ValueError:
        raise UserError(f"--batch-sizes must be like 2,16,256, but is {given!r}") from None
    for name in ("batch_sizes", "seeds", "steps"):
        least = np.min(1 if getattr(args, name) is None else getattr(args, name))
        if least < 1:
            raise UserError(f"--{name.replace('_', '-')} must be 1 or more, but has {least}")
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out must be a folder, but {args.out} is a file: choose another")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study, or the rest of it, and report."""
    try:
        args = read_arguments(argv)
        args.out.mkdir(parents=True, exist_ok=True)
        return compare(args, args.out / "runs.csv")
    except (UserError, OSError) as error:
        print(f"compare_norms: {error}", file=sys.stderr)
        return 2


def compare(args: argparse.Namespace, path: Path) -> int:
    """Run the study; if interrupted, say how to continue."""
    try:
        study = do_study(args, path)
        draw(study, args.dataset, args.out / "figure.png")
        print(tabulate(study), *conclude(study), f"\nFigure and runs: {args.out}", sep="\n")
        return 0
    except KeyboardInterrupt:
        kept = len(read_runs(path))
        print(
            f"Interrupted: {path} keeps {kept} runs; the same command continues from there.",
            file=sys.stderr,
        )
        return 130


if __name__ == "__main__":
    leave(main())
