"""Data-parallel training of a network with batch norm, on one device, many devices or many hosts.

    python examples/data_parallel.py                  # every device of this host
    python examples/data_parallel.py --processes 2    # two processes, on this host's CPU

On a cluster, start one process per host; docs/devices.md has the command for each kind of cluster.

The batch is sharded over all devices, and batch norm uses the statistics of the whole batch. So one
device and many train the same network, up to rounding. Parameters, running statistics, optimizer
state and position in the data are saved as checkpoints in --out. The same command continues from
the last one, with exactly the same weights as an uninterrupted run.

On scikit-learn's digits it takes 20 s on two CPU cores, and 40 s with --processes 2. Expected: 98 %
of the test images correct.
"""

import argparse
import functools
import hashlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import at_least
from image_datasets import NAMES, Labelled, draw_batch, load_dataset
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from processes import run_on_this_host
from storage import Checkpoints, UserError, why
from tqdm import tqdm

import jaxnorm
import jaxnorm.linen as jn

CONVOLUTIONS = ((16, 1), (32, 2), (32, 1))  # channels and stride of each
# Also the time until the others notice that a process died without closing its connections.
HEARTBEAT_SECONDS = 20
# Words in JAX's errors when another process has died.
LOST = re.compile(r"gloo|nccl|unavailable|deadline|heartbeat|connection|coordination", re.I)


class Network(nn.Module):
    """Convolutions, each with a synchronized batch norm, and a linear classifier."""

    @nn.compact
    def __call__(self, images: jax.Array, real: jax.Array, train: bool) -> jax.Array:
        """Return logits of ten classes; images that are not real are padding and don't count."""
        x = images
        for channels, stride in CONVOLUTIONS:
            x = nn.Conv(channels, (3, 3), stride, use_bias=False)(x)
            norm = jn.BatchNorm(use_running_average=not train, momentum=0.9, axis_name="data")
            x = nn.relu(norm(x, mask=real[:, None, None, None]))
        return nn.Dense(10)(x.mean((1, 2)))


class State(NamedTuple):
    """Everything that training changes. The step number is the position in the data."""

    params: Any
    batch_stats: Any
    opt_state: Any


