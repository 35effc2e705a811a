"""python -m benchmarks.chip_times, on small problems and this machine."""

import json

import jax
import pytest

from benchmarks.chip_times import __main__ as chip_times
from benchmarks.chip_times import figure as chip_figure
from benchmarks.programs import training_steps
from benchmarks.programs.cases import Problem


@pytest.fixture(autouse=True)
def lenient():
    """As Flax has it."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def small(monkeypatch):
    """Small problems, and one small training step."""
    problem = Problem("layer", "any", (4, 4, 4, 32), "bfloat16")
    monkeypatch.setattr(chip_times, "CHIP_PROBLEMS", [problem])
    few = {name: chip_times.JAX_NORMS[name] for name in ("jaxnorm", "flax.linen")}
    monkeypatch.setattr(chip_times, "JAX_NORMS", few)
    step = next(s for s in training_steps.steps(small=True) if s.name == "transformer, rms norm")
    monkeypatch.setattr(chip_times, "steps", lambda: [step])


@pytest.mark.usefixtures("small")
def test_norms_and_steps_are_timed_and_drawn(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is in the extra 'examples'")
    out = tmp_path / "times.json"
    assert chip_times.main(["--seconds", "0.01", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert [row["case"] for row in report["rows"]] == [
        "layer/any/bfloat16",
        "transformer, rms norm",
    ]
    assert all(seconds > 0 for row in report["rows"] for seconds in row["times"].values())
    assert "step, jaxnorm" in report["rows"][-1]["times"]
    out_text, progress = capsys.readouterr()
    assert "layer/any/bfloat16: copy" in progress
    assert out_text.count("| forward |") == 1
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_gains_are_over_flax():
    times = {
        "forward, flax.linen": 2.0,
        "forward, jaxnorm": 1.0,
        "forward, torch": 4.0,
        "copy": 1.0,
    }
    row = {"case": "any", "times": times}
    assert chip_figure.gains(row) == {"forward": {"jaxnorm": 2.0, "torch": 0.5}}


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--only", "("], "--only must be a regular expression"),
        (["--only", "bacth"], "--only must match a case"),
        (["--seconds", "nan"], "--seconds must be more than 0"),
        (["--out", "times.png"], "--out must be a .json file"),
        (["--out", "no-folder/times.json"], "--out must be a .json file in a folder that exists"),
        (["--torch"], "--torch must find PyTorch"),
    ],
)
@pytest.mark.usefixtures("small")
def test_a_wrong_flag_is_one_sentence(flags, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert chip_times.main(flags) == 2
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("small")
@pytest.mark.thorough
def test_ctrl_c_leaves_what_was_timed(tmp_path, capsys, monkeypatch):
    def step_calls(step):
        raise KeyboardInterrupt

    monkeypatch.setattr(chip_times, "step_calls", step_calls)
    out = tmp_path / "times.json"
    assert chip_times.main(["--seconds", "0.01", "--out", str(out)]) == 130
    assert len(json.loads(out.read_text())["rows"]) == 1
    assert "Interrupted" in capsys.readouterr().err
