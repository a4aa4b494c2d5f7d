"""Folders of small random models in several shards, and the comparison of modules tensor by tensor."""

import pytest
import torch

from tests.passes.architectures import build

CPU = torch.device("cpu")
gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def save(name, folder, **settings):
    build(name, **settings).save_pretrained(folder, max_shard_size="60KB")
    return folder


def tensors(module):
    named = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].device) == (tensor.dtype, tensor.device), name
        assert torch.equal(found[name], tensor), name
