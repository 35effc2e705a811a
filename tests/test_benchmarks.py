"""The command `python -m benchmarks`: cases, measurements, summaries, errors."""

import importlib.util
import json
import random

import jax
import numpy as np
import pytest
import shapes

from benchmarks.cpu_times import command, machine, summary, table
from benchmarks.programs import cases, truth
from benchmarks.programs.cases import SHAPES, Case, Problem
from benchmarks.programs.peers import PEERS, Peer
from benchmarks.programs.timing import Call, take_turns
from benchmarks.report import as_json

TINY = {
    norm: Problem(norm, "tiny", networks["tiny"], "float32") for norm, networks in SHAPES.items()
}
# torch.compile alone would take longer than all other tests of this file.
QUICK = [peer for peer in PEERS if not peer.slow_to_compile]


@pytest.fixture
def lenient():
    """As their libraries have it: other peers promote dtypes and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def test_cases_are_well_formed():
    every = cases.all_cases()
    names = [case.name for case in every]
    assert len(names) == len(set(names)) > 150
    assert {case.problem.norm for case in every} == set(SHAPES)
    assert {case.problem.norm for case in every if case.mode == "context"} == set(SHAPES)
    assert set(cases.quick_cases()) <= set(every)
    for problem in {case.problem for case in every if case.problem.norm == "group"}:
        assert problem.features % problem.groups == 0
    # The cases of a problem are neighbours, so that they share its data and its truth.
    runs = [i for i in range(1, len(every)) if every[i].problem != every[i - 1].problem]
    assert len(runs) + 1 == len({case.problem for case in every})


def test_names_mean_what_they_mean_in_the_tests():
    for ours, theirs in ((cases.ROWS, shapes.ROWS), (SHAPES["group"], shapes.IMAGES)):
        for network in ours.keys() & theirs.keys():
            assert ours[network][-1] == theirs[network][-1]
    assert {"gpt2", "bert-large", "llama-7b", "vit-so400m", "mlp"} <= cases.ROWS.keys()


@pytest.mark.parametrize(
    ("norm", "shape", "forward", "backward"),
    [
        ("layer", (4, 8), 2, 3),
        ("rms", (4, 8), 2, 3),
        ("batch", (4, 2, 2, 8), 3, 5),
        ("group", (2, 64, 64, 320), 2, 3),  # a group of 160 KiB
        ("group", (1, 512, 512, 64), 3, 5),  # of 2 MiB
        ("instance", (2, 64, 64, 8), 2, 3),
        ("instance", (1, 1024, 1024, 8), 3, 5),
    ],
)
@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_minimum_bytes(norm, shape, forward, backward, dtype, size):
    if (shape, dtype) == ((1, 512, 512, 64), "bfloat16"):
        forward, backward = 2, 3  # half as large, it just fits
    problem, elements = Problem(norm, "any", shape, dtype), np.prod(shape)
    passes = {"forward": forward, "backward": backward, "both": forward + backward}
    for mode, times in passes.items():
        assert Case(problem, mode).minimum_bytes == times * size * elements
    assert Case(problem, "context").minimum_bytes is None


@pytest.mark.parametrize("norm", SHAPES)
@pytest.mark.parametrize("mode", ["backward", "context"])
def test_the_truth_is_the_derivative(norm, mode):
    problem = TINY[norm]._replace(shape=(2, 3, 8) if norm != "layer" else (3, 8))
    case, right = Case(problem, mode), truth.truth(Case(problem, mode))
    cotangent = {"backward": ("y", "dy"), "context": ("z", "dz")}[mode]
    given = {**truth.inputs(problem), **truth.context_inputs(problem)}
    given = {name: a.astype(np.float64) for name, a in given.items()}

    def value(name, step, direction):
        moved = given | {name: given[name] + step * direction}
        x, result = moved["x"], None
        if mode == "context":
            x = moved["a"] @ moved["w_in"] + moved["b_in"] + x
        result = truth.standardize(problem, x)[0] * moved["scale"] + moved.get("bias", 0)
        if mode == "context":
            result = result @ moved["w_out"]
        return (result * given[cotangent[1]]).sum()

    rng = np.random.default_rng(0)
    for name in (name.removeprefix("d") for name in right if name.startswith("d")):
        direction = rng.standard_normal(given[name].shape)
        slope = (value(name, 1e-6, direction) - value(name, -1e-6, direction)) / 2e-6
        expected = (right[f"d{name}"] * direction).sum()
        assert slope == pytest.approx(expected, rel=1e-5, abs=1e-5), (case.name, name)


def check(peer: Peer, case: Case):
    if not peer.installed:
        pytest.skip(f"{peer.install} is in the extra 'benchmarks'")
    call = peer.make(case)
    results = call.results(call.run())
    call.wait(call.run())
    assert truth.largest_error(case, results) < 20  # rounding of sums over 256 terms


@pytest.mark.parametrize("peer", QUICK, ids=lambda peer: peer.name)
@pytest.mark.parametrize("norm", SHAPES)
@pytest.mark.filterwarnings("default")  # of other libraries
def test_each_peer_agrees_with_float64(peer, norm, lenient):
    check(peer, Case(TINY[norm], "forward"))
    check(peer, Case(TINY[norm], "both"))


# The other modes are the same code for all peers on JAX, and for all norms.
@pytest.mark.parametrize("peer", [PEERS[0], PEERS[-2]], ids=lambda peer: peer.name)
@pytest.mark.parametrize("mode", ["backward", "context"])
@pytest.mark.filterwarnings("default")
def test_the_other_modes_agree_with_float64(peer, mode, lenient):
    check(peer, Case(TINY["batch"]._replace(dtype="bfloat16"), mode))


def test_turns_are_taken_by_all_in_changing_order():
    order = []
    calls = {
        name: Call(lambda name=name: order.append(name), lambda _: None, lambda _: {})
        for name in "abc"
    }
    measured = take_turns(calls, 0.01, random.Random(0), rounds=5)
    assert len({len(seconds) for seconds in measured.values()}) == 1
    assert min(min(seconds) for seconds in measured.values()) > 0
    firsts = [name for name, before in zip(order[1:], order, strict=False) if name != before]
    assert {("a", "b"), ("b", "a")} <= set(zip(firsts[1:], firsts, strict=False))


def result(name: str = "layer/x/float32/forward", /, **medians: float):
    measured = {
        peer.replace("_", "."): {
            "median": value, "lower": value, "upper": value, "error": 1.0,
            "compile_seconds": None, "scratch_bytes": None, "note": "",
        }
        for peer, value in medians.items()
    }  # fmt: skip
    norm, network, dtype, mode = name.split("/")
    return {
        "case": name, "norm": norm, "network": network, "shape": [4, 8], "dtype": dtype,
        "mode": mode, "minimum_bytes": 256, "peers": measured,
    }  # fmt: skip


def test_summary():
    results = [
        result("a/x/float32/forward", jaxnorm=1.0, flax_linen=2.0, torch=0.5, copy=0.1),
        result("b/x/float32/forward", jaxnorm=1.0, flax_linen=8.0, torch=9.0),
        result("c/x/float32/forward", jaxnorm=1.04, torch=1.0),  # within 5 %
        result("d/x/float32/forward", jaxnorm=11e-6, torch=10e-6),  # short: within 15 %
        result("e/x/float32/forward", jaxnorm=12e-6, torch=10e-6),
        result("f/x/float32/forward", torch=1.0),  # nothing of ours to compare
    ]
    found = summary.summarize(results)
    assert found["speedup_over_flax"] == pytest.approx(4)
    assert found["speedup_over_fastest_peer"] == pytest.approx(
        (0.5 * 8 / 1.04 / 1.1 / 1.2) ** (1 / 5)
    )
    assert [(row["case"][0], row["peer"]) for row in found["behind"]] == [
        ("a", "torch"),
        ("e", "torch"),
    ]
    words = "\n".join(summary.sentences(found, most=1))
    assert "in 2 of 5 cases" in words
    assert "2.00 times torch" in words
    assert "and 1 more" in words
    assert "Nothing to compare" in summary.sentences(summary.summarize(results[-1:]))[0]


def test_another_row_of_ours_is_no_peer():
    entry = result(jaxnorm=1.0, flax_linen=2.0)
    entry["peers"]["jaxnorm (formulas)"] = {"median": 0.1}
    assert summary.ratio(entry) == 0.5


def test_table():
    rows = table.overview([result(jaxnorm=1e-3, torch=2e-6, copy=1e-9)]).splitlines()
    assert rows[-1] == "| layer/x/float32/forward | 4x8 | 1 ms (1) | **2 us** (1) | 1 ns (1) |"


def test_details_are_a_line_for_each_case():
    entry = result(jaxnorm=1e-3, torch=2e-6)
    entry["peers"]["jaxnorm"] |= {"upper": 2e-3, "compile_seconds": 0.1, "note": "slow to start"}
    assert table.details([entry]).splitlines()[2:] == [
        "| layer/x/float32/forward | 1 ms to 2 ms (100 ms) | 2 us to 2 us |"
    ]
    assert table.notes([entry, entry]) == ["- jaxnorm: slow to start."]


def test_a_report_is_one_row_per_line():
    rows = [{"case": "a", "shape": [1, 2]}, {"case": "b", "shape": []}]
    report = {"machine": {"cores": 2}, "results": rows, "not_run": []}
    text = as_json(report)
    assert json.loads(text) == report
    assert len(text.splitlines()) == 8  # braces, three keys, two rows and the end of their list


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The command, without measuring imports; its exit status and what it wrote."""
    monkeypatch.setattr(command, "import_seconds", lambda module: 0.1)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    tiny = ["--only", "layer/tiny/float32/forward", "--seconds", "0.01"]

    def run(*arguments):
        status = command.main([*tiny, "--out", str(tmp_path), *arguments])
        path = tmp_path / "results.json"
        return status, json.loads(path.read_text()) if path.exists() else None

    return run


