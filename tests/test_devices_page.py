"""docs/devices.md: its table matches the compiled programs, and its code runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from devices import (
    FEATURES,
    MEASURED,
    NORMS,
    bytes_sent,
    calculated,
    committed,
    compiled,
    main,
    table,
)
from jax.sharding import AxisType

import jaxnorm as jn
from benchmarks.accelerators.collectives import collectives

PAGE = (Path(__file__).parent.parent / "docs" / "devices.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
if jax.__version_info__ < (0, 10, 2):  # see the page: two dense layers over explicit axes
    BLOCKS = [block for block in BLOCKS if "nnx.Optimizer" not in block or "set_mesh" not in block]
LIBRARY = pytest.mark.parametrize("library", NORMS)


@LIBRARY
@pytest.mark.parametrize("devices", MEASURED)
def test_the_calculation_is_what_the_compiled_program_has(library, devices):
    assert compiled(library, FEATURES, devices) == calculated(library, FEATURES, devices)


@pytest.mark.parametrize("features", [10922, 10923])  # the last table of 8 devices
def test_so_it_is_where_the_table_gives_way_to_sums(features):
    exchanges = compiled("jaxnorm", features, 8)
    assert exchanges == calculated("jaxnorm", features, 8)
    assert len(exchanges) == (2 if features == 10922 else 3)
    assert "10,922 features" in PAGE


@pytest.mark.usefixtures("small_tables")
@pytest.mark.parametrize("features", [100, 101])  # the last table below that limit
def test_so_it_is_with_another_limit(features):
    exchanges = compiled("jaxnorm", features, 8)
    assert exchanges == calculated("jaxnorm", features, 8)
    assert len(exchanges) == (2 if features == 100 else 3)


@LIBRARY
def test_bytes_are_those_of_a_ring(library):
    for devices in (2, 7, 64, 65, 4096):
        sums = {"Flax": 4, "jaxnorm": 5 if devices > 64 else 2}[library]
        right = 2 * (devices - 1) / devices * sums * FEATURES * 4
        if library == "jaxnorm" and devices <= 64:
            right += (devices - 1) * 3 * FEATURES * 4
        assert bytes_sent(calculated(library, FEATURES, devices)) == pytest.approx(right)


def test_the_page_holds_what_the_formulas_give():
    assert committed(PAGE) == table(calculated)
    ours, flax = (bytes_sent(calculated(library, FEATURES, 64)) for library in NORMS)
    assert f"{ours / flax:.0f} times the bytes of Flax" in PAGE
    for features, devices in ((1, 64), (256, 64), (2048, 42)):
        assert len(calculated("jaxnorm", features, devices)) == 2
        assert len(calculated("jaxnorm", features, devices + 1)) == 3


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_under_plain_jit_small_sums_are_exchanged(kind):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    place = lambda *spec: jax.device_put(jnp.ones((8, 6)), jax.NamedSharding(mesh, jax.P(*spec)))
    sent = lambda *case: [(sums.kind, sums.numbers) for sums in collectives(*case)]
    with jax.set_mesh(mesh):
        layer = lambda x: jnp.sum(jnp.sin(jn.layer_norm(x)))
        rows, twice = ("all-reduce", 2), ("all-reduce", 4)  # two of the eight rows on each device
        # The mean of the sample, the two sums about it; and those of the backward pass.
        assert sent(jax.grad(layer), place("data", "model")) == [rows, twice, twice]
        assert not sent(jax.grad(layer), place("data"))
        batch = lambda x: jnp.sum(jnp.sin(jn.batch_norm(x, jn.init_batch_norm_state(6))[0]))
        features, twice = ("all-reduce", 6), ("all-reduce", 12)
        assert sent(jax.grad(batch), place("data")) == [features, twice, twice]


def test_an_unknown_flag_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["devices.py", "--wrte"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "unrecognized arguments: --wrte" in capsys.readouterr().err


@pytest.mark.thorough
def test_the_recipes_are_training_on_one_device():
    """On eight devices, over automatic and explicit axes and in shard_map."""
    recipes = [block for block in BLOCKS if "nnx.Optimizer" in block]
    kinds = [("set_mesh" in block, "shard_map" in block) for block in recipes]
    explicit = [(True, False)] if jax.__version_info__ >= (0, 10, 2) else []
    assert kinds == [(False, False), *explicit, (False, True)]
    alone = recipes[0].replace("(jax.device_count(),)", "(1,)")
    program = f"""
import jax, numpy as np
results = []
for block in {[alone, *recipes]!r}:
    exec(block, names := {{}})
    norm = names["model"].layers[1]
    results.append([names["losses"], norm.mean[...], norm.var[...], norm.scale[...]])
    assert len(names["x"].sharding.device_set) == (8 if len(results) > 1 else 1)
for result in results[1:]:
    for ours, right in zip(result, results[0], strict=True):
        # Ten steps, each of which rounds sums over the batch in another order.
        np.testing.assert_allclose(ours, right, rtol=1e-5, atol=1e-5)
"""
    run(program)


@pytest.mark.thorough
def test_the_code_runs():
    # Each block by itself, but in one process: importing takes longer than running.
    program = "\n".join(f"exec({block!r}, {{}})" for block in BLOCKS)
    run(program)
    assert BLOCKS


def run(program):
    """Run it on eight devices; warnings are errors."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", "-c", program]
    subprocess.run(command, env=os.environ | flags, check=True)
