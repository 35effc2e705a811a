"""The choice between kernel and XLA, by argument or environment variable, and its errors."""

import functools
import pickle
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import compute, example_of, program
from jax import export
from jax.sharding import NamedSharding, PartitionSpec
from norms import NORMS, norm_id

import jaxnorm as jn
from jaxnorm import kernels

pytestmark = pytest.mark.usefixtures("kernel")
EACH_NORM = pytest.mark.parametrize("norm", NORMS, ids=norm_id)
X = jnp.ones((4, 3, 6))
LONG = jnp.ones(2**14 + 1, jnp.bfloat16)
layer_norm = functools.partial(jn.layer_norm, implementation="kernel")


def calls(f, *args):
    """Whether the compiled program calls the kernel."""
    return "jaxnorm_forward" in program(f, *args)


@pytest.mark.parametrize(
    ("f", "reason"),
    [
        (lambda: layer_norm(X, where=X > 0), "mask"),
        (lambda: layer_norm(X.astype(jnp.float16)), "float32 or bfloat16"),
        (lambda: layer_norm(X.astype(jnp.complex64)), "float32 or bfloat16"),
        (lambda: jn.layer_norm(X.T, axis=0, implementation="kernel"), "side by side"),
        (lambda: jn.instance_norm(X, feature_axis=1, implementation="kernel"), "last axes"),
        (lambda: jn.rms_norm(X, axis=(0, 1), implementation="kernel"), "last ax"),
        (lambda: layer_norm(X[:0]), "no elements"),
        (lambda: jn.add_layer_norm(LONG, LONG, implementation="kernel"), "up to 16384 elements"),
        (lambda: export.export(jax.jit(layer_norm))(X), "exported"),
    ],
    ids=[
        "mask",
        "float16",
        "complex",
        "first-axis",
        "channels-first",
        "rms",
        "empty",
        "long-sum",
        "export",
    ],
)
def test_what_no_kernel_takes_is_an_error_where_one_is_asked_for(f, reason):
    sentence = f"(?s)implementation='kernel' must.*{reason}"
    with pytest.raises(jn.KernelUnavailableError, match=sentence) as caught:
        f()
    assert isinstance(caught.value, ValueError)
    assert reason in caught.value.reason
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.usefixtures("x64")
def test_float64_is_an_error():
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        layer_norm(jnp.ones((2, 3), jnp.float64))


def test_statistics_over_devices_are_an_error():
    state = jn.init_batch_norm_state(6)
    f = functools.partial(jn.batch_norm, implementation="kernel")
    with pytest.raises(ValueError, match="axis_name"):
        jax.vmap(lambda x: f(x, state, "batch")[0], axis_name="batch")(X)


def test_a_sharded_array_is_an_error_when_the_program_is_compiled():
    mesh = jax.make_mesh((4,), ("data",))
    x = jax.device_put(X, NamedSharding(mesh, PartitionSpec("data")))
    with pytest.raises(ValueError, match=r"jax\.shard_map"):
        jax.jit(layer_norm)(x)


def test_a_typo_is_an_error(monkeypatch):
    with pytest.raises(ValueError, match=r"implementation must be 'xla', 'kernel'.*'kernl'"):
        jn.layer_norm(X, implementation="kernl")
    monkeypatch.setenv(kernels.VARIABLE, "XLA")
    for f in (lambda: jn.layer_norm(X), jn.implementations):
        with pytest.raises(ValueError, match=r"JAXNORM_IMPLEMENTATION must be .*'XLA'"):
            f()


@EACH_NORM
def test_the_argument_chooses(norm):
    x = jnp.ones((4, 3, 6))
    for choice, expected in ((None, True), ("kernel", True), ("xla", False)):
        assert calls(functools.partial(norm, implementation=choice), x) == expected


def test_the_variable_chooses_what_the_argument_leaves_open(monkeypatch):
    monkeypatch.setenv(kernels.VARIABLE, "xla")
    assert jn.implementations()["cpu"] == "xla: JAXNORM_IMPLEMENTATION=xla"
    assert not calls(jn.layer_norm, X)
    assert calls(layer_norm, X)
    monkeypatch.setenv(kernels.VARIABLE, "kernel")
    assert calls(lambda x: jn.layer_norm(x), X)
    assert not calls(functools.partial(jn.layer_norm, implementation="xla"), X)
    with pytest.raises(ValueError, match="mask"):
        jn.layer_norm(X, where=X > 0)
    monkeypatch.setenv(kernels.VARIABLE, "")
    assert calls(lambda x: jn.layer_norm(x * 2), X)
    assert jn.implementations()["cpu"] == f"kernel: {kernels.cpu.target()}"


