"""The example scripts: training, interruption and resumption, errors."""

import csv
import gc
import importlib
import json
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

pytest.importorskip("sklearn", reason="scikit-learn is in the extra 'examples'")
pytest.importorskip("orbax.checkpoint", reason="orbax is in the extra 'examples'")

import common
import orbax.checkpoint as ocp
from image_datasets import Labelled, draw_batch
from jax.sharding import SingleDeviceSharding
from matplotlib.image import imread
from text_dataset import decode, load_text, windows

pytestmark = [
    # Where a checkpoint is damaged, orbax leaves coroutines whose errors come up when collected.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
EXAMPLES = ("mlp", "resnet", "lstm", "transformer", "gan", "style", "diffusion", "fine_tune")
# A run as short as it may be to learn something: arguments, the score's column and its least
# value; or its largest, where it is a loss.
BRIEF = {
    "mlp": (
        60,
        ["--tasks=classification", "--norms=batch", "--learning-rates=0.1"],
        ("test_score", 0.9, 1.0),
    ),
    "resnet": (60, ["--norms=batch", "--tune-steps=2"], ("accuracy", 0.8, 1.0)),
    "lstm": (60, ["--tasks=text", "--norms=layer"], ("bits", 0.0, 4.0)),
    "transformer": (
        45,
        ["--norms=pre-layer", "--write=5", "--learning-rate=0.004"],
        ("bits", 0.0, 4.3),
    ),
    "gan": (300, ["--norms=batch-layer"], ("generated_recognized", 0.8, 1.0)),
    "style": (60, ["--norms=instance"], ("china_colour_left", 0.0, 0.6)),
    # The mean of all digits would have a loss of 0.3.
    "diffusion": (
        90,
        ["--norms=adaptive-layer", "--sampling-steps=4", "--learning-rate=0.01"],
        ("loss", 0.0, 0.22),
    ),
    "fine_tune": (
        40,
        ["--ways=recalibrated", "--tune-steps=20", "--tune-rate=0.003"],
        ("new", 0.3, 1.0),
    ),
}
# Constants of theirs, where it would take long.
SMALLER = {
    "transformer": {"LAYERS": 1},
    "style": {"PIECE": 32},
    "diffusion": {"LAYERS": 1, "FEATURES": 32, "DRAWN": 200},
    "fine_tune": {"TESTED": 192, "WIDE": 16, "WIDER": 16},
}


@pytest.fixture(autouse=True)
def promotion_as_users_have_it():
    """The examples are written for the settings that JAX comes with."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def run(name, *arguments):
    """An example in this process, as its user calls it."""
    return importlib.import_module(name).main([str(word) for word in arguments])


def last_states(out):
    """The last checkpoint of each run: its step and its arrays."""
    states = {}
    here = SingleDeviceSharding(jax.devices()[0])
    wanted = ocp.args.Composite(state=ocp.args.StandardRestore(fallback_sharding=here))
    for folder in sorted(Path(out).glob("*/checkpoints")):
        with ocp.CheckpointManager(folder.absolute()) as manager:
            step = manager.latest_step()
            state = manager.restore(step, args=wanted)["state"]
        states[folder.parent.name] = step, ocp.tree.to_flat_dict(state)
    return states


def interrupt_at(monkeypatch, update):
    """Ctrl-C, as it comes in the middle of a run."""

    class Bar(common.tqdm):
        updates = 0

        def update(self, n=1):
            type(self).updates += 1
            if self.updates == update:
                raise KeyboardInterrupt
            return super().update(n)

    monkeypatch.setattr(common, "tqdm", Bar)


def train(name, out, *more):
    """A brief run of an example."""
    steps, arguments, _ = BRIEF[name]
    arguments = [*arguments, f"--steps={steps}", f"--checkpoint-every={steps // 3}"]
    return run(name, *arguments, "--seeds=1", "--out", out, *more)


@pytest.fixture
def two_devices(monkeypatch):
    """As many as there are cores, of the eight that the tests have."""
    monkeypatch.setattr(jax, "device_count", lambda: 2)


@pytest.mark.usefixtures("two_devices")
@pytest.mark.parametrize("name", EXAMPLES)
def test_it_learns(name, tmp_path, monkeypatch):
    for constant, value in SMALLER.get(name, {}).items():
        monkeypatch.setattr(importlib.import_module(name), constant, value)
    steps, _, (column, least, most) = BRIEF[name]
    assert train(name, tmp_path) == 0
    with open(tmp_path / "scores.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert least <= float(row[column]) <= most
    (metrics,) = tmp_path.glob("*-0/metrics.jsonl")
    history = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["step"] for line in history] == list(range(1, steps + 1))
    if name != "gan":  # whose two losses are a game's
        losses = [line["loss"] for line in history]
        assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    figure = imread(tmp_path / "figure.png")
    assert min(figure.shape[:2]) > 300
    assert figure.std() > 0.05


@pytest.mark.usefixtures("two_devices")
def test_an_interrupted_run_continues_exactly(tmp_path, monkeypatch, capsys):
    """Of the smallest example: the loop, checkpoints and batches of all are those of common.py."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    every = BRIEF["mlp"][0] // 3
    assert train("mlp", whole) == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, every + 3)
        assert train("mlp", parts) == 130
    assert "interrupted; the same command with --resume continues" in capsys.readouterr().err
    assert [step for step, _ in last_states(parts).values()] == [every]
    assert train("mlp", parts, "--resume") == 0
    right, ours = last_states(whole), last_states(parts)
    assert right.keys() == ours.keys()
    for key, (step, state) in right.items():
        assert ours[key][0] == step
        assert ours[key][1].keys() == state.keys()
        for path, array in state.items():
            np.testing.assert_array_equal(ours[key][1][path], array, err_msg=str(path))
    (metrics,) = whole.glob("*-0/metrics.jsonl")
    for path in ("scores.csv", metrics.relative_to(whole)):
        assert (parts / path).read_text() == (whole / path).read_text()


