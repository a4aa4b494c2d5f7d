"""Blocks brought ahead: one on its way, none left behind, and on a GPU every event in its order."""

import os
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from qbench.errors import PointError
from qbench.sources.ahead import ahead
from qbench.sources.folder import Folder
from tests.conftest import ROOT
from tests.sources.cases import CPU, gpu, needs_cuda, save, tensors


def blocks_of(count):
    made = []

    def block(i):
        made.append(i)
        return torch.nn.Linear(4, 4).requires_grad_(False).apply(lambda m: m.weight.fill_(i))

    return block, range(count), made


def test_the_next_block_is_on_its_way_and_the_last_one_is_gone():
    block, numbers, made = blocks_of(5)
    before = None
    for i, module in ahead(block, numbers, CPU):
        assert module.weight.unique().tolist() == [i]
        assert before is None or before.weight.is_meta
        deadline = threading.Event()
        while len(made) < min(i + 2, 5):
            deadline.wait(0.001)
        assert made == list(range(min(i + 2, 5)))  # one ahead, and no more
        before = module
    assert list(ahead(block, [], CPU)) == []


def test_a_block_that_cannot_be_read_is_said_at_its_turn_and_the_thread_ends():
    def block(i):
        if i == 2:
            raise PointError("the disk is gone")
        return torch.nn.Linear(2, 2)

    blocks = ahead(block, range(4), CPU)
    assert [next(blocks)[0], next(blocks)[0]] == [0, 1]
    with pytest.raises(PointError, match="the disk is gone"):
        next(blocks)
    with closing(ahead(block, range(4), CPU)) as blocks:
        next(blocks)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("qbench-ahead")]


SPIN_CYCLES = 2_000_000_000  # a second and more


@gpu
@needs_cuda
@pytest.mark.parametrize("name", ["Qwen3", "Qwen3Moe", "DeepseekV2"])
def test_blocks_on_a_gpu_have_the_same_bits_and_are_never_overwritten_while_they_are_read(name, tmp_path):
    """Kernels that use even blocks are late, and so are the copies of odd ones: only events keep them in order."""
    settings = dict(num_hidden_layers=12, hidden_size=512, intermediate_size=4096, moe_intermediate_size=1024)
    folder = save(name, tmp_path, **settings)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).requires_grad_(False).cuda()
    source = Folder(folder, torch.bfloat16, torch.device("cuda"))
    wanted = [tensors(expected.get_submodule(f"{source.prefix}.{i}")) for i in range(len(source))]

    def late(i):
        torch.cuda._sleep(i % 2 * SPIN_CYCLES // 100)
        return source.block(i)

    checks = []  # looked at last: whatever waits for the GPU would put the kernels in order
    with closing(ahead(late, [*range(len(source))] * 2, torch.device("cuda"))) as blocks:
        for i, block in blocks:
            torch.cuda._sleep((i + 1) % 2 * SPIN_CYCLES // 20)
            found = tensors(block)
            assert found.keys() == wanted[i].keys()
            checks += [(tensor == wanted[i][key]).all() for key, tensor in found.items()]
    assert all(check.item() for check in checks)
    assert torch.equal(source.rest().lm_head.weight, expected.lm_head.weight)


@gpu
@needs_cuda
def test_kernels_wait_for_a_block_that_is_still_on_its_way():
    def late(i):
        module = torch.nn.Linear(256, 256, device="cuda").requires_grad_(False)
        module.weight.fill_(-1)
        torch.cuda._sleep(SPIN_CYCLES // 20)
        module.weight.fill_(i)
        return module

    checks = [(module.weight == i).all() for i, module in ahead(late, range(4), torch.device("cuda"))]
    assert all(check.item() for check in checks)


@gpu
@needs_cuda
def test_a_block_arrives_while_kernels_run(tmp_path):
    source = Folder(save("Qwen3Moe", tmp_path), torch.bfloat16, torch.device("cuda"))
    with closing(ahead(source.block, range(3), torch.device("cuda"))) as blocks:
        next(blocks)
        torch.cuda._sleep(SPIN_CYCLES)
        computed = torch.cuda.current_stream().record_event()
        loaded = source.shards.bytes_read
        deadline = threading.Event()
        while source.shards.bytes_read < loaded + source.bytes_of_block(1) and not computed.query():
            deadline.wait(0.001)
        assert not computed.query()


STREAMS = """
import re, sys, torch
from contextlib import closing
from pathlib import Path
from qbench.passes.chain import Chain
from qbench.sources.ahead import ahead
from qbench.sources.folder import Folder

def memory(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

torch.set_num_threads(1)
source = Folder(sys.argv[1], torch.bfloat16, torch.device("cpu"))
chain = Chain.of(source.rest())
ids = torch.arange(32)[None]
start, calls = chain.begin(ids)
chain.block(0, start, calls, source.block(0))  # what kernels allocate once
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
for count in (2, len(source)):
    states = start
    with closing(ahead(source.block, range(count), torch.device("cpu"))) as blocks:
        for i, block in blocks:
            states = chain.block(i, states, calls, block)
    print(memory("VmHWM") - before, source.bytes_of_block(0))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are measured on Linux")
def test_streaming_takes_two_blocks_of_memory_whatever_their_number(tmp_path):
    from transformers import Qwen3Config

    config = Qwen3Config(
        vocab_size=258,
        hidden_size=512,
        intermediate_size=2560,
        num_hidden_layers=40,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=64,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path, max_shard_size="90MB")
    assert sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) > 390e6
    path = os.pathsep.join([str(ROOT), *(p for p in sys.path if Path(p).is_dir())])
    command = [sys.executable, "-c", STREAMS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, check=True)
    (two, block), (forty, _) = (map(int, line.split()) for line in done.stdout.splitlines())
    assert block / 2 < two < 3 * block
    assert forty < 3 * block
