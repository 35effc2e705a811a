"""examples/compare_norms.py: training, stopping and resuming, errors."""

import csv
import gzip
import tarfile

import numpy as np
import pytest

for package in ("sklearn", "optax", "orbax.checkpoint", "matplotlib", "tqdm"):
    pytest.importorskip(package, reason=f"the example needs {package}")

import compare_norms  # noqa: E402 (needs what was just asked for)
import image_datasets  # noqa: E402


@pytest.fixture(scope="module")
def datasets():
    """Return the module that reads data sets."""
    return image_datasets


@pytest.fixture(scope="module")
def study():
    """Return the study."""
    return compare_norms


TINY = ["--norms", "none,batch", "--batch-sizes", "4,16", "--seeds", "2", "--steps", "3"]


@pytest.fixture(scope="module")
def finished(study, tmp_path_factory):
    """Return the folder of a tiny study."""
    out = tmp_path_factory.mktemp("finished")
    assert study.main([*TINY, "--out", str(out)]) == 0
    return out


def read_rows(out):
    """Return the rows of runs.csv, but for what differs from time to time."""
    with open(out / "runs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: cell for name, cell in row.items() if name != "ms_per_step"} for row in rows]


def copy_runs(finished, out):
    """Put the results of the tiny study into another folder."""
    (out / "runs.csv").write_bytes((finished / "runs.csv").read_bytes())


def refusal(study, capsys, *argv):
    """Return the one line in which the study refuses its arguments."""
    assert study.main([str(argument) for argument in argv]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    return said.err


def test_study_leaves_every_run_and_a_figure(finished):
    """Two norms, two batch sizes and two seeds are eight runs."""
    rows = read_rows(finished)
    runs = {(row["norm"], row["batch_size"], row["seed"]) for row in rows}
    assert len(runs) == len(rows) == 8
    assert (finished / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in finished.iterdir()) == ["figure.png", "runs.csv"]
    assert {float(row["train_eval_gap"]) for row in rows if row["norm"] == "none"} == {0.0}
    assert {len(row["losses"].split()) for row in rows} == {3}


def test_finished_study_trains_nothing(study, finished, tmp_path, monkeypatch, capsys):
    """The same command again only reports."""
    copy_runs(finished, tmp_path)
    monkeypatch.setattr(study, "train_cell", None)
    assert study.main([*TINY, "--out", str(tmp_path)]) == 0
    assert "Batch norm at batch size 4 to 16" in capsys.readouterr().out


def test_interrupted_study_goes_on(study, finished, tmp_path, monkeypatch, capsys):
    """Interrupted within a cell and resumed, a study gives what it gives in one go."""
    write_runs = study.write_runs

    def write_three_runs(path, runs):
        if len(runs) > 3:
            raise KeyboardInterrupt
        write_runs(path, runs)

    monkeypatch.setattr(study, "write_runs", write_three_runs)
    assert study.main([*TINY, "--out", str(tmp_path)]) == 130
    assert "keeps 3 runs" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.undo()
    assert read_rows(tmp_path) == read_rows(finished)[:3]
    assert study.main([*TINY, "--out", str(tmp_path)]) == 0
    assert read_rows(tmp_path) == read_rows(finished)


def test_other_settings_are_refused(study, finished, tmp_path, capsys):
    """Runs of different settings are not mixed, and none is lost."""
    copy_runs(finished, tmp_path)
    said = refusal(study, capsys, *TINY[:-1], "4", "--out", tmp_path)
    assert "have steps 3 and not 4" in said
    assert "--out" in said
    assert read_rows(tmp_path) == read_rows(finished)


@pytest.mark.parametrize("cut", [0, 40, -1000, -9])
def test_damaged_results_are_refused(study, finished, tmp_path, capsys, cut):
    """A file that is not as it was written is neither used nor overwritten."""
    content = (finished / "runs.csv").read_bytes()[:cut]
    (tmp_path / "runs.csv").write_bytes(content)
    assert "damaged" in refusal(study, capsys, *TINY, "--out", tmp_path)
    assert (tmp_path / "runs.csv").read_bytes() == content


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--norms", "batch,weight"], "'weight'"),
        (["--batch-sizes", "2,x"], "'2,x'"),
        (["--batch-sizes", "0,2"], "--batch-sizes must be 1 or more, but has 0"),
        (["--batch-sizes", "2,1000"], "898 training images"),
        (["--seeds", "0"], "--seeds must be 1 or more"),
        (["--steps", "-1"], "--steps must be 1 or more"),
        (["--dataset", "mnist"], "--data-dir"),
        (["--dataset", "mnist", "--data-dir", "nowhere"], "t10k-labels-idx1-ubyte"),
        (["--dataset", "cifar10", "--data-dir", "nowhere"], "test_batch.bin"),
    ],
)
def test_wrong_arguments_are_refused(study, tmp_path, capsys, argv, said):
    """One line says what must hold."""
    assert said in refusal(study, capsys, *argv, "--out", tmp_path)


