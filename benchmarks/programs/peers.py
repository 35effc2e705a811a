"""The compared libraries."""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from benchmarks.programs import jax_norms
from benchmarks.programs.cases import Case
from benchmarks.programs.jax_calls import jax_call
from benchmarks.programs.timing import Call
from benchmarks.programs.torch_calls import torch_call


class Peer(NamedTuple):
    """A library to measure.

    Attributes:
      name: its name in the table and for --peers.
      module: the module to import.
      make: makes the call for a case; raises `UnableError`, or the library's error, if it can't.
      install: the name to install with pip.
      slow_to_compile: whether --quick leaves it out.
    """

    name: str
    module: str
    make: Callable[[Case], Call]
    install: str
    slow_to_compile: bool = False

    @property
    def installed(self) -> bool:
        """Whether its module could be imported."""
        return importlib.util.find_spec(self.module.partition(".")[0]) is not None


PEERS = (
    Peer("jaxnorm", "jaxnorm", partial(jax_call, jax_norms.jaxnorm_norm), "jaxnorm"),
    Peer(
        "jaxnorm (xla)",
        "jaxnorm",
        partial(jax_call, partial(jax_norms.jaxnorm_norm, implementation="xla")),
        "jaxnorm",
    ),
    Peer("flax.linen", "flax.linen", partial(jax_call, jax_norms.linen_norm), "flax"),
    Peer("flax.nnx", "flax.nnx", partial(jax_call, jax_norms.nnx_norm), "flax"),
    Peer("haiku", "haiku", partial(jax_call, jax_norms.haiku_norm), "dm-haiku"),
    Peer("equinox", "equinox", partial(jax_call, jax_norms.equinox_norm), "equinox"),
    Peer("keras", "keras", partial(jax_call, jax_norms.keras_norm), "keras"),
    Peer("torch", "torch", torch_call, "torch"),
    Peer("torch.compile", "torch", partial(torch_call, compiled=True), "torch", True),
)
