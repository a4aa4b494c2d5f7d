"""A folder, a block at a time: every tensor has from_pretrained's bits, and what is wrong is known before reading."""

import json
import os
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qbench.errors import PointError, RequestError
from qbench.models.blocks import NotAChainError
from qbench.passes.chain import Chain
from qbench.sources.ahead import ahead
from qbench.sources.folder import Folder
from tests.conftest import ROOT
from tests.passes.architectures import CHAINS, build

CPU = torch.device("cpu")


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CHAINS)
def test_every_tensor_has_the_bits_of_from_pretrained(name, dtype, tmp_path):
    folder = save(name, tmp_path)
    assert len(list(folder.glob("*.safetensors"))) > 3
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    source = Folder(folder, dtype, CPU)
    assert source.shards.bytes_read == 0
    model = source.rest()
    assert source.shards.bytes_read == source.bytes_of_block(None)
    rest = {n: t for n, t in tensors(model).items() if not n.startswith(source.prefix)}
    assert_same(rest, {n: t for n, t in tensors(expected).items() if not n.startswith(source.prefix)})
    for i in (*range(len(source)), 0):  # the first one again
        before = source.shards.bytes_read
        block = source.block(i)
        assert source.shards.bytes_read - before == source.bytes_of_block(i)
        assert_same(tensors(block), tensors(expected.get_submodule(f"{source.prefix}.{i}")))
        assert not block.training
        assert all(t.is_meta for t in tensors(model.get_submodule(f"{source.prefix}.{i}")).values())
    ids = torch.arange(40).view(2, 20)
    chain = Chain.of(model)
    states, calls = chain.begin(ids)
    with closing(ahead(source.block, range(len(source)), CPU)) as blocks:
        for i, block in blocks:
            states = chain.block(i, states, calls, block)
    assert torch.equal(chain.finish(states, ids), expected(ids, use_cache=False).logits)


def test_the_whole_model_is_what_from_pretrained_gives(tmp_path):
    folder = save("Qwen3Moe", tmp_path, tie_word_embeddings=True)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = Folder(folder, torch.float32, CPU).whole()
    assert_same(tensors(model), tensors(expected))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.set_attn_implementation("eager")  # reaches the blocks, which share the configuration
    assert {layer.self_attn.config._attn_implementation for layer in model.model.layers} == {"eager"}


@pytest.mark.parametrize("equal", [True, False])
def test_a_head_that_is_stored_beside_the_embedding_is_tied_if_it_is_the_same(equal, tmp_path):
    folder = save("Llama", tmp_path, tie_word_embeddings=True)
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + (0 if equal else 1)}))
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = Folder(folder, torch.float32, CPU).rest()
    assert torch.equal(model.lm_head.weight, expected.lm_head.weight)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == equal


def rewrite(folder, change):
    """Stores the folder's tensors in one file after `change` of the dictionary that holds them."""
    held = {}
    for file in sorted(folder.glob("*.safetensors")):
        held |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    change(held)
    save_file({name: tensor.clone() for name, tensor in held.items()}, folder / "model.safetensors")


def drop(*names):
    return lambda held: [held.pop(name) for name in names]


def put(name, *shape):
    return lambda held: held.update({name: torch.zeros(shape)})


EXPERT = "model.layers.1.mlp.experts.2"


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("Llama", drop("model.layers.1.mlp.up_proj.weight"), "lacks model.layers.1.mlp.up_proj.weight, which the conf"),
        ("Llama", drop("model.norm.weight", "lm_head.weight"), "lacks lm_head.weight and 1 more, which the conf"),
        (
            "Llama",
            put("model.layers.2.mlp.extra", 3),
            "has model.layers.2.mlp.extra, which the configured model has not",
        ),
        ("Llama", put("model.layers.3.mlp.up_proj.weight", 3), "has model.layers.3.mlp.up_proj.weight, which the conf"),
        ("Llama", put("model.norm.weight", 3), r"model.norm.weight is \[3\] there and \[64\] in the configured model"),
        (
            "Llama",
            put("model.layers.0.mlp.up_proj.weight", 4, 4),
            r"mlp.up_proj.weight is \[4, 4\] there and \[128, ",
        ),
        (
            "Qwen3Moe",
            drop(f"{EXPERT}.down_proj.weight"),
            r"1.mlp.experts.down_proj is \[3, 64, 32\] there and \[4, ",
        ),
        ("Qwen3Moe", drop(f"{EXPERT}.up_proj.weight"), "1.mlp.experts.gate_up_proj cannot be made of the tensors stor"),
        ("Mixtral", put("model.layers.1.block_sparse_moe.experts.2.w2.weight", 4, 4), "1.mlp.experts.down_proj cannot"),
    ],
)
def test_what_does_not_fit_the_configuration_is_named_before_anything_is_read(name, change, sentence, tmp_path):
    folder = save(name, tmp_path)
    rewrite(folder, change)
    with pytest.raises(RequestError, match=sentence) as caught:
        Folder(folder, torch.float32, CPU)
    assert "\n" not in str(caught.value)