def same_bits(a, b):
    return all(
        np.asarray(one).tobytes() == np.asarray(other).tobytes()
        for one, other in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("implementation", ["kernel-baseline", "kernel-avx2"], indirect=True)
@EACH_NORM
def test_sums_have_the_same_bits_from_run_to_run(norm, implementation):
    for shape in [(512, 4, 96), (3, 4000, 10)]:
        this = norm.with_groups(shape)
        example = example_of(this, shape)
        first = compute(this, implementation, 1e-6, example)
        for _ in range(10):
            assert same_bits(compute(this, implementation, 1e-6, example), first)


def test_several_threads_at_a_time_get_what_one_gets():
    shapes = [(2, 3, 2), (64, 8, 96), (512, 4, 96), (3, 4000, 10)]
    work = []
    for shape in shapes:
        for norm in (NORMS[0], NORMS[1], NORMS[4].with_groups(shape)):
            f = functools.partial(compute, norm, "kernel", 1e-6, example_of(norm, shape))
            work.append((f, f()))
    wrong = []

    def run(start):
        for i in range(3 * len(work)):
            f, expected = work[(start + i) % len(work)]
            if not same_bits(f(), expected):
                wrong.append(f)

    threads = [threading.Thread(target=run, args=(start,)) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def struct(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


NONE = jnp.zeros(0)


def call_forward(y=None, stat=4, scale=6, x=None, residual=NONE, total=None, **sizes):
    """A call past Python's checks, of layer norm over rows of six."""
    x = jnp.ones((4, 6)) if x is None else x
    block = {
        name: np.int64(size)
        for name, size in ({"batch": 1, "n": 4, "s": 1, "g": 1, "k": 6} | sizes).items()
    }
    y = y or struct(*x.shape, dtype=x.dtype)
    if total is None:
        total = struct(*residual.shape, dtype=residual.dtype)
    results = [y, total, *[struct(stat)] * 4]
    call = jax.ffi.ffi_call("jaxnorm_forward", results)
    ones = jnp.ones(scale)
    return call(x, residual, ones, ones, **block, epsilon=np.float64(1), subtract_mean=True)


def call_backward(dy=None, dx=None, stat=4, of_scale=6, of_bias=6, d_residual_sum=NONE, **sizes):
    x, stats = jnp.ones((4, 6)), jnp.ones(stat)
    block = {"batch": 1, "n": 4, "s": 1, "g": 1, "k": 6} | sizes
    results = [dx or struct(4, 6), struct(of_scale), struct(of_bias)]
    call = jax.ffi.ffi_call("jaxnorm_backward", results)
    dy = x if dy is None else dy
    numbers = {name: np.int64(size) for name, size in block.items()}
    ones = jnp.ones(6)
    return call(x, dy, d_residual_sum, ones, stats, stats, stats, **numbers, subtract_mean=True)


def test_the_door_takes_what_fits():
    assert (call_forward()[0] == 1).all()  # the bias
    assert jnp.isfinite(call_backward()[0]).all()
    x = jnp.ones((4, 6))
    assert (call_forward(residual=2 * x)[1] == 3).all()
    assert (call_backward(d_residual_sum=2 * x)[0] == 2 + call_backward()[0]).all()


@pytest.mark.parametrize(
    "call",
    [
        lambda: call_forward(n=5),
        lambda: call_forward(n=-4, k=-6),
        lambda: call_forward(n=2**62, k=2**62),
        lambda: call_forward(k=6 + 2**62, scale=0),  # 4 k overflows to 24
        lambda: call_forward(k=0),
        lambda: call_forward(stat=3),
        lambda: call_forward(stat=0),
        lambda: call_forward(scale=5),
        lambda: call_forward(struct(4, 5)),
        lambda: call_forward(struct(4, 6, dtype=jnp.bfloat16)),
        lambda: call_forward(x=jnp.ones((4, 6), jnp.float16)),
        lambda: call_forward(residual=jnp.ones((4, 5))),
        lambda: call_forward(residual=jnp.ones((4, 6), jnp.bfloat16)),
        lambda: call_forward(residual=jnp.ones((4, 6)), total=struct(0)),
        lambda: call_forward(residual=jnp.ones((4, 6)), total=struct(4, 6, dtype=jnp.bfloat16)),
        lambda: call_forward(total=struct(4, 6)),
        lambda: call_forward(residual=jnp.ones((4, 6)), n=1, s=4, stat=1),
        lambda: call_forward(x=LONG, residual=LONG, n=1, k=2**14 + 1, stat=1, scale=0),
        lambda: call_backward(d_residual_sum=jnp.ones((4, 5))),
        lambda: call_backward(d_residual_sum=jnp.ones((4, 6), jnp.bfloat16)),
        lambda: call_backward(d_residual_sum=jnp.ones((4, 6)), n=1, s=4, stat=1),
        lambda: call_backward(batch=2),
        lambda: call_backward(batch=0),
        lambda: call_backward(k=12),
        lambda: call_backward(stat=5),
        lambda: call_backward(stat=0),
        lambda: call_backward(of_scale=7),
        lambda: call_backward(of_bias=7),
        lambda: call_backward(dy=jnp.ones((4, 7))),
        lambda: call_backward(dy=jnp.ones((4, 6), jnp.bfloat16)),
        lambda: call_backward(dx=struct(4, 6, dtype=jnp.bfloat16)),
    ],
)
def test_the_handlers_reject_what_does_not_fit(call):
    with pytest.raises(Exception, match="jaxnorm's kernel got"):
        jax.block_until_ready(call())


def test_the_door_refuses_statistics_of_another_type():
    x = jnp.ones((4, 6))
    results = [struct(4, 6), struct(0), *[struct(4, dtype=jnp.int32)] * 4]
    call = jax.ffi.ffi_call("jaxnorm_forward", results)
    sizes = {
        "batch": np.int64(1),
        "n": np.int64(4),
        "s": np.int64(1),
        "g": np.int64(1),
        "k": np.int64(6),
    }
    with pytest.raises(Exception, match=r"[Ww]rong buffer dtype"):
        jax.block_until_ready(
            call(x, NONE, x[0], x[0], **sizes, epsilon=np.float64(1), subtract_mean=True)
        )