@pytest.mark.filterwarnings("default")
def test_the_command(run, tmp_path, capsys):
    status, report = run("--peers", "jaxnorm,flax.linen")
    assert status == 0
    (entry,) = report["results"]
    assert set(entry["peers"]) == {"jaxnorm", "flax.linen", "copy"}
    ours = entry["peers"]["jaxnorm"]
    assert 0 < ours["lower"] <= ours["median"] <= ours["upper"]
    assert ours["error"] < 4
    assert ours["compile_seconds"] > 0
    assert report["machine"]["versions"]["jax"] == jax.__version__
    assert {"jax", "jaxnorm", "flax.linen"} == set(report["imports"])
    page = (tmp_path / "table.md").read_text()
    assert "layer/tiny/float32/forward" in page
    assert "torch, all cases: left out by --peers." in page
    assert "Geometric mean" in capsys.readouterr().out
    if importlib.util.find_spec("matplotlib"):
        for name in ("ratios.png", "roofline.png"):
            assert (tmp_path / name).stat().st_size > 10_000
            (tmp_path / name).unlink()
    (tmp_path / "table.md").unlink()
    assert run("--replot") == (0, report)
    assert (tmp_path / "table.md").read_text() == page


@pytest.mark.filterwarnings("default")
def test_says_what_it_could_not_run_and_why(run, tmp_path, monkeypatch, capsys):
    def refuse(case):
        raise RuntimeError("no such kernel\nand a long story")

    peers = (PEERS[0], Peer("broken", "jax", refuse, "jax"), Peer("absent", "absent_", refuse, "a"))
    monkeypatch.setattr(command, "PEERS", peers)
    status, report = run()
    assert status == 0
    assert report["not_run"] == [
        {"case": "*", "peer": "absent", "reason": "not installed; pip install a"},
        {
            "case": "layer/tiny/float32/forward",
            "peer": "broken",
            "reason": "RuntimeError: no such kernel",
        },
    ]
    assert "absent: not installed" in capsys.readouterr().err


