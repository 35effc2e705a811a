"""Programs that are compiled for TPUs and GPUs: bytes, collectives, tables and the command."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.accelerators import __main__ as accelerators
from benchmarks.accelerators import page
from benchmarks.accelerators import rows as accelerator_rows
from benchmarks.accelerators.chips import CHIPS, Chip, compiled
from benchmarks.programs import training_steps
from benchmarks.programs.cases import Problem
from benchmarks.programs.jax_norms import jaxnorm_norm
from benchmarks.programs.norms import arguments, size_of

CHIP = CHIPS["v5e"]
SMALL = {step.name: step for step in training_steps.steps(small=True)}
# Too large for VMEM. Rms norm is layer norm with less, instance norm is batch norm of an example.
PROBLEMS = {
    "batch": (256, 28, 28, 256),
    "layer": (32768, 4096),
    "group": (64, 64, 64, 320),
}


@pytest.fixture(autouse=True)
def lenient():
    """As Flax has it."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def tpu():
    """Skips a test where there is no compiler for TPUs."""
    if CHIP.missing:
        pytest.skip("libtpu is in the extra 'tpu'")
    return CHIP


@pytest.mark.parametrize("norm", PROBLEMS)
def test_a_norm_passes_over_x_once_and_keeps_nothing_but_x(norm, tpu):
    problem = Problem(norm, "any", PROBLEMS[norm], "bfloat16")
    forward, backward, context = accelerator_rows.norm_rows(tpu, problem, ["jaxnorm"])
    (flax,) = accelerator_rows.norm_rows(tpu, problem, ["Flax"], ["context"])
    assert forward["passes"] == 2  # once for the statistics, once for y
    assert backward["passes"] == 4  # x and dy, for the sums and for dx
    assert forward["scratch"] <= 0.05 * forward["x"]
    assert backward["scratch"] <= 0.05 * backward["x"]
    assert forward["kept"] <= 1.01 * forward["x"]
    assert context["bytes"] <= page.LIMIT * flax["bytes"]


def test_collectives_of_batch_norm(tpu):
    found = {}
    for row in accelerator_rows.device_rows(tpu, ["jaxnorm"]):
        how = row["case"].rpartition(", ")[2]
        kinds = [each["kind"] for each in row["collectives"]]
        found[row["library"], how, row["program"]] = kinds
    assert found["jaxnorm", "shard_map", "forward of 8"] == ["all-gather"]
    assert found["jaxnorm", "shard_map", "both of 8"] == ["all-gather", "all-reduce"]
    # The mean of the sample, and the sums about it; backward one more.
    assert found["jaxnorm", "jit", "forward of 8"] == ["all-reduce"] * 2
    assert found["jaxnorm", "jit", "both of 8"] == ["all-reduce"] * 3


def test_y_alone_is_one_kernel_of_a_row_for_gpus():
    chip = CHIPS["H100"]
    if chip.missing:
        pytest.skip("the compiler for NVIDIA GPUs is in the extra 'cuda'")
    for norm in ("layer", "rms"):
        x, params, _ = arguments(Problem(norm, "any", (8192, 4096), "bfloat16"))
        call = jaxnorm_norm(Problem(norm, "any", x.shape, "bfloat16")).apply
        program = compiled(chip, lambda x, params, call=call: call(x, params, None)[0], (x, params))
        row = accelerator_rows.measure(program, x, 2 * size_of(x))
        assert row["bytes"] <= 1.01 * row["least"]


@pytest.mark.thorough
@pytest.mark.usefixtures("unoptimized")
@pytest.mark.parametrize(
    "name",
    ["ResNet-50", "transformer, add layer norm", "transformer, layer norm, scan and remat"],
)
def test_training_steps_run_and_learn_the_same_in_both_libraries(name):
    losses = {}
    for library in training_steps.LIBRARIES:
        update, shapes = training_steps.training_step(SMALL[name], library)
        rng = np.random.default_rng(0)
        draw = lambda a, rng=rng: jnp.asarray(
            rng.integers(0, 200, a.shape)
            if jnp.issubdtype(a.dtype, jnp.integer)
            else 0.1 * rng.standard_normal(a.shape),
            a.dtype,
        )
        state, *batch = jax.tree.map(draw, shapes)
        update = jax.jit(update)
        state, first = update(state, *batch)
        _, second = update(state, *batch)
        losses[library] = float(first), float(second)
    ours, theirs = losses["jaxnorm"], losses["Flax"]
    assert ours == pytest.approx(theirs, rel=0.02)  # bfloat16 has a precision of 0.4 %


@pytest.fixture
def rows():
    """Results of one chip: ours and Flax's."""
    row = {"chip": "v5e", "case": "layer/any/bfloat16", "x": 100, "least": 200, "on_chip": 0}
    row |= {"scratch": 0, "kept": 100, "passes": 2, "kernels": 1300.0}
    return [
        row | {"library": library, "program": program, "bytes": size}
        for program in ("forward", "backward", "context", "step")
        for library, size in (("jaxnorm", 110), ("Flax", 100))
    ]


def test_the_page_compares_with_flax(rows, tmp_path):
    text = "\n".join(page.tables(rows))
    assert "| layer/any/bfloat16 | 1.100 |" in text
    assert "moves 1.10 times the bytes of Flax" in page.sentences(rows)[0]
    assert "1,300" not in text  # a TPU starts a program once, a GPU each kernel
    assert "1,300" in "\n".join(page.tables([row | {"chip": "H100"} for row in rows]))
    assert page.kernel_table(rows) == []  # no kernel computed them
    page.write({"rows": rows}, tmp_path)
    assert page.read(tmp_path / "results.json") == {"rows": rows}
    assert (tmp_path / "table.md").read_text().startswith("# Bytes over Flax's")


def test_a_kernel_has_its_own_table(rows):
    by_kernel = [row | {"library": page.KERNEL} for row in rows if row["library"] == "jaxnorm"]
    (*_, line) = page.kernel_table(by_kernel + rows)
    assert line == "| layer/any/bfloat16 | 0.550 | 0.550 |  |  | 1.100 | 0.000 |"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--chips", "v5x"], "--chips must be some of v5e, v5p, v6e, 7x, H100, B300, got 'v5x'"),
        (["--parts", "nrms"], "--parts must be some of norms, steps, devices, kernels, got 'nrms'"),
        (["--only", "("], "--only must be a regular expression, got '('"),
        (["--replot"], "--replot must find"),
    ],
)
def test_a_wrong_flag_is_one_sentence(flags, sentence, tmp_path, capsys):
    assert accelerators.main([*flags, "--out", str(tmp_path / "out")]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_chip_without_compiler_is_left_out(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Chip, "missing", "libtpu is in the extra 'tpu'")
    assert accelerators.main(["--chips", "v5e", "--out", str(tmp_path)]) == 2
    assert "v5e: left out, libtpu is in the extra 'tpu'" in capsys.readouterr().err


def test_ctrl_c_leaves_what_was_counted(rows, tmp_path, capsys, monkeypatch):
    def compile_all(chip, parts, only, report, folder):
        report["rows"] += rows
        raise KeyboardInterrupt

    monkeypatch.setattr(Chip, "missing", None)
    monkeypatch.setattr(accelerators, "compile_all", compile_all)
    assert accelerators.main(["--chips", "v5e", "--out", str(tmp_path)]) == 130
    assert page.read(tmp_path / "results.json")["rows"] == rows
    assert "Interrupted" in capsys.readouterr().err