def test_a_real_interrupt_is_one_sentence(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, importlib.import_module("mlp").__file__, "--out", str(out)]
    command += ["--tasks=regression", "--norms=none", "--learning-rates=0.01", "--seeds=1"]
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        [*command, "--steps=1000000", "--checkpoint-every=10"],
        env=environment,
        # A shell starts background programs so that they and their children ignore interrupts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not list(out.glob("*/checkpoints/20")):
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1].startswith("mlp.py: interrupted; the same command with --resume")
    assert "Traceback" not in errors


def in_one_sentence(capsys):
    """What an example said last, without a traceback."""
    errors = capsys.readouterr().err.strip().splitlines()
    assert not any("Traceback" in line for line in errors)
    return errors[-1]


SHORT = ["--tasks=regression", "--learning-rates=0.01", "--seeds=1", "--steps=3"]


def test_what_is_in_the_way_is_left_alone(tmp_path, capsys):
    out = tmp_path / "out"
    assert run("mlp", "--out", out, "--resume") == 2
    assert "--resume continues the runs in --out, but" in in_one_sentence(capsys)
    assert run("mlp", *SHORT, "--norms=none", "--out", out) == 0
    before = last_states(out)
    assert run("mlp", *SHORT, "--norms=none", "--out", out) == 2
    assert f"--out must be empty or new, but {out} is not: add --resume" in in_one_sentence(capsys)
    (tmp_path / "file").touch()
    assert run("mlp", *SHORT, "--out", tmp_path / "file") == 2
    assert "--out must be a folder" in in_one_sentence(capsys)
    assert run("mlp", *SHORT, "--out", tmp_path / "file" / "under") == 2
    assert "--out must be a folder that can be made" in in_one_sentence(capsys)
    # More of the same may be added; what would be another training may not.
    assert run("mlp", *SHORT, "--norms=none,layer", "--out", out, "--resume") == 0
    assert last_states(out).keys() > before.keys()
    assert run("mlp", *SHORT, "--norms=none", "--batch-size=8", "--out", out, "--resume") == 2
    assert "of one whose batch_size is 64, not 8: choose another --out" in in_one_sentence(capsys)