@pytest.mark.filterwarnings("default")
def test_ctrl_c_leaves_what_was_measured(run, monkeypatch, capsys):
    results = [result(jaxnorm=1.0, flax_linen=2.0)]

    def measure(*_):
        if not results:
            raise KeyboardInterrupt
        return results.pop(), []

    monkeypatch.setattr(command, "measure", measure)
    status, report = run("--only", "layer/tiny")
    assert status == 130
    assert len(report["results"]) == 1
    assert report["interrupted"]
    assert "Interrupted: 1 of 6 cases" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "no-such-case"], "--only must be found in the name of a case, got"),
        (["--only", "("], "--only must be a regular expression, got '('"),
        (["--peers", "jaxnorm,numpy"], "--peers must be some of jaxnorm"),
        (["--seconds", "0"], "--seconds must be more than 0, got 0"),
        (["--replot"], "--replot must find"),
        (["--out", "/dev/null/folder"], "--out must be a folder that can be written to"),
    ],
)
def test_errors_are_one_sentence(run, arguments, message, capsys):
    status, report = run(*arguments)
    printed = capsys.readouterr()
    assert (status, report, printed.out) == (2, None, "")
    assert message in printed.err
    assert printed.err.count("\n") == 1


def test_imports_are_timed_in_a_process_of_their_own():
    assert 0 < machine.import_seconds("json") < 10


def test_without_matplotlib_there_are_no_figures(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "results.json").write_text(json.dumps(REPORT))
    find = importlib.util.find_spec
    hide = lambda name: None if name == "matplotlib" else find(name)
    monkeypatch.setattr(importlib.util, "find_spec", hide)
    assert run("--replot")[0] == 0
    assert "No figures: matplotlib is not installed" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.png"))


REPORT = {
    "machine": {
        "cpu": "a CPU", "cores": 2, "system": "Linux", "backend": "cpu", "device": "cpu",
        "pages_kept": True, "versions": {"jax": "0"},
    },
    "settings": {}, "imports": {}, "results": [result(jaxnorm=1.0, flax_linen=2.0)],
    "not_run": [], "interrupted": False,
}  # fmt: skip
