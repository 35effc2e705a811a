"""examples/data_parallel.py with real processes, which are killed and resumed."""

import gc
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

pytest.importorskip("sklearn", reason="scikit-learn is in the extra 'examples'")
pytest.importorskip("orbax.checkpoint", reason="orbax is in the extra 'examples'")

import data_parallel
import orbax.checkpoint as ocp
from data_parallel import main
from image_datasets import Labelled, draw_batch

pytestmark = [
    # Where a checkpoint is damaged, orbax leaves coroutines whose errors come up when collected.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
STEPS = 50


def start(out, *arguments):
    """The example as a process of its own, with one device."""
    command = [sys.executable, data_parallel.__file__, "--out", out, "--steps", STEPS, *arguments]
    return subprocess.Popen(
        [str(word) for word in command],
        env=os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(out, *arguments):
    """Run to the end, and return the digest of the last state."""
    process = start(out, *arguments)
    printed, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    return digest(printed)


def digest(printed):
    found = re.search(r"after (\d+) steps; state (\w+)", printed)
    assert found, printed
    return found[2]


def last_state(out):
    """The arrays of the last checkpoint, by name."""
    with ocp.CheckpointManager(Path(out).absolute()) as manager:
        step = manager.latest_step()
        here = SingleDeviceSharding(jax.devices()[0])
        wanted = ocp.args.Composite(state=ocp.args.StandardRestore(fallback_sharding=here))
        state = manager.restore(step, args=wanted)["state"]
    return step, state


def kill(process, number, when):
    """Kill one of the processes as soon as `when()` holds; return what the others said."""
    said = [process.stdout.readline() for _ in range(number + 1)]
    found = re.fullmatch(rf"process {number} has the id (\d+)\n", said[-1])
    assert found
    deadline = time.monotonic() + 120
    while not when():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(int(found[1]), signal.SIGKILL)
    killed = time.monotonic()
    _, errors = process.communicate(timeout=60)  # within a minute
    print(f"killed process {number}; ended {time.monotonic() - killed:.1f} s later:\n{errors}")
    return errors


def test_two_processes_are_one_and_may_be_killed_at_any_moment(tmp_path):
    one, two, killed = (tmp_path / name for name in ("one", "two", "killed"))
    # Slow enough not to be chaotic: on one machine rounding grew to 1e-4 at 0.02, on another at
    # 0.005. Adam still moves a weight by up to 1e-2.
    rate = ("--learning-rate", 0.0003)
    finish(one, *rate)
    both = (*rate, "--processes", 2)
    whole = finish(two, *both)
    (_, right), (_, ours) = last_state(one), last_state(two)
    leaves = [ocp.tree.to_flat_dict(state["params"]) for state in (right, ours)]
    furthest = max(float(np.abs(leaves[1][path] - a).max()) for path, a in leaves[0].items())
    print(f"largest difference in weights of one process and two: {furthest:.1e}")
    assert furthest < 1e-5  # some 1e-7 of rounding, and room for another machine's

    again = (*both, "--checkpoint-every", 1)
    saving = lambda: any(killed.glob("*tmp*")) and (killed / "3").exists()
    errors = kill(start(killed, *again), 0, saving)
    assert re.search(
        r"process 0 of 2 ended by signal 9 \(SIGKILL\), and the others with it", errors
    )
    assert all((path / "_CHECKPOINT_METADATA").exists() for path in killed.glob("[0-9]*[0-9]"))
    before, _ = last_state(killed)
    later = lambda: (killed / str(before + 5)).exists()
    errors = kill(start(killed, *again), 1, later)
    assert re.search(r"process 0: lost another process \(.*\); start all of them again", errors)
    assert "process 1 of 2 ended by signal 9 (SIGKILL), and the others with it" in errors
    assert finish(killed, *both) == whole


def run(capsys, out, *arguments):
    """The example in this process, on its eight devices."""
    with jax.numpy_dtype_promotion("standard"):  # optax asks for it
        status = main([str(word) for word in ("--out", out, "--batch-size", 20, *arguments)])
    printed, errors = capsys.readouterr()
    return status, printed + errors


def test_going_on_is_never_having_stopped(tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    _, printed = run(capsys, whole, "--steps", 12)
    assert "8 devices of 1 processes, from step 0" in printed
    run(capsys, parts, "--steps", 7)
    _, again = run(capsys, parts, "--steps", 12)
    assert "from step 7" in again
    assert digest(again) == digest(printed)


def test_it_learns(tmp_path, capsys):
    _, printed = run(capsys, tmp_path / "out", "--steps", 60)
    found = re.search(r"([\d.]+) % of the test images correct", printed)
    assert found
    assert float(found[1]) > 85


def test_every_epoch_has_each_image_once():
    data = Labelled(np.zeros((7, 1)), np.arange(7))
    epochs = [
        np.concatenate(
            [draw_batch(data, 3, 0, 3 * epoch + i, drop_last=False).labels for i in range(3)]
        )
        for epoch in range(2)
    ]
    assert [sorted(epoch) for epoch in epochs] == [list(range(7))] * 2
    assert list(epochs[0]) != list(epochs[1])


def test_what_it_refuses(tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    run(capsys, out, "--steps", 1)
    status, printed = run(capsys, out, "--steps", 2, "--seed", 1)
    assert status == 2
    assert "of one whose seed is 0, not 1: choose another --out" in printed
    monkeypatch.setattr(data_parallel, "CONVOLUTIONS", ((8, 1),))
    status, printed = run(capsys, out, "--steps", 2)
    assert status == 2
    assert "of one whose network is [[16, 1], [32, 2], [32, 1]], not [[8, 1]]" in printed
    monkeypatch.undo()
    (out / "9").mkdir()
    status, printed = run(capsys, out, "--steps", 2)
    assert status == 2
    assert f"{out / '9'} must be a whole checkpoint of this program" in printed
    (out / "9").rmdir()
    largest = max(out.glob("1/state/**/d/*"), key=lambda path: path.stat().st_size)
    os.truncate(largest, 100)
    status, printed = run(capsys, out, "--steps", 2)
    assert status == 2
    assert f"{out / '1'} must be a whole checkpoint of this program" in printed
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "under"):
        status, printed = run(capsys, path, "--steps", 2)
        assert status == 2
        assert "--out must be a folder" in printed
    gc.collect()  # what orbax has left, while it is ignored


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "must be an integer of at least 1, got 0"),
        (["--seed", "-1"], "must be an integer of at least 0, got -1"),
        (["--proceses", "2"], "unrecognized arguments: --proceses 2"),
        (["--coordinator", "here:1"], "--coordinator and --process-id must be given together"),
        (["--coordinator", "here:1", "--process-id", "0"], "less than --processes"),
        (["--cluster", "--processes", "2"], "--cluster must be given alone"),
    ],
)
def test_a_bad_flag_is_an_error_of_one_sentence(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err
