"""Compile for accelerators that this machine does not have.

The compilers come with the wheels: libtpu (the extra `tpu`) compiles for every TPU, and the CUDA
plugin (the extra `cuda`) for every NVIDIA GPU that is described to it. Neither needs the chip.
"""

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

# libtpu reads these when it is loaded. They keep it from looking for a TPU, and let
# several processes load it, as none uses a TPU.
TPU_SETTINGS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# Without the GPU no kernel can be tried out for speed.
OPTIONS = {
    "tpu": {},
    "cuda": {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0},
}
# What XLA needs to know about a GPU, from the files in its folder
# xla/backends/gpu/target_config/specs (openxla/xla); these are equal for all of them.
GPU = """\
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024  thread_dim_limit_y: 1024  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  fpus_per_core: 128  core_count: {cores}  clock_rate_ghz: {clock}
  memory_bandwidth: {bandwidth}  l2_cache_size: {cache}  device_memory_size: {memory}
  cuda_compute_capability {{ {capability} }}
  driver_version: "13.0.0"  runtime_version: "12.8.0"  compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""
H100 = {
    "name": "NVIDIA H100 80GB HBM3",
    "cores": 132,
    "clock": 1.98,
    "bandwidth": 3352320000000,
    "cache": 52428800,
    "memory": 84942979072,
    "capability": "major: 9 feature_extension: ACCELERATED_FEATURES",
}
B300 = {
    "name": "NVIDIA B300",
    "cores": 158,
    "clock": 1.965,
    "bandwidth": 7936000000000,
    "cache": 135528448,
    "memory": 297021865984,
    "capability": "major: 10 minor: 3",
}


class Chip(NamedTuple):
    """An accelerator.

    Attributes:
      name: for the command line and tables.
      platform: "tpu" or "cuda".
      description: of a TPU the name of a topology, of a GPU the numbers of `GPU`.
    """

    name: str
    platform: str
    description: Any

    @property
    def missing(self) -> str | None:
        """Why there is no compiler for it, or None."""
        module, extra = {"tpu": ("libtpu", "tpu"), "cuda": ("jax_cuda13_plugin", "cuda")}[
            self.platform
        ]
        if importlib.util.find_spec(module):
            return None
        return f"{module} is in the extra {extra!r}: pip install -e '.[{extra}]'"

    def devices(self, count: int = 1) -> list[Any]:
        """Return `count` of its devices."""
        found = list(_topology(self, count).devices)
        return found[:count]


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "tpu", "v5e:2x4"),
        Chip("v5p", "tpu", "v5p:2x2x2"),
        Chip("v6e", "tpu", "v6e:2x4"),
        Chip("7x", "tpu", "tpu7x:2x2x1"),
        Chip("H100", "cuda", tuple(H100.items())),
        Chip("B300", "cuda", tuple(B300.items())),
    )
}


@functools.cache
def _topology(chip: Chip, count: int) -> Any:
    if chip.platform == "tpu":
        for name, value in TPU_SETTINGS.items():
            os.environ.setdefault(name, value)
        return topologies.get_topology_desc(platform="tpu", topology_name=chip.description)
    text = GPU.format(**dict(chip.description))
    shape = f"1x{count}x1"
    return topologies.get_topology_desc(platform="cuda", target_config=text, topology=shape)


def compiled(chip: Chip, f: Callable, args: Any, donate: tuple[int, ...] = ()) -> Any:
    """Compile f for one chip; the arguments have shapes and dtypes."""
    sharding = SingleDeviceSharding(chip.devices()[0])
    args = jax.tree.map(lambda a: _placed(a, sharding), args)
    return _compile(chip, f, args, donate)


def compiled_over(
    chip: Chip,
    f: Callable,
    args: Any,
    sharded: tuple[bool, ...],
    count: int = 8,
    axis_name: str | None = None,
    donate: tuple[int, ...] = (),
) -> Any:
    """Compile f for several chips.

    Args:
      chip: their kind.
      f: the function.
      args: its arguments, with shapes and dtypes.
      sharded: for each argument, whether its first axis is divided over the chips.
      count: how many there are.
      axis_name: of `shard_map`, where only the first result is sharded; None is plain `jit`.
      donate: which arguments may be overwritten.
    """
    axis = axis_name or "data"
    mesh = Mesh(np.array(chip.devices(count)), (axis,), axis_types=(AxisType.Auto,))
    specs = tuple(PartitionSpec(axis) if each else PartitionSpec() for each in sharded)
    args = tuple(
        jax.tree.map(lambda a, spec=spec: _placed(a, NamedSharding(mesh, spec)), arg)
        for arg, spec in zip(args, specs, strict=True)
    )
    if axis_name:
        results = (specs[0], PartitionSpec())
        f = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=results)
    return _compile(chip, f, args, donate)


def _compile(chip: Chip, f: Callable, args: Any, donate: tuple[int, ...]) -> Any:
    options: Any = OPTIONS[chip.platform]
    return jax.jit(f, donate_argnums=donate).lower(*args).compile(compiler_options=options)


def _placed(a: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
