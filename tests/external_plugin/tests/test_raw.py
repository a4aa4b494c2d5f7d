"""A folder of raw weights is a model; what is none is refused in one sentence."""

import pytest
import torch
from qbench_example.raw import FILE, Raw, make

from qbench.errors import RequestError


def test_it_loads_what_was_written(tmp_path):
    source = Raw(path=str(make(tmp_path / "mine", seed=3)))
    loaded = source.load(torch.float32, torch.device("cpu"), tmp_path)
    assert source.named({"path"}).name == "mine"
    assert loaded.fingerprint == source.fingerprint() != Raw(path=str(make(tmp_path / "other"))).fingerprint()
    assert {p.shape for p in loaded.model.parameters()} == {p.shape for p in source.skeleton().parameters()}


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(RequestError) as none:
        Raw().fingerprint()
    assert none.value.key == "model.path"
    (tmp_path / FILE).write_bytes(b"nothing")
    with pytest.raises(RequestError) as broken:
        Raw(path=str(tmp_path)).load(torch.float32, torch.device("cpu"), tmp_path)
    assert "\n" not in str(broken.value)