def test_what_the_model_ignores_is_ignored(tmp_path):
    folder = save("GPT2", tmp_path)
    rewrite(folder, put("transformer.h.1.attn.bias", 1, 1, 8, 8))
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert_same(tensors(Folder(folder, torch.float32, CPU).whole()), tensors(expected.requires_grad_(False)))


def shorten(folder):
    file = sorted(folder.glob("*.safetensors"))[2]
    os.truncate(file, file.stat().st_size - 10)


def hide(folder):
    sorted(folder.glob("*.safetensors"))[2].unlink()


def double(folder):
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    second.write_bytes(first.read_bytes())


def configure(**settings):
    def change(folder):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))

    return change


def overwrite(pattern, content):
    return lambda folder: sorted(folder.glob(pattern))[0].write_bytes(content)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (shorten, r"model-00003-of-\d+.safetensors is truncated: its header tells of \d+ bytes, and it has \d+$"),
        (hide, r"lacks the shard model-00003-of-\d+.safetensors, which model.safetensors.index.json lists$"),
        (double, r"\w+.weight is both in model-00001-of-\d+.safetensors and in model-00002-of-\d+.safetensors$"),
        (overwrite("*.safetensors", b"a page of HTML, which is no model"), "is truncated or no safetensors file"),
        (overwrite("*.safetensors", b"\3" + b"\0" * 7 + b"[1]"), "has no readable safetensors header"),
        (overwrite("*.safetensors", b""), "is truncated or no safetensors file: no header fits into its 0 bytes"),
        (overwrite("*.index.json", b"{}"), "is not an index of safetensors shards: it needs a weight_map"),
        (lambda folder: (folder / "model.safetensors.index.json").unlink(), "has neither model.safetensors nor model"),
        (overwrite("config.json", b"{}"), "cannot make a causal language model of"),
        (configure(quantization_config={"quant_method": "fp8"}), "is quantized already, with fp8"),
    ],
)
def test_a_folder_that_is_no_complete_model_is_refused_in_one_sentence(change, sentence, tmp_path):
    folder = save("Llama", tmp_path)
    change(folder)
    with pytest.raises(RequestError, match=sentence) as caught:
        Folder(folder, torch.float32, CPU)
    assert "\n" not in str(caught.value)


def test_blocks_that_share_weights_are_refused(tmp_path):
    build("Zamba2").save_pretrained(tmp_path)
    with pytest.raises(NotAChainError, match="Zamba2ForCausalLM"):
        Folder(tmp_path, torch.float32, CPU)


def test_a_shard_that_shrinks_while_it_is_read_is_said_and_the_source_stays_usable(tmp_path):
    folder = save("Llama", tmp_path)
    source = Folder(folder, torch.float32, CPU)
    [file] = {source.shards.tensors[f"model.layers.1.{n}.weight"].file for n in ["mlp.up_proj"]}
    content = file.read_bytes()
    os.truncate(file, 200)
    with pytest.raises(PointError, match="has become shorter since it was opened"):
        source.block(1)
    file.write_bytes(content)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert_same(tensors(source.block(1)), tensors(expected.model.layers[1].requires_grad_(False)))


def test_a_device_that_is_full_is_said(tmp_path, monkeypatch):
    source = Folder(save("Llama", tmp_path), torch.float32, CPU)

    def full(*_):
        raise torch.OutOfMemoryError("out of memory\nand more")

    monkeypatch.setattr("qbench.sources.shards._empty", full)
    with pytest.raises(PointError, match=r"^model\.layers\.\d\.\S+, \d\.\d MB, has no room on cpu: out of memory$"):
        source.block(0)


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


gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
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
