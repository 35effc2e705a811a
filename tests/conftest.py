"""Eight virtual devices, and strict promotion of dtypes and ranks in JAX."""

import os
import re

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import numpy as np
import pytest
from changes import changes

from jaxnorm.core import devices
from jaxnorm.kernels import cpu

pytest_plugins = ["skips", "pairs", "pytester"]

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The same examples in every run; each shape compiles, so there is no telling how long one takes.
hypothesis.settings.register_profile("jaxnorm", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("jaxnorm")


def pytest_configure(config):
    """Keep compiled programs in pytest's cache: for all workers, and for the next run.

    A second run takes half as long. The key of a program is its text, so no other is found;
    `pytest --cache-clear` removes them.
    """
    if not config.pluginmanager.has_plugin("cacheprovider"):
        return
    settings = {"jax_compilation_cache_dir": str(config.cache.mkdir("compiled"))}
    settings |= {"jax_persistent_cache_min_compile_time_secs": 0.05}
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)  # for processes of their own


def pytest_collection_modifyitems(items):
    """Put a test's targets of the kernel side by side: a worker compiles their program once."""
    at = lambda item: (item.location[0], item.location[1] or 0)
    any_level = lambda item: re.sub("kernel-(baseline|avx2)", "kernel-avx512", item.nodeid)
    items.sort(key=lambda item: (at(item), any_level(item)))


@pytest.fixture
def x64():
    """Float64 for one test."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture
def change():
    """Change a global that programs depend on, for one test."""
    with changes() as change:
        yield change


@pytest.fixture
def small_tables(change):
    """Let eight devices gather up to 1,200 bytes each, and sum what is more."""
    change(devices, "GATHERED_BYTES", 8 * 1200)


@pytest.fixture
def unoptimized():
    """Compile faster, run slower: for derivatives in float64, never for kernels."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(params=["xla", "kernel-baseline", "kernel-avx2", "kernel-avx512"])
def implementation(request):
    """Each implementation; the kernel as compiled for each target."""
    name, _, target = request.param.partition("-")
    if not target:
        yield name
        return
    if cpu.unavailable_reason():
        pytest.skip(f"there is no kernel: {cpu.unavailable_reason()}")
    before = cpu.target()
    if not cpu.use_target(target):
        pytest.skip(f"this machine can't run the kernel for {target}")
    yield name
    cpu.use_target(before)


@pytest.fixture
def kernel():
    """Skips a test where there is no kernel."""
    if cpu.unavailable_reason():
        pytest.skip(f"there is no kernel: {cpu.unavailable_reason()}")


@pytest.fixture
def rng() -> np.random.Generator:
    """The same random numbers for every run of a test."""
    return np.random.default_rng(0)
