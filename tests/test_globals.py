"""Compiled programs depend on the present values of globals."""

import types

import jax
import jax.numpy as jnp
import pytest
from changes import changes, with_kernels

import jaxnorm as jn
from jaxnorm import kernels


def test_what_programs_depend_on_is_read_only():
    with pytest.raises(TypeError, match="does not support item assignment"):
        kernels.KERNELS["cpu"] = None  # pyright: ignore[reportIndexIssue] (that is what is tested)


@pytest.mark.usefixtures("kernel")
def test_a_changed_table_finds_no_program_that_was_compiled_before():
    """The same function and shapes, with a kernel, without it, and with it again."""
    norm = jax.jit(jn.layer_norm)
    called = lambda: "jaxnorm_forward" in norm.lower(jnp.ones((3, 5))).as_text()
    assert called()
    with changes() as change:
        none = types.SimpleNamespace(unavailable_reason=lambda: "it is not there")
        change(kernels, "KERNELS", with_kernels(cpu=none))
        assert not called()
    assert called()