def test_out_must_be_a_folder(study, tmp_path, capsys):
    """A file is not taken for a folder."""
    (tmp_path / "file").touch()
    assert "is a file" in refusal(study, capsys, "--out", tmp_path / "file")


def test_network_learns(study):
    """Batch norm at batch size 32 gets most digits right within 300 steps."""
    data = study.load_dataset("digits")
    settings = study.make_settings("digits", 300, 32)
    (run,) = study.train_cell(data, "batch", 32, [0], settings)
    assert run.test_accuracy > 0.9
    assert run.train_accuracy > 0.9
    assert run.curve()[0] > 1 > run.curve()[-1]
    assert abs(run.train_eval_gap) < 0.1


def make_study(study, accuracies):
    """Return a study of made-up runs, from accuracies by norm and batch size."""

    def make_run(norm, size, seed, accuracy):
        settings = study.make_settings("digits", 10, size)
        gap = -0.05 if norm == "batch" else 0.0
        return study.Run(
            norm, size, seed, *settings.values(), accuracy, 1.0, gap, 0.5, 2.0, " ".join("1" * 10)
        )

    cells = {
        (norm, size): [make_run(norm, size, seed, value) for seed, value in enumerate(values)]
        for (norm, size), values in accuracies.items()
    }
    norms = list(dict.fromkeys(norm for norm, _ in cells))
    sizes = sorted({size for _, size in cells})
    return study.Study(norms, sizes, len(next(iter(cells.values()))), cells)


def test_conclusion_follows_the_runs(study):
    """The best, its rivals within the noise and the advice are those of the numbers."""
    runs = make_study(
        study,
        {
            ("none", 2): [0.70, 0.71, 0.69],
            ("batch", 2): [0.80, 0.81, 0.79],
            ("layer", 2): [0.90, 0.91, 0.92],
            ("none", 8): [0.80, 0.81, 0.82],
            ("batch", 8): [0.95, 0.96, 0.97],
            ("layer", 8): [0.96, 0.93, 0.98],
        },
    )
    assert study.conclude(runs) == [
        "Batch size 2, 10 steps: layer norm gives 91.0 ± 1.0 %, the best mean; within the noise "
        "of it: none.",
        "Batch size 8, 10 steps: batch norm gives 96.0 ± 1.0 %, the best mean; within the noise "
        "of it: layer norm.",
        "Batch norm at batch size 2 to 8: 80.0 ± 1.0 to 96.0 ± 1.0 %, with a train/eval gap of "
        "-5.0 to -5.0 points.",
        "Largest train/eval gap of no norm and layer norm: 0.0 points.",
        "No norm at batch size 2 to 8: 21.0 to 15.0 points less than the best norm.",
        "Based on these runs, use layer norm at batch size 2 and 8.",
        "If the images of a batch must not mix, use layer norm at batch size 2 and 8.",
    ]


@pytest.mark.parametrize("norms", [["none"], ["batch"], ["rms"], ["none", "batch"]])
@pytest.mark.parametrize("sizes", [[2], [2, 8]])
@pytest.mark.parametrize("seeds", [1, 2])
def test_conclusion_presumes_nothing(study, tmp_path, norms, sizes, seeds):
    """One norm, one batch size or one seed: there is less to say, and no comparison with itself."""
    runs = make_study(study, {(norm, size): [0.5] * seeds for norm in norms for size in sizes})
    text = " ".join(study.conclude(runs))
    assert "nan" not in text + study.tabulate(runs)
    assert ("best" in text) == (len(norms) > 1)
    assert ("use" in text) == (len(norms) > 1 and seeds > 1)
    assert ("±" in text) == (seeds > 1)
    assert ("With one seed" in text) == (seeds == 1)
    assert (" to " in text.split("Largest")[0]) == ("batch" in norms and len(sizes) > 1)
    study.draw(runs, "digits", tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def write_idx(path, magic, array):
    """Write an IDX file, gzipped if its name says so."""
    dimensions = b"".join(n.to_bytes(4, "big") for n in array.shape)
    content = magic.to_bytes(4, "big") + dimensions + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture(params=["", ".gz"])
def idx_folder(request, tmp_path):
    """Write a tiny MNIST."""
    for part, count in (("train", 5), ("t10k", 3)):
        images = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8)
        write_idx(tmp_path / f"{part}-images-idx3-ubyte{request.param}", 2051, images)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte{request.param}", 2049, labels)
    return tmp_path


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_idx_is_read(datasets, idx_folder, name):
    """Gzipped or not: images between 0 and 1 with one channel, and labels."""
    train, test = datasets.load_dataset(name, idx_folder)
    expected = np.random.default_rng(5).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    np.testing.assert_allclose(train.images[..., 0] * 255, expected, rtol=1e-6)
    assert train.images.dtype == np.float32
    assert test.images.shape == (3, 28, 28, 1)
    np.testing.assert_array_equal(test.labels, np.arange(3, dtype=np.int32), strict=True)


