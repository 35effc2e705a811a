"""The advice of "Which norm?" and the errors of "When something fails" are true."""

import itertools
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import jaxnorm
import jaxnorm.linen
import jaxnorm.nnx

DOCS = Path(__file__).parent.parent / "docs"
ADVICE = json.loads((DOCS / "which_norm.json").read_text())


def test_every_choice_has_an_answer_and_every_answer_a_script():
    options = [question["options"] for question in ADVICE["questions"].values()]
    for chosen in itertools.product(*options):
        pairs = list(zip(ADVICE["questions"], chosen, strict=True))
        fits = lambda row, pairs=pairs: all(value in row.get(name, value) for name, value in pairs)
        assert any(map(fits, ADVICE["answers"]))
    for row in ADVICE["answers"]:
        scripts = re.findall(r"examples/\w+\.py", row["run"])
        assert scripts
        assert all((DOCS.parent / script).exists() for script in scripts)


@pytest.mark.parametrize("code", sorted({row["code"] for row in ADVICE["answers"]}))
def test_the_code_of_an_answer_runs(code):
    x, label = jax.numpy.ones((2, 3, 3, 8)), np.array([0, 1])
    scale, bias = jax.numpy.ones((2, 1, 1, 8)), jax.numpy.zeros((2, 1, 1, 8))
    if "[label]" in code:  # one for each class
        scale, bias = scale[:, 0, 0], bias[:, 0, 0]
    names = {"jaxnorm": jaxnorm, "rngs": nnx.Rngs(0), "features": 8, "x": x, "label": label}
    names |= {"scale": scale, "bias": bias, "params": jaxnorm.init_params(8)}
    names["state"] = jaxnorm.init_batch_norm_state(8)
    exec(code, names)
    if "y" in names:
        assert names["y"].shape == x.shape


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
