"""The measured cases: five norms, with shapes from real networks."""

import math
from typing import NamedTuple

import jax.numpy as jnp

EPSILON = 1e-5
MOMENTUM = 0.9  # of the running statistics of batch norm
CACHE = 2**20  # bytes; a group up to this size stays in the cache of one core between two passes
WIDTH = 64  # the other dimension of the matmuls of "context"; narrow, so they don't dominate

MODES = ("forward", "backward", "both", "context")
DTYPES = ("float32", "bfloat16")

# The networks are those of tests/shapes.py, with batches large enough that the computation takes
# longer than the call overhead. "tiny" measures the call overhead.
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
    """A norm and its input.

    Attributes:
      norm: "batch", "layer", "rms", "group" or "instance".
      network: the network that the shape is from.
      shape: of x, features last.
      dtype: of x and y; scale, bias and running statistics are float32.
    """

    norm: str
    network: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def name(self) -> str:
        """The name that --only matches."""
        return f"{self.norm}/{self.network}/{self.dtype}"

    @property
    def features(self) -> int:
        """The number of scales, and of biases except for rms norm."""
        return self.shape[-1]

    @property
    def groups(self) -> int:
        """The number of groups of group norm: 32 as in its paper, 4 for the tiny shape."""
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
    """A problem, and the part of it that is timed.

    Attributes:
      problem: the norm and its input.
      mode: "forward", in training, with the running statistics; "backward", from the residuals of
        the forward pass; "both"; or "context", both passes of matmul, bias, add, norm, matmul.
    """

    problem: Problem
    mode: str

    @property
    def name(self) -> str:
        """The name that --only matches."""
        return f"{self.problem.name}/{self.mode}"

    @property
    def minimum_bytes(self) -> int | None:
        """The fewest bytes to read and write; None for "context", where the matmuls take longer.

        Forward: x is read, y is written. Backward: x and dy are read, dx is written. If the
        elements that share statistics do not stay in the cache, the inputs have to be read twice,
        once for the statistics and once to apply them. (In batch norm they never do: a column is
        spread over all of x.)
        """
        once = self.problem.norm in ("layer", "rms") or (
            self.problem.norm != "batch" and self.problem.sharing * self.problem.itemsize <= CACHE
        )
        forward, backward = (2, 3) if once else (3, 5)
        passes = {"forward": forward, "backward": backward, "both": forward + backward}
        if self.mode not in passes:
            return None
        return passes[self.mode] * math.prod(self.problem.shape) * self.problem.itemsize


# Batches that fill a GPU or TPU.
CHIP_SHAPES = {
    "batch": {"resnet-stem": (256, 56, 56, 64), "resnet-stage4": (256, 7, 7, 2048)},
    "layer": {"llama-7b": (8192, 4096), "vit-base": (256, 197, 768)},
    "rms": {"llama-7b": (8192, 4096)},
    "group": {"diffusion-unet": (64, 64, 64, 320), "diffusion-unet-8": (8, 64, 64, 320)},
    "instance": {"style-transfer": (16, 256, 256, 64)},
}
CHIP_PROBLEMS = [
    Problem(norm, network, shape, dtype)
    for norm, shapes in CHIP_SHAPES.items()
    for network, shape in shapes.items()
    for dtype in reversed(DTYPES)
]


def all_cases() -> list[Case]:
    """Return all cases. The cases of one problem are adjacent, so they share its data."""
    return [
        Case(Problem(norm, network, shape, dtype), mode)
        for norm, shapes in SHAPES.items()
        for network, shape in shapes.items()
        for dtype in DTYPES
        for mode in MODES
        if mode != "context" or network == IN_CONTEXT[norm]
    ]


def quick_cases() -> list[Case]:
    """Return one shape in float32 for each norm: forward, and forward plus backward."""
    return [
        case
        for case in all_cases()
        if case.problem.network == IN_CONTEXT[case.problem.norm]
        and case.problem.dtype == "float32"
        and case.mode in ("forward", "both")
    ]
