"""The advice of "Which norm?" and the errors of "When something fails" match the code."""

import itertools
import re
from pathlib import Path

import jax
import pytest
from flax import nnx

import jaxnorm
import jaxnorm.linen
import jaxnorm.nnx

DOCS = Path(__file__).parent.parent / "docs"


def test_every_choice_has_an_answer_and_every_answer_a_run():
    page = (DOCS / "which_norm.md").read_text()
    _, _, *rows = re.findall(r"^\|(.*)\|$", page, re.MULTILINE)
    cells = [[cell.strip() for cell in row.split("|")] for row in rows]
    *chosen, norms, reasons = zip(*cells, strict=True)
    answers = [[cell.split(", ") for cell in row[:3]] for row in cells]
    questions = [set(", ".join(column).split(", ")) for column in chosen]
    assert [len(options - {"any"}) for options in questions] == [8, 3, 2]
    for wanted in itertools.product(*(options - {"any"} for options in questions)):
        fits = lambda row, wanted=wanted: all(
            "any" in cell or option in cell for cell, option in zip(row, wanted, strict=True)
        )
        assert any(map(fits, answers)), wanted
    assert all(norms)
    assert all(re.search(r"\[\w+\.py\]\((examples/\w+\.md|#the-study)\)", cell) for cell in reasons)


def error_of(call, *args, **keywords):
    with pytest.raises(Exception) as caught:  # noqa: PT011
        call(*args, **keywords)
    return str(caught.value).partition(" (https://")[0]


def test_the_page_of_errors_has_the_texts():
    functions, linen, modules = jaxnorm, jaxnorm.linen, jaxnorm.nnx
    rngs, x, images = nnx.Rngs(0), jax.numpy.ones((8, 3)), jax.numpy.ones((8, 3, 16, 16))
    state, key = functions.init_batch_norm_state(3), jax.random.key(0)
    training = linen.BatchNorm(use_running_average=False)
    variables, norm = training.init(key, x), modules.BatchNorm(3, rngs=rngs)
    batch_norm, layer_norm = functions.batch_norm, functions.layer_norm
    texts = [
        error_of(batch_norm, images, state),
        error_of(norm, images),
        error_of(layer_norm, images, functions.init_params(3)),
        error_of(linen.LayerNorm().apply, linen.LayerNorm().init(key, x), images),
        error_of(modules.GroupNorm(3, 3, rngs=rngs), images),
        error_of(functions.group_norm, images, num_groups=3),
        error_of(layer_norm, x, eps=1e-5),
        error_of(linen.LayerNorm, eps=1e-5),
        error_of(training.apply, variables, x),
        error_of(jax.jit(lambda x: norm(x)), x),
        error_of(batch_norm, x, state, "data"),
        error_of(jax.lax.pmean, x, "data"),
        error_of(getattr, jaxnorm, "BatchNorm"),
        error_of(jax.jit(lambda train: batch_norm(x, state, train=train)), True),
        error_of(batch_norm, x, state, renorm=functions.Renorm(3, 5), implementation="kernel"),
        error_of(jax.jit(lambda flag: norm(x, use_running_average=flag)), True),
        error_of(functions.instance_norm, x),
        error_of(linen.InstanceNorm().init, key, x),  # a warning is an error here
        error_of(layer_norm, x.astype("float8_e4m3fn")),
        error_of(norm, x.astype("float8_e4m3fn")),
    ]
    page = (DOCS / "errors.md").read_text()
    assert [text for text in texts if text not in page] == []
