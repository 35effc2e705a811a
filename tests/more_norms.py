"""The small norms, as the tests call them: ours and the truth.

Each takes x and the arrays that it learns, which are named.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import oracle
from jax import lax

import jaxnorm as jn


@dataclasses.dataclass(frozen=True, eq=False)
class Small:
    """One norm, with the options that it is tested with; hashed by identity."""

    name: str
    function: Callable
    truth: Callable
    learned: tuple[str, ...] = ()

    def arguments(self, rng, shape, dtype=np.float32, std=1.0):
        """x, which is near no kink, and the learned arrays, some of which are scalars."""
        x = std * rng.standard_normal(shape)
        features = lambda mean, spread: mean + spread * rng.standard_normal(shape[-1])
        draw = {
            "scale": lambda: features(1, 0.5),
            "bias": lambda: features(0, 0.5),
            "threshold": lambda: features(-0.5, 0.2),
            "alpha": lambda: np.array(0.6),
            "shift": lambda: features(0, 0.2),
        }
        return tuple(np.asarray(a, dtype) for a in (x, *(draw[name]() for name in self.learned)))


MASK = np.random.default_rng(5).random((8, 3, 4)) < 0.7
MASK[:, 0], MASK[..., 0] = True, True


def unit(ord, **options):
    return (
        lambda x: jn.unit_norm(x, ord=ord, epsilon=0.0, **options),
        lambda x: oracle.unit_norm(x, ord=ord, epsilon=0.0, **options),
    )


def local(size, alpha, beta, k):
    options = {"size": size, "alpha": alpha, "beta": beta, "k": k}
    return (
        lambda x: jn.local_response_norm(x, **options),
        lambda x: oracle.local_response_norm(x, **options),
    )


UNIT = [
    Small("unit-1", *unit(1)),
    Small("unit-2", *unit(2)),
    Small("unit-inf", *unit(np.inf)),
    Small("unit-masked", *unit(2, where=MASK, axis=(1, 2))),
]
GLOBAL = Small(
    "global",
    lambda x, *params: jn.global_response_norm(x, jn.NormParams(*params)),
    oracle.global_response_norm,
    ("scale", "bias"),
)
FILTER = Small(
    "filter",
    lambda x, scale, bias, *rest: jn.filter_response_norm(x, jn.NormParams(scale, bias), *rest),
    oracle.filter_response_norm,
    ("scale", "bias", "threshold"),
)
UNBOUNDED = dataclasses.replace(FILTER, name="filter-unbounded", learned=("scale", "bias"))
TANH = Small(
    "tanh",
    lambda x, alpha, *params: jn.dynamic_tanh(x, alpha, jn.NormParams(*params)),
    oracle.dynamic_tanh,
    ("alpha", "scale", "bias"),
)
ERF = Small(
    "erf",
    lambda x, alpha, shift, *params: jn.dynamic_erf(x, alpha, shift, jn.NormParams(*params)),
    oracle.dynamic_erf,
    ("alpha", "shift", "scale", "bias"),
)
LOCAL = Small("local", *local(5, 0.5, 0.75, 2.0))
LOCAL_EVEN = Small("local-even", *local(2, 3.0, 1.5, 0.5))
FAMILY = [*UNIT, GLOBAL, FILTER, UNBOUNDED, TANH, ERF, LOCAL, LOCAL_EVEN]
ONE_EACH = [UNIT[3], GLOBAL, FILTER, TANH, ERF, LOCAL]

# Without epsilon, bias and k, x may be of any magnitude.
GLOBAL_RATIO = Small(
    "global-ratio",
    lambda x, *params: jn.global_response_norm(x, jn.NormParams(*params), epsilon=0.0),
    lambda x, *params: oracle.global_response_norm(x, *params, epsilon=0.0),
    ("scale",),
)
LOCAL_RATIO = Small("local-ratio", *local(5, 0.5, 0.4, 0.0))
RATIOS = [*UNIT, GLOBAL_RATIO, LOCAL_RATIO]


def of_parts(norm: Small) -> Small:
    """The same for complex x, as a function of its real and imaginary part, and to both of y."""

    def function(real, imaginary, *rest):
        y = norm.function(lax.complex(real, imaginary), *rest)
        return jnp.stack([y.real, y.imag])

    def truth(real, imaginary, *rest):
        y = norm.truth(real + 1j * imaginary, *rest)
        return np.stack([y.real, y.imag])

    return dataclasses.replace(norm, function=function, truth=truth)