def test_the_checkpoint_of_another_model_is_refused(tmp_path, capsys):
    out = tmp_path / "out"
    assert run("mlp", *SHORT, "--norms=none", "--out", out) == 0
    (out / "regression-none-0.01-0").rename(out / "none-0")
    assert run("style", "--norms=none", "--steps=3", "--out", out, "--resume") == 2
    said = in_one_sentence(capsys)
    assert "they are of one whose example is mlp, not style: choose another --out" in said


def test_damaged_files_are_named(tmp_path, capsys):
    out = tmp_path / "out"
    folder = out / "regression-none-0.01-0"
    arguments = [*SHORT, "--norms=none", "--out", out]
    assert run("mlp", *arguments) == 0
    metrics = folder / "metrics.jsonl"
    text = metrics.read_text()
    metrics.write_text(text[:40])
    assert run("mlp", *arguments, "--resume") == 2
    assert f"{metrics} must have the metrics of the first 3 steps" in in_one_sentence(capsys)
    metrics.write_text(text.replace('"loss"', '"less"'))
    assert run("mlp", *arguments, "--resume") == 2
    assert "must have the metrics of the first 3 steps" in in_one_sentence(capsys)
    metrics.write_text(text)
    largest = max(folder.glob("**/d/*"), key=lambda path: path.stat().st_size)
    os.truncate(largest, 100)
    assert run("mlp", *arguments, "--resume") == 2
    said = in_one_sentence(capsys)
    assert f"{folder / 'checkpoints' / '3'} must be a whole checkpoint of this program" in said
    gc.collect()  # what orbax has left, while it is ignored


