"""python -m jaxnorm.verify distinguishes right kernels from wrong ones."""

import os
import subprocess
import sys
import types

import pytest
from changes import with_kernels

from jaxnorm import kernels
from jaxnorm.kernels import cpu
from jaxnorm.verify import __main__ as verify
from jaxnorm.verify import times
from jaxnorm.verify.cases import Case


@pytest.fixture
def few(monkeypatch):
    """A case that the kernel supports, one that it does not support, and one to be timed."""
    cases = [Case("layer", 8, 64, "float32", mean=1e4), Case("add_rms", 4, 2**15, "bfloat16")]
    monkeypatch.setattr(verify, "right_cases", lambda: iter(cases))
    timed = [Case("add_layer", 16, 64, "float32")]
    monkeypatch.setattr(verify, "fast_cases", lambda megabytes: iter(timed))
    monkeypatch.setattr(times, "ROUNDS", 1)
    monkeypatch.setattr(times, "CALLS", 1)


@pytest.mark.usefixtures("kernel", "few")
def test_the_kernel_of_this_machine_is_right(capsys):
    assert verify.main([]) == 0
    said = capsys.readouterr().out
    assert f"kernel: {cpu.target()}" in said
    assert "layer_norm 8 x 64 float32, 10000 ± 1" in said
    assert "add_rms_norm 4 x 32768 bfloat16" in said
    assert "not supported: it supports a residual in bfloat16 for rows of up to 16384" in said
    assert "The kernel's errors are within the limit in 1 cases." in said
    assert "of 2 programs." in said
    start, timed = said.index("Up to two minutes and 1 GB"), said.index(" 1 of 1  add_layer")
    assert start < said.index(" 1 of 2  layer_norm") < said.index(" 2 of 2  add_rms_norm") < timed


@pytest.mark.usefixtures("kernel", "few")
@pytest.mark.thorough
def test_a_wrong_kernel_is_found(capsys, change):
    def forward(*args, **options):
        y, *others = cpu.forward(*args, **options)
        return (1 + 1e-5) * y, *others

    names = ("unavailable_reason", "target", "opt_in_reason", "unsupported_reason", "vjp")
    wrong = types.SimpleNamespace(forward=forward, **{name: getattr(cpu, name) for name in names})
    change(kernels, "KERNELS", with_kernels(cpu=wrong))
    assert verify.main([]) == 1
    assert "The kernel's errors are NOT within the limit in 1 cases." in capsys.readouterr().out


def test_without_a_kernel_there_is_nothing_to_verify(capsys, change):
    none = types.SimpleNamespace(unavailable_reason=lambda: "no compiler was found")
    change(kernels, "KERNELS", with_kernels(cpu=none))
    assert verify.main([]) == 2
    assert "cpu: no kernel to verify, no compiler was found." in capsys.readouterr().err


@pytest.mark.usefixtures("few")
def test_exits_with_2_when_the_kernel_supports_no_request(capsys, change):
    names = ("unavailable_reason", "target", "opt_in_reason", "forward", "vjp")
    unsupported = types.SimpleNamespace(unsupported_reason=lambda request: "by this test")
    vars(unsupported).update(
        {name: getattr(cpu, name) for name in names} | {"unavailable_reason": lambda: None}
    )
    vars(unsupported)["target"] = lambda: "none"
    change(kernels, "KERNELS", {"cpu": unsupported})
    assert verify.main([]) == 2
    said = capsys.readouterr().out
    assert "not supported: by this test" in said
    assert "nothing was verified" in said


@pytest.mark.usefixtures("kernel")
def test_ctrl_c_is_one_sentence(capsys, monkeypatch):
    def interrupt(megabytes, deadline):
        raise KeyboardInterrupt

    monkeypatch.setattr(verify, "verify", interrupt)
    assert verify.main([]) == 130
    assert "Interrupted" in capsys.readouterr().err


def test_a_wrong_variable_is_one_sentence(capsys, monkeypatch):
    monkeypatch.setenv(kernels.VARIABLE, "kernle")
    assert verify.main([]) == 2
    assert "must be 'xla', 'kernel' or not be given, got 'kernle'" in capsys.readouterr().err


def test_a_wrong_flag_is_one_sentence(capsys):
    assert verify.main(["--megabytes", "0"]) == 2
    assert "--megabytes must be at least 1, got 0." in capsys.readouterr().err


@pytest.fixture
def clock(monkeypatch):
    """A machine on which each case takes 20 seconds; the lines of `main`, and the seconds."""
    now = [0.0]

    def told(line):
        now[0] += 20
        return line

    monkeypatch.setattr(verify.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(verify, "report", lambda case: (told("right"), True))
    monkeypatch.setattr(verify, "speed", lambda case: (told("fast"), [1.0, 1.0]))
    return now


@pytest.mark.usefixtures("kernel")
def test_it_ends_before_two_minutes_and_counts_what_is_left(capsys, clock):
    assert verify.main([]) == 0
    assert clock == [100]  # a sixth case would end after SECONDS
    said = capsys.readouterr().out
    assert said.count(" of 30  right") == 2
    assert "28 more cases were not run: pass --full." in said
    assert said.count(" of 32  fast") == 3
    assert "29 more cases were not run: pass --full." in said
    assert "in 2 cases" in said


@pytest.mark.usefixtures("kernel")
def test_all_cases_are_run_if_one_wants_that(capsys, clock):
    assert verify.main(["--full"]) == 0
    assert clock == [20 * (30 + 32)]
    said = capsys.readouterr().out
    assert said.index("All cases: many minutes") < said.index("right")
    assert "more cases" not in said


@pytest.mark.usefixtures("kernel")
@pytest.mark.thorough
def test_the_largest_cases_take_less_than_a_gigabyte():
    """In a process of its own, which tells the most memory that it had."""
    code = """if True:
        import re, resource
        from jaxnorm.verify import __main__ as verify
        for case in verify.right_cases():
            if case.rows == 4096:
                assert verify.report(case)[1]
        cases = list(verify.fast_cases(verify.MEGABYTES))
        for case in [case for case in cases if case.norm == "add_layer"][:2]:
            verify.speed(case)
        try:  # what a process inherits counts in getrusage
            print(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
        except FileNotFoundError:
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"""
    # With the eight devices of conftest.py there would be eight of what belongs to one.
    kept = {name: a for name, a in os.environ.items() if not name.startswith("MALLOC_")}
    env = kept | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    ran = subprocess.run(
        [sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True
    )
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(ran.stdout) * unit < 1e9


def test_the_cases_are_what_a_kernel_is_for():
    right, fast = list(verify.right_cases()), list(verify.fast_cases(256))
    assert {case.norm for case in right} == {"layer", "rms", "add_layer", "add_rms"}
    assert {case.dtype for case in fast} == {"float32", "bfloat16"}
    for case in fast:
        assert 250 < case.rows * case.k * (2 if case.dtype == "bfloat16" else 4) / 2**20 <= 256