@pytest.mark.parametrize("length", [0, 3, 10, 100, -1])
def test_truncated_idx_is_refused(datasets, idx_folder, length):
    """A file cut anywhere is named."""
    (path,) = idx_folder.glob("t10k-images*")
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(datasets.UserError, match=path.name):
        datasets.load_dataset("mnist", idx_folder)


def test_wrong_idx_is_refused(datasets, idx_folder):
    """Labels in place of images, too few labels, unknown labels and a missing file."""
    load = datasets.load_dataset
    (images,) = idx_folder.glob("train-images*")
    (labels,) = idx_folder.glob("train-labels*")
    content = labels.read_bytes()
    write_idx(labels, 2049, np.arange(4, dtype=np.uint8))
    with pytest.raises(datasets.UserError, match="5 images and 4 labels"):
        load("mnist", idx_folder)
    write_idx(labels, 2049, np.arange(10, 15, dtype=np.uint8))
    with pytest.raises(datasets.UserError, match="0 to 9"):
        load("mnist", idx_folder)
    images.write_bytes(content)
    with pytest.raises(datasets.UserError, match="2051 of IDX images, but begins with 2049"):
        load("mnist", idx_folder)
    images.unlink()
    with pytest.raises(datasets.UserError, match=r"train-images-idx3-ubyte is not there"):
        load("mnist", idx_folder)


@pytest.fixture
def cifar_folder(datasets, tmp_path, monkeypatch, rng):
    """Write a tiny CIFAR-10: four records a file, where the published files have 10,000."""
    monkeypatch.setattr(datasets, "CIFAR_RECORDS", 4)
    for name in (*datasets.CIFAR_TRAIN, *datasets.CIFAR_TEST):
        records = rng.integers(0, 256, (4, 3073), dtype=np.uint8)
        records[:, 0] = np.arange(4)
        (tmp_path / name).write_bytes(records.tobytes())
    return tmp_path


def test_cifar_is_read(datasets, cifar_folder, tmp_path):
    """From the folder, the folder in it or the tarball in it: the planes become channels."""
    train, test = datasets.load_dataset("cifar10", cifar_folder)
    assert train.images.shape == (20, 32, 32, 3)
    np.testing.assert_array_equal(train.labels, np.tile(np.arange(4, dtype=np.int32), 5))
    record = np.frombuffer((cifar_folder / "test_batch.bin").read_bytes(), np.uint8)[:3073]
    green = record[1 + 1024 : 1 + 2048].reshape(32, 32)
    np.testing.assert_allclose(test.images[0, ..., 1] * 255, green, rtol=1e-6)

    parent, packed = tmp_path / "parent", tmp_path / "packed"
    parent.mkdir()
    packed.mkdir()
    inner = parent / datasets.CIFAR_FOLDER
    inner.mkdir()
    for path in cifar_folder.glob("*.bin"):
        path.rename(inner / path.name)
    with tarfile.open(packed / datasets.CIFAR_TARBALL, "w:gz") as tarball:
        tarball.add(inner, datasets.CIFAR_FOLDER)
    for folder in (parent, packed):
        again, _ = datasets.load_dataset("cifar10", folder)
        np.testing.assert_array_equal(again.images, train.images)

    tarball = packed / datasets.CIFAR_TARBALL
    tarball.write_bytes(tarball.read_bytes()[:1000])
    with pytest.raises(datasets.UserError, match="cannot be read"):
        datasets.load_dataset("cifar10", packed)


def test_wrong_cifar_is_refused(datasets, cifar_folder):
    """A truncated file, a wrong label, a missing file."""
    path = cifar_folder / "data_batch_3.bin"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(datasets.UserError, match=r"data_batch_3.bin.*12292 in all.* holds 12291"):
        datasets.load_dataset("cifar10", cifar_folder)
    path.write_bytes(b"\x0a" + content[1:])
    with pytest.raises(datasets.UserError, match="0 to 9"):
        datasets.load_dataset("cifar10", cifar_folder)
    path.unlink()
    with pytest.raises(datasets.UserError, match=r"data_batch_3.bin is not there"):
        datasets.load_dataset("cifar10", cifar_folder)


def test_digits_are_split_evenly(datasets):
    """Half and half, and of each class the same."""
    train, test = datasets.load_dataset("digits")
    assert (len(train.labels), len(test.labels)) == (898, 899)
    assert abs(np.bincount(train.labels) - np.bincount(test.labels)).max() <= 1
    assert train.images.shape[1:] == (8, 8, 1)
    assert train.images.max() == 1
