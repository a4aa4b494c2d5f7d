"""A file of rows keeps qbench's contracts: each weight is what its codes and scales stand for, and damage is said."""

from qbench_example.rows import SUFFIX, Rows
from safetensors.torch import save_file

from qbench.model.linears import find_linears
from qbench.testing import ReaderConformance


class TestRows(ReaderConformance):
    def make(self):
        return Rows()

    def write(self, model, folder):
        tensors, decoded = {n: p.detach() for n, p in model.named_parameters()}, {}
        for name, layer in find_linears(model).layers.items():
            weight = layer.weight.detach()
            scale = (weight.abs().amax(1, keepdim=True) / 127).half()
            codes = (weight / scale.float()).round().clamp(-128, 127)
            tensors |= {f"{name}.weight": codes.char(), f"{name}.scale": scale}
            decoded[f"{name}.weight"] = codes * scale.float()
        path = folder / f"model{SUFFIX}"
        save_file(tensors, path)
        return path, decoded
