"""Blocks brought ahead: one on its way, none left behind, and on a GPU every event in its order."""

import json
import os
import subprocess
import sys
import threading
import weakref
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from qbench.errors import PointError
from qbench.sources import skeleton
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


def test_no_third_block_is_alive_and_a_loop_that_is_left_leaves_none(tmp_path):
    """Counted in bytes of tensors that exist, at the moment when the next block has arrived."""
    source = Folder(save("Llama", tmp_path), torch.float32, CPU)
    numbers, made, alive = [*range(3)] * 4, [], []

    def block(i):
        module = source.block(i)
        alive.extend(weakref.ref(parameter) for parameter in module.parameters())
        made.append(i)
        return module

    def bytes_alive():
        return sum(parameter.nbytes for ref in alive if (parameter := ref()) is not None and not parameter.is_meta)

    def peak():
        found, deadline = 0, threading.Event()
        with closing(ahead(block, numbers, CPU)) as blocks:
            for turn, _ in enumerate(blocks):
                while len(made) < min(turn + 2, len(numbers)):
                    deadline.wait(0.001)
                found = max(found, bytes_alive())
        return found

    assert peak() == 2 * source.bytes_of_block(0)
    assert bytes_alive() == 0
    with closing(ahead(block, numbers, CPU)) as blocks:
        next(blocks)
    assert bytes_alive() == 0


def test_a_shard_that_is_cut_off_meanwhile_is_named_at_its_blocks_turn(tmp_path):
    source = Folder(save("Llama", tmp_path), torch.float32, CPU)
    file = source.shards.tensors["model.layers.2.mlp.up_proj.weight"].file
    os.truncate(file, 300)
    blocks = ahead(source.block, range(3), CPU)
    assert [next(blocks)[0], next(blocks)[0]] == [0, 1]
    with pytest.raises(PointError, match=rf"^{file} has become shorter since it was opened$"):
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
    (two, block), (forty, _) = run(STREAMS, tmp_path)
    assert block / 2 < two < 3 * block
    assert forty < 3 * block


THROUGH = """
import re, sys, torch
from contextlib import closing
from pathlib import Path
from qbench.passes.chain import Chain
from qbench.sources.ahead import ahead
from qbench.sources.local import Local

torch.set_num_threads(1)
device = torch.device("cpu")
stream = Local(path=sys.argv[1]).stream(torch.bfloat16, device, Path("unused"))
chain = Chain.of(stream.rest())
states, calls = chain.begin(torch.arange(32)[None])
with closing(ahead(stream.block, range(len(stream)), device)) as blocks:
    for i, block in blocks:
        states = chain.block(i, states, calls, block)
assert states.isfinite().all()
peak = 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
print(peak, sum(map(stream.bytes_of_block, range(len(stream)))))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are measured on Linux")
def test_two_gigabytes_stream_in_the_memory_of_a_model_of_two_blocks(tmp_path):
    """The system's own account of the whole process, pages of files that are mapped included."""
    peaks = {}
    for count in (2, 40):
        folder = shards_of(count, tmp_path / str(count))
        [[peaks[count], size]] = run(THROUGH, folder)
        assert size > 50e6 * count
    assert peaks[40] - peaks[2] < 0.1e9  # two of its blocks; 0.5 GB is what is promised
    assert peaks[2] < 1.5e9  # so the model of 40 is larger than all that its process ever held


def shards_of(count, folder):
    """A Qwen3 of `count` blocks of 52 MB in bf16, a shard each, random; no more than one block of it is in memory."""
    from transformers import Qwen3Config

    shape = dict(vocab_size=258, hidden_size=1024, intermediate_size=7168, num_attention_heads=16, head_dim=64)
    config = Qwen3Config(**shape, num_hidden_layers=count, num_key_value_heads=16, architectures=["Qwen3ForCausalLM"])
    model, draw, index = skeleton.make(config, torch.bfloat16), torch.Generator().manual_seed(0), {}
    config.save_pretrained(folder)
    places = [f"layers.{i}." for i in range(count)]
    for place in ["", *places]:
        file = f"part-{place}safetensors"
        names = [n for n in model.state_dict() if (place in n if place else not any(p in n for p in places))]
        shapes = {name: model.state_dict()[name].shape for name in names}
        drawn = {n: torch.randn(s, dtype=torch.bfloat16, generator=draw) / 50 for n, s in shapes.items()}
        save_file(drawn, folder / file)
        index |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def run(script, *arguments):
    """The numbers in the lines that a script prints, in a process of its own."""
    path = os.pathsep.join([str(ROOT), *(p for p in sys.path if Path(p).is_dir())])
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, check=True)
    return [[*map(int, line.split())] for line in done.stdout.splitlines()]
