"""What an error carries beside its sentence: the setting that it is about, and what that could be."""

import pytest

from qbench.errors import PlanError, PointError, RequestError, first_setting, inside, none_of, unknown
from qbench.registry import QUANTIZER, TRACKER, make
from qbench.values import typed

SENTENCES = {
    "task.window must be at least 2 tokens, got 1": "task.window",
    "runtime.device=tpu, but torch sees no CUDA device here; use runtime.device=cpu": "runtime.device",
    "cannot get it from the Hub; give a local copy with task.path=FILE": "task.path",
    "quantizer=none changes no weight; leave out export.dir": "quantizer",
    "cannot write to outputs=a/b: in the way": "outputs",
    "hydra/launcher=slurm: there is no sbatch here": "hydra/launcher",
    "hydra.launcher.num_gpus must be positive": "hydra.launcher.num_gpus",
    "lower task.window.": "task.window",
    "m/model.safetensors is truncated": None,
    "model.safetensors is truncated": None,
    "layer model.layers.1.mlp.up_proj: 1 of 12288 weights are NaN or Inf": None,
    "a/task.path=b is a folder's name": None,
    "the text has 3 tokens": None,
}


@pytest.mark.parametrize("sentence", SENTENCES)
def test_the_key_is_the_first_setting_that_a_sentence_names(sentence):
    assert first_setting(sentence) == RequestError(sentence).key == PointError(sentence).key == SENTENCES[sentence]


def test_who_knows_better_says_it():
    error = unknown("model.source", "hubb", ["hub", "local"])
    assert (error.key, error.choices) == ("model.source", ("hub", "local"))
    within = inside("my.yaml", error)
    assert (str(within), within.key, within.choices) == (f"my.yaml: {error}", error.key, error.choices)
    assert unknown("key for quantizer=rtn:", "quantizer.nbit", ["quantizer.nbits"]).key == "quantizer.nbit"


@pytest.mark.parametrize(
    ("kind", "settings", "key", "choices"),
    [
        (QUANTIZER, {"name": "rtn", "nbits": 5}, "quantizer.nbits", ("2", "3", "4", "8")),
        (QUANTIZER, {"name": "rtn", "aux_dtype": "fp8"}, "quantizer.aux_dtype", ("fp16", "int8")),
        (QUANTIZER, {"name": "sinq", "inner": "gptq"}, "quantizer.inner", ("rtn", "hqq")),
        (QUANTIZER, {"name": "sinq", "step_min": 3.0}, "quantizer.step_min", ()),
        (QUANTIZER, {"name": "rtn", "symmetric": "maybe"}, "quantizer.symmetric", ("true", "false")),
        (QUANTIZER, {"name": "rtn", "bits": 4}, "quantizer.bits", None),
        (QUANTIZER, {"name": "none", "nbits": 4}, "quantizer.nbits", ()),
        (TRACKER, {"name": "wandb", "mode": "often"}, "tracker.mode", ("auto", "online", "offline", "disabled")),
    ],
)
def test_a_members_refusal_names_the_members_setting(kind, settings, key, choices):
    with pytest.raises(RequestError) as caught:
        make(kind, settings)
    assert caught.value.key == key
    assert choices is None or set(caught.value.choices) == set(choices)


def test_a_plan_has_the_key_that_all_its_points_share():
    errors = [RequestError("task.window must be 2"), RequestError("task.window must be 3")]
    assert PlanError("two points", errors).key == "task.window"
    assert PlanError("task.path and others", [*errors, RequestError("task.path=x is a folder")]).key is None


def test_a_literal_lists_its_values():
    from typing import Literal

    with pytest.raises(RequestError) as caught:
        typed("task.way", "up", Literal["left", "right"])
    assert (caught.value.key, caught.value.choices) == ("task.way", ("left", "right"))
    assert str(none_of("inner", "x", ["a", 1])) == "inner must be one of a, 1, got 'x'"
