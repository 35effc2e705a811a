"""What is measured: the five norms, in the shapes that real networks give them."""

import math
from typing import NamedTuple

import jax.numpy as jnp

EPSILON = 1e-5
MOMENTUM = 0.9  # what the running statistics of batch norm keep
CACHE = 2**20  # bytes of a group that stay in the cache of one core from one pass to the next
WIDTH = 64  # on the other side of the matmuls of "context": narrow, or one would see only them

MODES = ("forward", "backward", "both", "context")
DTYPES = ("float32", "bfloat16")

# The networks are those of tests/shapes.py, with batches large enough that a call takes longer
# than calling does. "tiny" is there for the calls.
ROWS = {
    "gpt2": (8192, 768),
    "bert-large": (4096, 1024),
    "llama-7b": (1024, 4096),
    "vit-so400m": (4096, 1152),
    "mlp": (8192, 100),
    "long": (16, 2**18 + 1),
    "tiny": (8, 32),
}
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "batch": {
        "resnet-stem": (32, 56, 56, 64),
        "resnet-stage2": (32, 28, 28, 128),
        "resnet-stage3": (32, 14, 14, 256),
        "resnet-stage4": (32, 7, 7, 512),
        "tiny": (4, 8, 8, 16),
    },
    "layer": ROWS,
    "rms": ROWS,
    "group": {
        "diffusion-unet": (2, 64, 64, 320),
        "diffusion-unet-32": (2, 32, 32, 640),
        "diffusion-unet-16": (2, 16, 16, 1280),
        "tiny": (4, 8, 8, 16),
    },
    "instance": {"style-transfer": (8, 64, 64, 64), "tiny": (4, 8, 8, 16)},
}
IN_CONTEXT = {
    "batch": "resnet-stage3",
    "layer": "bert-large",
    "rms": "bert-large",
    "group": "diffusion-unet-32",
    "instance": "style-transfer",
}


class Problem(NamedTuple):
    """A norm, and what it is given.

    Attributes:
      norm: "batch", "layer", "rms", "group" or "instance".
      network: whose shape it is.
      shape: of x, features last.
      dtype: of x and y; scale, bias and running statistics are float32.
    """

    norm: str
    network: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def features(self) -> int:
        """How many scales there are, and biases unless it is rms norm."""
        return self.shape[-1]

    @property
    def groups(self) -> int:
        """Of group norm: 32 as its paper has it, and of the tiny ones 4."""
        return 32 if self.features % 32 == 0 else 4

    @property
    def itemsize(self) -> int:
        """Bytes of one element of x."""
        return jnp.dtype(self.dtype).itemsize

    @property
    def sharing(self) -> int:
        """How many elements share statistics."""
        images = math.prod(self.shape[1:-1])
        return {
            "batch": math.prod(self.shape[:-1]),
            "layer": self.features,
            "rms": self.features,
            "group": images * self.features // self.groups,
            "instance": images,
        }[self.norm]


class Case(NamedTuple):
    """A problem, and which part of it is timed.

    Attributes:
      problem: the norm and its input.
      mode: "forward", in training, with the running statistics; "backward", from what the forward
        pass kept; "both"; or "context", both passes of matmul, bias, add, norm, matmul.
    """

    problem: Problem
    mode: str

    @property
    def name(self) -> str:
        """What --only looks at."""
        return f"{self.problem.norm}/{self.problem.network}/{self.problem.dtype}/{self.mode}"

    @property
    def minimum_bytes(self) -> int | None:
        """What must be read and written at least; None for "context", whose matmuls take longer.

        Forward: x is read, y written. Backward: x and dy are read, dx written. Where what shares
        statistics does not stay in the cache (batch norm's never does: its columns lie scattered
        over all of x), what is read has to be read twice, once to measure and once to apply.
        """
        once = self.problem.norm in ("layer", "rms") or (
            self.problem.norm != "batch" and self.problem.sharing * self.problem.itemsize <= CACHE
        )
        forward, backward = (2, 3) if once else (3, 5)
        passes = {"forward": forward, "backward": backward, "both": forward + backward}
        if self.mode not in passes:
            return None
        return passes[self.mode] * math.prod(self.problem.shape) * self.problem.itemsize


def all_cases() -> list[Case]:
    """Everything; the cases of one problem in a row, so that they share its data."""
    return [
        Case(Problem(norm, network, shape, dtype), mode)
        for norm, shapes in SHAPES.items()
        for network, shape in shapes.items()
        for dtype in DTYPES
        for mode in MODES
        if mode != "context" or network == IN_CONTEXT[norm]
    ]


def quick_cases() -> list[Case]:
    """Of each norm one shape in float32: forward, and forward plus backward."""
    return [
        case
        for case in all_cases()
        if case.problem.network == IN_CONTEXT[case.problem.norm]
        and case.problem.dtype == "float32"
        and case.mode in ("forward", "both")
    ]