def compile_steps(mesh: Mesh, optimizer: optax.GradientTransformation) -> tuple[Callable, ...]:
    """Functions for the initial state, a training step, and the number of correct images."""
    model = Network()
    spread = functools.partial(jax.shard_map, mesh=mesh)
    state_and_batch = (P(), P("data"), P("data"), P("data"))

    @functools.partial(jax.jit, static_argnums=1, out_shardings=NamedSharding(mesh, P()))
    def initialize(key, shape):
        variables = model.init(key, jnp.zeros((1, *shape)), jnp.ones(1, bool), train=False)
        params = variables["params"]
        return State(params, variables["batch_stats"], optimizer.init(params))

    @functools.partial(jax.jit, donate_argnums=0)
    @functools.partial(spread, in_specs=state_and_batch, out_specs=(P(), P()))
    def train_step(state, images, labels, real):
        def mean_loss(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, updates = model.apply(variables, images, real, True, mutable=["batch_stats"])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            total, count = jax.lax.psum((losses.sum(where=real), real.sum()), "data")
            return total / count, updates["batch_stats"]

        # The parameters are replicated, so JAX sums their gradient over the devices.
        compute = jax.value_and_grad(mean_loss, has_aux=True)
        (loss, batch_stats), gradient = compute(state.params)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        return State(optax.apply_updates(state.params, updates), batch_stats, opt_state), loss

    @jax.jit
    @functools.partial(spread, in_specs=state_and_batch, out_specs=P())
    def count_right(state, images, labels, real):
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        logits: Any = model.apply(variables, images, real, train=False)
        return jax.lax.psum(jnp.sum((logits.argmax(-1) == labels) & real), "data")

    return initialize, train_step, count_right


def on_all_devices(mesh: Mesh, batch: Labelled, size: int) -> tuple[jax.Array, ...]:
    """Images, labels and a mask of real ones, padded; each process provides its own part."""
    (images, labels), real = jaxnorm.pad_batch(tuple(batch), -(-size // mesh.size) * mesh.size)
    sharding = NamedSharding(mesh, P("data"))
    return tuple(
        jax.make_array_from_callback(a.shape, sharding, a.__getitem__)
        for a in (images, labels, real)
    )


def train(args: argparse.Namespace) -> None:
    """Train from the last checkpoint, then test."""
    dataset = load_dataset(args.dataset, args.data_dir)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    optimizer = optax.sgd(args.learning_rate, momentum=0.9)
    initialize, train_step, count_right = compile_steps(mesh, optimizer)
    settings = {
        "network": [list(layer) for layer in CONVOLUTIONS],
        "dataset": args.dataset,
        "batch-size": args.batch_size,
        "learning-rate": args.learning_rate,
        "seed": args.seed,
    }
    checkpoints = Checkpoints(args.out, settings)
    state = initialize(jax.random.key(args.seed), dataset.train.images.shape[1:])
    state, start = checkpoints.restore(state)
    say(f"{mesh.size} devices of {jax.process_count()} processes, from step {start}")
    hidden = None if jax.process_index() == 0 else True  # None: shown only on a terminal
    for step in tqdm(range(start, args.steps), "steps", disable=hidden):
        if args.launcher and os.getppid() != args.launcher:
            raise UserError(f"the process that started this one has ended, before step {step}")
        batch = draw_batch(dataset.train, args.batch_size, args.seed, step, drop_last=False)
        state, loss = train_step(state, *on_all_devices(mesh, batch, args.batch_size))
        if (step + 1) % args.checkpoint_every == 0 or step + 1 == args.steps:
            if not np.isfinite(loss):
                raise UserError(f"the loss is {loss} at step {step}: try a lower --learning-rate")
            checkpoints.save(step + 1, state)
    right = count_right(state, *on_all_devices(mesh, dataset.test, len(dataset.test.labels)))
    say(f"{100 * int(right) / len(dataset.test.labels):.1f} % of the test images correct")
    digest = hashlib.sha256(b"".join(np.asarray(a).tobytes() for a in jax.tree.leaves(state)))
    say(f"after {max(start, args.steps)} steps; state {digest.hexdigest()[:16]}")


def say(text: str) -> None:
    """Print, on process 0 only."""
    if jax.process_index() == 0:
        print(text, flush=True)


def read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--dataset", choices=NAMES, default="digits")
    parser.add_argument("--data-dir", type=Path, help="folder with the published files")
    positive = at_least(1)
    parser.add_argument("--steps", type=positive, default=300, help="default: %(default)s")
    parser.add_argument("--batch-size", type=positive, default=100, help="default: %(default)s")
    parser.add_argument("--learning-rate", type=float, default=0.1, help="default: %(default)s")
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument(
        "--out", type=Path, default=Path("data_parallel"), help="folder for the checkpoints"
    )
    parser.add_argument(
        "--checkpoint-every", type=positive, default=50, help="steps; default: %(default)s"
    )
    many = parser.add_argument_group("many processes")
    many.add_argument("--processes", type=positive, help="how many; alone: all on this host")
    many.add_argument("--coordinator", help="HOST:PORT of process 0, the same for all of them")
    many.add_argument("--process-id", type=int, help="number of this process, from 0")
    many.add_argument("--cluster", action="store_true", help="get all of this from the cluster")
    many.add_argument("--launcher", type=int, help=argparse.SUPPRESS)  # the parent's process id
    args = parser.parse_args(argv)
    if args.process_id is not None:
        args.coordinator = args.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    if (args.coordinator is None) != (args.process_id is None):
        parser.error("--coordinator and --process-id must be given together, with --processes")
    if args.cluster and (args.processes or args.coordinator):
        parser.error("--cluster must be given alone: the cluster sets the processes")
    if args.coordinator and args.process_id not in range(args.processes or 0):
        parser.error("--process-id must be at least 0 and less than --processes")
    return args


def meet(args: argparse.Namespace) -> None:
    """Connect to the other processes."""
    try:
        jax.distributed.initialize(
            args.coordinator,
            args.processes,
            args.process_id,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (ValueError, RuntimeError, IndexError) as error:
        raise UserError(
            f"the processes could not connect ({why(error)}): check "
            "--coordinator, or that JAX supports this cluster"
        ) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run, as one process or as one of many."""
    args = read_arguments(argv)
    if args.processes and not args.coordinator:
        return run_on_this_host(
            [__file__, *(sys.argv[1:] if argv is None else argv)], args.processes
        )
    name = "data_parallel.py" if args.process_id is None else f"process {args.process_id}"
    try:
        if args.coordinator or args.cluster:
            meet(args)
        train(args)
    except UserError as error:
        if not args.launcher or args.process_id == 0:  # on one host all have the same error
            print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        text, status = "interrupted; the same command continues from the last checkpoint", 130
    except Exception as error:
        if not (args.coordinator or args.cluster) or not LOST.search(str(error)):
            raise
        text, status = f"lost another process ({why(error)}); start all of them again", 3
    else:
        return 0
    if not args.launcher or status != 130:  # the launcher reports an interrupt itself
        print(f"{name}: {text}", file=sys.stderr, flush=True)
    os._exit(status)  # without waiting for processes that may have died


if __name__ == "__main__":
    sys.exit(main())
