"""A folder of raw weights is a model that keeps qbench's contracts; what is none is refused by the setting's name."""

import pytest
from qbench_example.raw import FILE, Raw, make

from qbench.errors import RequestError
from qbench.testing import SourceConformance


class TestRaw(SourceConformance):
    def make(self, place):
        return Raw(path=str(make(place)))

    def other(self, place):
        return Raw(path=str(make(place, seed=1)))

    def broken(self, place):
        place.mkdir(parents=True, exist_ok=True)
        (place / FILE).write_bytes(b"nothing")
        return [Raw(), Raw(path=str(place / "missing")), Raw(path=str(place))]


def test_a_refusal_names_the_setting():
    with pytest.raises(RequestError) as refusal:
        Raw().fingerprint()
    assert refusal.value.key == "model.path"
