"""What the devices send each other: from the compiled programs, and by calculation.

    python docs/devices.py            prints the table
    python docs/devices.py --write    also updates docs/devices.md and its picture

It takes about 10 seconds on two CPU cores, and 20 with --write.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxnorm.linen
from benchmarks.accelerators.collectives import Collective, collectives
from jaxnorm.core import devices as core

HERE = Path(__file__).parent
NORMS: dict[str, Any] = {"jaxnorm": jaxnorm.linen.BatchNorm, "Flax": nn.BatchNorm}
FEATURES = 256  # in the table
MEASURED = range(2, 9)  # numbers of devices to compile for
CALCULATED = (16, 64, 256, 1024, 4096)


def compiled(library: str, features: int, devices: int) -> list[Collective]:
    """Return the collectives of one training step of batch norm: forward, and the gradient of x."""
    module = NORMS[library](use_running_average=False, axis_name="data")
    variables = module.init(jax.random.key(0), jnp.zeros((1, features)))
    mesh = jax.make_mesh(
        (devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )
    apply = lambda x: module.apply(variables, x, mutable=["batch_stats"])
    norm = jax.shard_map(apply, mesh=mesh, in_specs=P("data"), out_specs=(P("data"), P()))

    def loss(x):
        y, state = norm(x)
        return jnp.sum(jnp.sin(y)), state

    x = jax.ShapeDtypeStruct((2 * devices, features), jnp.float32)
    return collectives(jax.grad(loss, has_aux=True), x)


def calculated(library: str, features: int, devices: int) -> list[Collective]:
    """Return the same collectives, calculated for any number of devices."""
    size = devices * 4 * 3 * features
    gather = devices <= core.GATHERED_DEVICES and size <= core.GATHERED_BYTES
    way = "Flax" if library == "Flax" else "table" if gather else "sums"
    # The sums of dy and of dy times the standardized x.
    return [*forward(way, features, devices), exchange("all-reduce", 2 * features, devices)]


def forward(way: str, features: int, devices: int) -> list[Collective]:
    """Return the collectives of the forward pass: by a table or by sums, or those of Flax."""
    kinds = {
        "table": [("all-gather", 3)],  # mean (high and low part) and variance
        # The sum of the means; then the sums of their low parts and of the squares.
        "sums": [("all-reduce", 1), ("all-reduce", 2)],
        "Flax": [("all-reduce", 2)],  # means of x and of its square
    }
    return [exchange(kind, times * features, devices) for kind, times in kinds[way]]


def exchange(kind: str, numbers: int, devices: int) -> Collective:
    """Return a collective of `numbers` float32 numbers from each device."""
    return Collective(kind, numbers, 4 * numbers, devices)


def bytes_sent(exchanges: list[Collective]) -> float:
    """Bytes that each device sends."""
    return sum(exchange.bytes_sent for exchange in exchanges)


def table(exchanges: Any = calculated) -> str:
    """The Markdown table, calculated or with the collectives that another function returns."""
    libraries = [f"{library}: collectives | bytes sent" for library in NORMS]
    lines = [f"| devices | source | {' | '.join(libraries)} |", "|---:|---" + "|---:" * 4 + "|"]
    for devices in (*MEASURED, *CALCULATED):
        cells = [f"{devices:,}", "compiled" if devices in MEASURED else "calculated"]
        for library in NORMS:
            found = exchanges(library, FEATURES, devices)
            cells += [str(len(found)), f"{bytes_sent(found):,.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def committed(page: str) -> str:
    """Return the table in the page."""
    _, _, rest = page.partition("<!-- table -->\n")
    return rest.partition("\n<!-- end of table -->")[0]


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description="What the devices of a batch norm exchange.")
    parser.add_argument(
        "--write", action="store_true", help="also write docs/devices.md and its picture"
    )
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", MEASURED[-1])
    rows = table(lambda *case: (compiled if case[-1] in MEASURED else calculated)(*case))
    print(rows)
    if arguments.write:
        from device_pictures import draw

        page, new = (HERE / "devices.md").read_text(), HERE / "devices.new"
        new.write_text(page.replace(committed(page), rows))
        os.replace(new, HERE / "devices.md")
        draw(new)
        os.replace(new, HERE / "devices.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