def test_another_text_is_refused_but_not_another_place(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.import_module("transformer"), "LAYERS", 1)
    first, moved = tmp_path / "first", tmp_path / "moved"
    first.write_text("to be or not to be, " * 200)
    moved.write_text(first.read_text())
    flags = ["--norms=none", "--steps=2", "--write=2", "--batch-size=4", "--out", tmp_path / "out"]
    assert run("transformer", *flags, "--text", first) == 0
    assert run("transformer", *flags, "--text", moved, "--resume") == 0
    first.write_text(first.read_text().replace("not", "now"))
    assert run("transformer", *flags, "--text", first, "--resume") == 2
    assert "they are of one whose data is" in in_one_sentence(capsys)


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    parser = common.make_parser("example", None, ("none",), steps=3, seeds=1, batch_size=2)
    args = parser.parse_args(["--out", str(tmp_path), "--checkpoint-every=2"])

    def step(state, number):
        divisor = 1.0 if number < 2 else 0.0
        return {"weights": state["weights"] / divisor}, {"loss": state["weights"].sum()}

    with pytest.raises(common.DivergedError, match="weights are not finite at step 3: "):
        common.train(args, "run", {"weights": jax.numpy.ones(3)}, step, lambda i: (i,))
    assert [step for step, _ in last_states(tmp_path).values()] == [2]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys):
    out = tmp_path / "style"
    arguments = ["--norms=instance", "--seeds=1", "--steps=20", "--learning-rate=1e30"]
    assert run("style", *arguments, "--out", out) == 2
    assert re.search(r"instance-0: the loss is (nan|inf) at step \d+: ", in_one_sentence(capsys))
    assert not (out / "scores.csv").exists()
    # Where learning rates are compared, that is a result.
    out = tmp_path / "mlp"
    arguments = [*SHORT, "--norms=none", "--steps=20", "--learning-rates=0.01,1e9"]
    assert run("mlp", *arguments, "--out", out) == 0
    printed = capsys.readouterr().out
    assert re.search(r"none-1000000000.0-0: the loss is (nan|inf) at step \d+: ", printed)
    with open(out / "scores.csv", newline="") as file:
        assert [row["finite_runs"] for row in csv.DictReader(file)] == ["1", "0"]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("mlp", ["--norms=batch,leyer"], "must be some of none,batch,layer,rms, got 'leyer'"),
        ("mlp", ["--learning-rates=0.1,fast"], "must be a number above 0, got 'fast'"),
        ("mlp", ["--stepps=3"], "unrecognized arguments: --stepps=3"),
        ("resnet", ["--dataset=imagenet"], "invalid choice: 'imagenet'"),
        ("lstm", ["--steps=0"], "must be an integer of at least 1, got 0"),
        ("transformer", ["--learning-rate=nan"], "must be a number above 0, got 'nan'"),
        ("gan", ["--batch-size=1"], "must be an integer of at least 2, got 1"),
        ("style", ["--seeds=-1"], "must be an integer of at least 1, got -1"),
        ("diffusion", ["--sampling-steps=0"], "must be an integer of at least 1, got 0"),
        ("fine_tune", ["--ways=frosen"], "argument --ways: must be some of untuned,batch,frozen,"),
        ("fine_tune", ["--tune-batch-size=3"], "invalid choice: 3"),
    ],
)
def test_a_bad_flag_is_an_error_of_one_sentence(name, arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        run(name, *arguments)
    assert error.value.code == 2
    assert message in in_one_sentence(capsys)


def test_bad_data_is_an_error_of_one_sentence(tmp_path, capsys):
    out = ("--out", tmp_path / "out")
    binary, short = tmp_path / "binary", tmp_path / "short"
    binary.write_bytes(b"\xff\xfe\x00\xff")
    short.write_text("a short text")
    for name in ("lstm", "transformer"):
        assert run(name, "--text", tmp_path / "missing", *out) == 2
        assert "--text must be a text file in UTF-8" in in_one_sentence(capsys)
    assert run("lstm", "--tasks=text", "--text", binary, *out) == 2
    assert "--text must be a text file in UTF-8" in in_one_sentence(capsys)
    assert run("lstm", "--tasks=text", "--text", short, *out) == 2
    assert "the text must have at least 65 characters in each" in in_one_sentence(capsys)
    assert run("resnet", "--dataset=mnist", *out) == 2
    assert "--data-dir must hold train-images-idx3-ubyte" in in_one_sentence(capsys)
    assert run("resnet", "--batch-size=12", *out) == 2
    assert "--batch-size must be a multiple of the 8 devices, got 12" in in_one_sentence(capsys)
    assert run("gan", "--batch-size=899", *out) == 2
    assert "--batch-size must be at most 898, the images to learn" in in_one_sentence(capsys)


def test_text_is_read_and_cut():
    text = load_text(None)
    assert len(text.train) + len(text.test) > 1e6
    assert "\nimport sys\n" in decode(text.train)
    cut = windows(text.test, 5, 11, np.random.default_rng(0))
    assert cut.shape == (5, 11)
    assert all(decode(piece) in decode(text.test) for piece in cut)


def test_whole_batches_of_epochs():
    data = Labelled(np.zeros((7, 1)), np.arange(7))
    labels = [draw_batch(data, 3, 0, step).labels for step in range(4)]
    assert [len(batch) for batch in labels] == [3, 3, 3, 3]
    assert len(set(np.concatenate(labels[:2]))) == 6
    assert len(set(np.concatenate(labels[2:]))) == 6


@pytest.mark.parametrize("name", EXAMPLES)
def test_its_docstring_says_how_long_and_how_well(name):
    text = (Path(common.__file__).parent / f"{name}.py").read_text()
    doc = text.split('"""')[1]
    assert f"    python examples/{name}.py\n" in doc
    assert re.search(r"It takes [^.]*\d[^.]* on two CPU cores\. Expected", doc)


def test_layer_norm_makes_gradients_indifferent_to_the_size_of_weights():
    lstm, nnx = importlib.import_module("lstm"), importlib.import_module("flax.nnx")
    symbols, target = np.arange(60, dtype=np.int32).reshape(4, 15) % 18, np.arange(4)
    first_to_last = {}
    for norm in ("layer", "none"):
        model = lstm.LSTM(norm, "digits", nnx.Rngs(0))
        graph, state = nnx.split((model, None))
        for gain in (0.5, 4.0):
            norms = lstm.gradient_norms(state, symbols, target, gain, graph=graph, task="digits")
            first_to_last[norm, gain] = float(norms[0] / norms[-1])
    # But for epsilon, 1e-6 of a variance of about 1/4 of the smaller weights' products.
    assert first_to_last["layer", 0.5] == pytest.approx(first_to_last["layer", 4.0], rel=1e-2)
    assert first_to_last["none", 4.0] > 10 * first_to_last["none", 0.5]


def test_each_image_gets_the_scale_and_bias_of_its_class(rng):
    gan, jn = importlib.import_module("gan"), importlib.import_module("jaxnorm")
    x, labels = rng.normal(size=(6, 3)).astype(np.float32), np.array([0, 1, 2, 0, 1, 2])
    scale, bias = rng.normal(size=(2, 3, 3)).astype(np.float32)
    layer = gan.Layer(*map(jax.numpy.asarray, (np.zeros(0), scale, bias)))
    state = jn.init_batch_norm_state(3)
    y, moved = gan.conditional_norm("batch", x, labels, layer, state, train=True)
    standardized, expected = jn.batch_norm(x, state, momentum=0.99)
    by_hand = np.asarray(standardized) * scale[labels] + bias[labels]
    np.testing.assert_allclose(y, by_hand, rtol=1e-6, atol=1e-6)  # roundings of numbers near one
    np.testing.assert_allclose(moved.var, expected.var, rtol=1e-6)
    assert moved.mean.shape == (3,)


def test_restyled_features_have_the_statistics_of_the_style(rng):
    style, jn = importlib.import_module("style"), importlib.import_module("jaxnorm")
    content, other = rng.gamma(2.0, size=(2, 4, 8, 8, 5)).astype(np.float32)
    wanted = style.statistics(other)
    running = jn.init_batch_norm_state(5)
    for norm, agrees in (("instance", True), ("batch", False), ("none", False)):
        y, _ = style.restyle(norm, content, wanted, running, train=True)
        near = [
            np.allclose(a, b, rtol=1e-4)  # where 1e-6 is added to variances of 2
            for a, b in zip(style.statistics(y), wanted, strict=True)
        ]
        assert near == [agrees, agrees]


def test_an_adaptive_block_is_the_identity_at_first_and_adapts_to_each_image(rng):
    diffusion, nnx = importlib.import_module("diffusion"), importlib.import_module("flax.nnx")
    x = rng.normal(size=(3, diffusion.TOKENS, diffusion.FEATURES)).astype(np.float32)
    condition = rng.normal(size=(3, diffusion.FEATURES)).astype(np.float32)
    apply = jax.jit(lambda block, *arguments: block(*arguments))
    for norm, is_identity in (("adaptive-layer", True), ("layer", False)):
        block = diffusion.Block(norm, nnx.Rngs(0))
        assert np.array_equal(apply(block, x, condition), x) == is_identity
    block = diffusion.Block("adaptive-layer", nnx.Rngs(0))
    for modulation in block.modulations:
        kernel = modulation.linear.kernel
        kernel[...] = 0.1 * rng.normal(size=kernel.shape).astype(np.float32)
    together = np.asarray(apply(block, x, condition))
    alone = [apply(block, x[i : i + 1], condition[i : i + 1])[0] for i in range(3)]
    # Matrix products of a batch and of one image add up in another order.
    np.testing.assert_allclose(together, alone, atol=1e-5 * np.abs(together).max())
    assert not np.allclose(together, apply(block, x, condition[::-1]), atol=0.1)


def test_patches_are_squares():
    diffusion = importlib.import_module("diffusion")
    images = np.arange(128.0).reshape(2, 64)
    patches = diffusion.to_patches(images)
    assert patches.shape == (2, 16, 4)
    np.testing.assert_array_equal(patches[1, 5], 64 + np.array([18, 19, 26, 27]))
    np.testing.assert_array_equal(diffusion.from_patches(patches), images)


def test_sampling_with_the_best_denoiser_has_the_spread_of_the_images():
    """Of images whose pixels are normal, the best guess is linear in the noisy image."""
    diffusion, nnx = importlib.import_module("diffusion"), importlib.import_module("flax.nnx")
    deviation = 0.2

    class Best(nnx.Module):
        def __call__(self, noisy, labels, times):
            signal, spread = diffusion.levels(times[:, None])
            variance = deviation**2
            return signal * variance / (signal**2 * variance + spread**2) * noisy

    graph, state = nnx.split((Best(), None))
    labels, key = np.zeros(50, np.int32), jax.random.key(0)
    images = diffusion.sample(state, labels, key, graph=graph, count=400)
    noise = jax.random.normal(key, images.shape)
    # An image is the noise times a factor; 400 steps approximate it to 0.8 %.
    np.testing.assert_allclose(images, deviation * noise, rtol=0.01, atol=1e-6)


def small_network(seed=0):
    """A batch norm and ten classes, for the functions of fine_tune.py."""
    jn, nnx = importlib.import_module("jaxnorm.nnx"), importlib.import_module("flax.nnx")
    rngs = nnx.Rngs(seed)
    return nnx.Sequential(jn.BatchNorm(4, rngs=rngs), nnx.Linear(4, 10, rngs=rngs))


def test_weights_are_averaged_over_the_last_steps(rng):
    fine_tune, nnx = importlib.import_module("fine_tune"), importlib.import_module("flax.nnx")
    graph, state = fine_tune.start(small_network(), fine_tune.optax.sgd(0.1))
    models, labels = [], np.arange(8, dtype=np.int32)
    for _ in range(5):
        images = rng.normal(size=(8, 4)).astype(np.float32)
        state, _ = fine_tune.train_step(state, images, labels, graph=graph, begin=2)
        models.append(nnx.merge(graph, state)[0])
    average, kernels = nnx.merge(graph, state)[2], [model.layers[1].kernel for model in models]
    # Two roundings in each of three steps, of weights below one.
    np.testing.assert_allclose(average.layers[1].kernel, np.mean(kernels[2:], 0), atol=1e-6)
    np.testing.assert_array_equal(average.layers[0].mean, models[-1].layers[0].mean)
    assert models[-1].layers[0].mean[...].any()


def test_distances_are_those_of_the_running_statistics(rng):
    scores = importlib.import_module("tuning_scores")
    jn = importlib.import_module("jaxnorm.nnx")
    model = small_network()
    images = rng.normal(2.0, 3.0, size=(500, 4)).astype(np.float32)
    mean, deviation = images.mean(0), images.std(0)
    by_hand = np.sqrt(((mean**2 + (deviation - 1) ** 2) / deviation**2).mean())
    # Epsilon, 1e-5, is added to variances of about 9.
    np.testing.assert_allclose(scores.distances(model, images), [by_hand], rtol=1e-5)
    jn.freeze(model)
    np.testing.assert_allclose(scores.distances(model, images), [by_hand], rtol=1e-5)
    jn.unfreeze(model)
    jn.recalibrate(model, [images])
    # The same pass over the same data, perhaps by another program.
    np.testing.assert_allclose(scores.distances(model, images), [0], atol=1e-6)


def test_training_mode_has_the_statistics_of_each_batch(rng):
    scores = importlib.import_module("tuning_scores")
    model = small_network()
    images = rng.normal(2.0, 3.0, size=(6, 4)).astype(np.float32)
    evaluated = scores.logits_of(model, images, 0)
    together = scores.logits_of(model, images, 3)
    assert not model.layers[0].mean[...].any()  # as it was
    model.train()
    alone = np.concatenate([model(images[:3]), model(images[3:])])
    # Matrix products of a batch and of three rows add up in another order.
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert not np.allclose(together, evaluated, atol=0.1)


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_has_a_row_in_the_overview_and_a_page_that_begins_with_its_figure(name):
    folder = Path(common.__file__).parent
    cells = rf"\| \[{name}\.py\]\({name}\.py\) \| [^|]+\? \| [^|]+\. "
    row = cells + r"\| \[[^|]+\]\(([^|)]+)\)<br><img [^|]+> \|\n"
    link = re.search(row, (folder / "README.md").read_text())
    assert link
    page = folder / link[1]
    begin = re.match(r"# .+\?\n\n!\[[^\]]+\]\((.+)\)\n\n", text := page.read_text())
    assert begin
    assert (page.parent / begin[1]).exists()
    assert f"\npython examples/{name}.py\n" in text
