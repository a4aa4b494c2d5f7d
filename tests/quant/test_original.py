"""quantizer=none where a method is expected: it has no settings, no size but 16 bit, and nothing to export."""

from collections import Counter

import pytest

from qbench.checkpoint.export import check_target, make_exporter
from qbench.errors import RequestError
from qbench.quant.original import Original
from qbench.registry import make_quantizer, quantizer_names
from qbench.request.estimate import model_bytes
from tests.conftest import refused


def test_it_has_no_settings():
    assert make_quantizer({"name": "none"}) == Original()
    assert "none" in quantizer_names()
    with pytest.raises(RequestError) as refusal:
        make_quantizer({"name": "none", "nbits": 3})
    refused(refusal.value, key="quantizer.nbits", names=["quantizer=none"])
    with pytest.raises(RequestError) as refusal:
        make_quantizer({"name": "nothing"})
    refused(refusal.value, key="quantizer", names=["none", "rtn"])


@pytest.mark.parametrize("format", ["packed", "autogptq"])
def test_there_is_nothing_to_export(tmp_path, format):
    exporter, folder = make_exporter({"dir": str(tmp_path / "out"), "format": format})
    with pytest.raises(RequestError, match="quantizer=none changes no weight"):
        check_target(exporter, folder, "run", Original(), format)


def test_a_plan_knows_its_size():
    assert model_bytes(Original(), 1000, Counter({(8, 16): 2})) == (16, 2000)
