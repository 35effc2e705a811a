"""How long devices take to exchange numbers: the model by which `Devices.merge` chooses.

A collective takes a latency, which grows with the number of steps, and the time to send its bytes.
A table of all parts is one all-gather: one start, but on GPUs a step for each device, and each
device sends its part to all the others. Two sums are two starts, but all-reduces know trees, whose
steps grow with the logarithm of the number of devices, and hardly send more for more devices.

Which is faster depends on the network, and a program that is being traced does not know where it
will run. So there are two machines: NVIDIA GPUs, in nodes of 8 that are joined by NVLink, and nodes
that are joined by InfiniBand; and TPUs, which are a torus. The choice is the one that takes less
time if both are equally likely. That is also the choice that loses less time if it is the wrong one
for a machine.

This is a model. The constants are published; nothing was measured on a cluster. Times are in
microseconds and bandwidths in bytes per microsecond: 1000 are 1 GB/s.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

# How NCCL estimates its low-latency protocol (LL), which it uses for small messages: baseLat,
# hwLat, llMaxBws and getNetOverhead in NVIDIA/nccl, src/graph/tuning.cc (2.30), for Hopper.
RING_START, TREE_START = 6.6, 6.8  # baseLat
NVLINK_STEP = 0.6  # hwLat
RING_STEP = 1.0  # the same if there are several nodes: the network is started at each step
NETWORK_RING_STEP, NETWORK_TREE_STEP = 2.7, 5.0  # hwLat
# llMaxBws, of one node, and of more than two with Intel CPUs (19 with AMD's; two nodes have 39 or
# 22.5). NVLink 4 has 450 GB/s and NDR InfiniBand 50 GB/s in each direction for each GPU (NVIDIA's
# data sheets of H100 and ConnectX-7), but this protocol trades bandwidth for latency.
NVLINK_BANDWIDTH, NETWORK_BANDWIDTH = 141e3, 20.4e3
GPUS_IN_A_NODE = 8  # DGX H100

# TPU v5p: 6 links of 1e11 bytes/s in each direction, and about 1 microsecond for a hop
# (jax-ml/scaling-book, tpus.md and sharding.md). Where 3 hops should take 3 microseconds, a profile
# there shows 8: the rest is the start.
TORUS_START, TORUS_HOP, TORUS_BANDWIDTH = 5.0, 1.0, 6 * 1e5


class Machine(NamedTuple):
    """A kind of machine; each field is a function of the number of devices.

    Attributes:
      gather_latency: of an all-gather without its bytes.
      sum_latency: of an all-reduce without its bytes.
      bandwidth: at which each device sends.
    """

    gather_latency: Callable[[int], float]
    sum_latency: Callable[[int], float]
    bandwidth: Callable[[int], float]

    def gather(self, devices: int, size: float) -> float:
        """The time of an all-gather of `size` bytes from each device."""
        return self.gather_latency(devices) + (devices - 1) * size / self.bandwidth(devices)

    def sum(self, devices: int, size: float) -> float:
        """The time of an all-reduce of `size` bytes from each device."""
        sent = 2 * (devices - 1) / devices * size
        return self.sum_latency(devices) + sent / self.bandwidth(devices)

    def two_sums(self, devices: int, size: float) -> float:
        """The time of two all-reduces, one after the other, which send `size` bytes in all."""
        return 2 * self.sum(devices, size / 2)


def gather_is_faster(devices: int, size: float) -> bool:
    """Whether to gather `size` bytes from each device, rather than to sum them in two steps."""
    gather = sum(machine.gather(devices, size) for machine in MACHINES.values())
    return gather <= sum(machine.two_sums(devices, size) for machine in MACHINES.values())


def _nodes(gpus: int) -> float:
    """As a fraction, or the choice would go back and forth where a node is added."""
    return max(1.0, gpus / GPUS_IN_A_NODE)


def _around_gpus(gpus: int) -> float:
    """The steps of a ring."""
    nodes = _nodes(gpus)
    inside = NVLINK_STEP if nodes == 1 else RING_STEP
    return (gpus - nodes) * inside + (nodes - 1) * NETWORK_RING_STEP


def _sum_of_gpus(gpus: int) -> float:
    """By a ring, or by a tree of nodes that are chains: NCCL takes what is faster."""
    chain = (min(gpus, GPUS_IN_A_NODE) - 1) * NVLINK_STEP
    tree = TREE_START + 2 * (chain + math.log2(_nodes(gpus)) * NETWORK_TREE_STEP)
    return min(RING_START + 2 * _around_gpus(gpus), tree)


def _across_torus(chips: int) -> float:
    """Half around the ring of each of the three axes, if these are equally long."""
    return 3 * chips ** (1 / 3) / 2 * TORUS_HOP


# Read-only, because programs that are compiled depend on it.
MACHINES: Mapping[str, Machine] = MappingProxyType(
    {
        # NCCL has no tree for an all-gather (its PAT is for nodes of one GPU, and not logarithmic).
        "GPUs": Machine(
            gather_latency=lambda gpus: RING_START + _around_gpus(gpus),
            sum_latency=_sum_of_gpus,
            bandwidth=lambda gpus: NVLINK_BANDWIDTH if _nodes(gpus) == 1 else NETWORK_BANDWIDTH,
        ),
        # An all-reduce is a reduce-scatter and an all-gather.
        "TPUs": Machine(
            gather_latency=lambda chips: TORUS_START + _across_torus(chips),
            sum_latency=lambda chips: TORUS_START + 2 * _across_torus(chips),
            bandwidth=lambda chips: TORUS_BANDWIDTH,
        ),
    }
)
