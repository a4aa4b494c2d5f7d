"""Streams: what is only to be had whole says so, what is refused is refused unread, and a model in memory is one."""

import json

import pytest
import torch
from transformers import FalconH1Config, FalconH1ForCausalLM

from qbench.errors import RequestError
from qbench.model.blocks import NotAChainError
from qbench.passes.chain import Chain
from qbench.sources import pretrained
from qbench.sources.folder import Folder
from qbench.sources.local import Local
from qbench.sources.stream import Whole, assembled
from qbench.sources.tiny import Tiny, byte_tokenizer
from tests.passes.architectures import build
from tests.sources.cases import CPU, assert_same, save, tensors


def opened(folder, **settings):
    return Local(path=str(folder), **settings).stream(torch.float32, CPU, folder / "cache")


def test_a_model_in_memory_is_a_stream_of_its_own_blocks(tmp_path):
    model = Tiny(architecture="moe").load(torch.float32, CPU, tmp_path).model
    stream = Whole(model, "a note")
    assert (stream.rest(), stream.prefix, len(stream), stream.note) == (model, "model.layers", 2, "a note")
    taken = [stream.bytes_of_block(i) for i in (None, 0, 1)]
    assert sum(taken) == sum(parameter.nbytes for parameter in model.parameters())
    assert taken[0] == 4 * (258 * 64 + 64)
    ids = torch.arange(40)[None]
    chain = Chain.of(model)
    states, calls = chain.begin(ids)
    for i in range(2):
        assert stream.block(i) is model.model.layers[i]
        states = chain.block(i, states, calls, stream.block(i))
    with torch.no_grad():
        assert torch.equal(chain.finish(states, ids), model(ids).logits)
    assert stream.resident


def test_blocks_in_memory_may_share_weights():
    model = build("Zamba2").eval()
    with pytest.raises(NotAChainError):
        Chain.of(model)
    stream = Whole(model)
    blocks = [stream.bytes_of_block(i) for i in (None, *range(len(stream)))]
    assert sum(blocks) == sum(parameter.nbytes for parameter in model.parameters())
    with pytest.raises(NotAChainError, match="keeps no list of blocks"):
        Whole(torch.nn.Linear(2, 2))


def test_what_is_only_to_be_had_whole(tmp_path, monkeypatch, caplog):
    folder = save("Llama", tmp_path / "llama")
    assert isinstance(opened(folder), Folder)
    assert opened(folder, trust_remote_code=True) is None  # its code may read the weights in a way of its own
    assert opened(save("Zamba2", tmp_path / "shared")) is None
    monkeypatch.setattr("qbench.sources.folder.find_blocks", lambda model: {}["no such architecture"])
    assert opened(folder) is None
    assert "is read whole and not block by block: KeyError: 'no such architecture'" in caplog.text


def test_a_model_whose_blocks_hold_what_only_the_whole_model_makes(tmp_path):
    """Falcon-H1's multipliers are in no file, and no block's own initialization writes them."""
    shape = dict(vocab_size=258, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    mamba = dict(
        mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, ssm_multipliers=[2.0, 3.0, 4.0, 5.0, 6.0]
    )
    config = FalconH1Config(**shape, **mamba, num_key_value_heads=2)
    model = FalconH1ForCausalLM(config).eval().requires_grad_(False)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(NotAChainError, match=r"makes model\.layers\.0\.mamba\.mup_vector with the whole model"):
        Folder(tmp_path, torch.float32, CPU)
    assert opened(tmp_path) is None
    loaded = Local(path=str(tmp_path)).load(torch.float32, CPU, tmp_path).model
    assert_same(tensors(loaded), tensors(model))


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"is quantized already \(gptq 4 bit\)"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "modeling_x.X"}}, "model.trust_remote_code=true"),
        ({"model_type": "nonsense"}, "cannot read a model from .* model type `nonsense`"),
        ({"num_attention_heads": "many"}, "cannot read a model from "),
    ],
)
def test_what_loading_refuses_by_its_config_a_stream_refuses_as_well(config, sentence, tmp_path):
    folder = save("Llama", tmp_path)
    byte_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | config))
    with pytest.raises(RequestError, match=sentence) as caught:
        opened(folder)
    with pytest.raises(RequestError) as of_loading:
        Local(path=str(folder)).load(torch.float32, CPU, tmp_path)
    assert str(caught.value) == str(of_loading.value)


def test_errors_call_a_folder_by_its_models_name(tmp_path):
    folder = save("Llama", tmp_path)
    (folder / "config.json").write_text(
        (folder / "config.json").read_text().replace('"hidden_size": 64', '"hidden_size": 32')
    )
    with pytest.raises(RequestError, match=r"the weights of ORG/NAME are not those of its config\.json") as caught:
        pretrained.read_stream(folder, "ORG/NAME", torch.float32, CPU)
    assert str(folder) not in str(caught.value)


def test_a_model_is_assembled_block_by_block(tmp_path):
    stream = Folder(save("Qwen3Moe", tmp_path), torch.float32, CPU)
    assert_same(tensors(assembled(stream, offload=True)), tensors(assembled(stream)))


def test_the_rest_generates_as_the_loaded_model_does(tmp_path):
    """Also with its blocks in their places: what evaluation and exports rely on comes with the rest."""
    folder = save("Llama", tmp_path)
    byte_tokenizer().save_pretrained(folder)
    said = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(said | {"max_new_tokens": 3, "repetition_penalty": 2.0}))
    loaded = Local(path=str(folder)).load(torch.float32, CPU, tmp_path).model
    model = opened(folder).rest()
    assert model.generation_config.to_dict() == loaded.generation_config.to_dict()
    assert model.generation_config.repetition_penalty == 2.0
    assert (model.name_or_path, model.device, model.dtype) == (loaded.name_or_path, loaded.device, loaded.dtype)
    for i in range(3):
        model.model.layers[i] = opened(folder).block(i)
    ids = torch.arange(20)[None]
    assert torch.equal(model.generate(ids, do_sample=False), loaded.generate(ids, do_sample=False))
