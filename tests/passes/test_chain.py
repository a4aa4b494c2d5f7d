"""The chain: it gives the model's own logits whatever the architecture, and what is none is said in one sentence."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qbench.model.blocks import NotAChainError, block_of, find_blocks
from qbench.passes.chain import Chain
from tests.passes.architectures import CHAINS, RESIDENT, build


def walk(chain, ids, modules=None, **inputs):
    states, calls = chain.begin(ids, **inputs)
    for i in range(len(chain)):
        before = states.clone()
        after = chain.block(i, states, calls, modules[i] if modules else None)
        assert torch.allclose(states, before, rtol=0, atol=0, equal_nan=True)  # variants share what the first is handed
        states = after
    return states


def batches():
    """Two full batches of one shape, and one with padding to the right, to the left, and with positions that count."""
    full, other = torch.randint(256, (2, 3, 24), generator=torch.Generator().manual_seed(3))
    right = torch.ones_like(full)
    right[1, 17:], right[2, 10:] = 0, 0
    left = right.flip(1)
    positions = (left.cumsum(1) - 1).clamp(min=0)
    yield full, {}
    yield other, {}
    yield full, {"attention_mask": right}
    yield full, {"attention_mask": left}
    yield full, {"attention_mask": left, "position_ids": positions}
    yield other[:2, :11], {}


@pytest.mark.parametrize("name", CHAINS)
def test_it_gives_the_models_own_logits(name):
    model = build(name).double()
    chain = Chain.of(model)
    assert chain.shares_calls
    for ids, inputs in batches():
        if "position_ids" in inputs and name in ("Bloom", "Mpt", "Mamba2"):
            continue  # their forward takes none
        with torch.no_grad():
            expected = model(ids, use_cache=False, output_router_logits=False, **inputs).logits
        states = walk(chain, ids, **inputs)
        rows = [chain.finish(states[i : i + 1], ids[i : i + 1], **one_row(inputs, i)) for i in range(len(ids))]
        for logits in (chain.finish(states, ids, **inputs), torch.cat(rows)):
            assert torch.allclose(logits, expected, rtol=1e-9, atol=1e-9, equal_nan=True)


def one_row(inputs, i):
    return {name: value[i : i + 1] for name, value in inputs.items()}


def test_a_variants_block_takes_the_place_of_the_original():
    model = build("Qwen3").double()
    variant = copy.deepcopy(model)
    for parameter in variant.model.layers.parameters():
        parameter.mul_(0.9)
    ids = next(batches())[0]
    chain = Chain.of(model)
    logits = chain.finish(walk(chain, ids, list(variant.model.layers)), ids)
    assert torch.allclose(logits, variant(ids).logits, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(logits, model(ids).logits, atol=1e-3)


@pytest.mark.parametrize("name", CHAINS)
def test_it_is_found_and_begun_without_the_blocks_weights(name):
    model = build(name)
    ids = next(batches())[0]
    expected, wanted = Chain.of(model).begin(ids)
    _, blocks = find_blocks(model)
    for block in blocks:
        block.to("meta")
    chain = Chain.of(model)
    states, calls = chain.begin(ids)
    assert torch.equal(states, expected)
    assert [(len(c.args), list(c.kwargs)) for c in calls] == [(len(c.args), list(c.kwargs)) for c in wanted]
    assert chain.finish(states, ids).shape == (3, 24, 258)


def test_the_weights_outside_of_the_blocks_must_be_there():
    model = build("Llama")
    model.model.norm.to("meta")
    with pytest.raises(ValueError, match=r"model\.norm\.weight is on the meta device"):
        Chain.of(model)
    with pytest.raises(ValueError, match="eval mode"):
        Chain.of(build("Llama").train())


def test_batches_of_one_shape_share_their_calls_unless_they_are_padded():
    chain = Chain.of(build("Llama"))
    (one, _), (other, _), (_, padded), *_ = batches()
    calls = chain.begin(one)[1]
    assert chain.begin(other)[1] is calls
    assert chain.begin(one, **padded)[1] is not calls
    assert chain.begin(one[:2])[1] is not calls
    assert chain.begin(one)[1][0].kwargs["position_embeddings"][0].shape == (1, 24, 16)


def test_the_model_is_left_as_it_was():
    model = build("Llama")
    ids = next(batches())[0]
    expected = model(ids).logits
    chain = Chain.of(model)
    with pytest.raises(IndexError):
        chain.begin(torch.full_like(ids, 999))
    chain.begin(ids)
    assert not any("forward" in block.__dict__ for block in model.model.layers)
    assert torch.equal(model(ids).logits, expected)


def test_what_somebody_else_has_put_in_the_place_of_forward_stays():
    model = build("Llama")
    block = model.model.layers[1]
    block.forward = own = lambda *args, **kwargs: type(block).forward(block, *args, **kwargs)
    Chain.of(model)
    assert block.__dict__["forward"] is own


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("Gemma3nText", r"hands its blocks states \[4, 2, 8, 64\] for ids \[2, 8\]$"),
        ("Gemma4Text", r"hands blocks 0 and 1 the same \w+Dict as shared_kv_states$"),
        ("Zamba2", "shares weights of its block 4 with its block 2$"),
    ],
)
def test_an_architecture_that_is_no_chain_says_so(name, sentence):
    assert name in RESIDENT
    with pytest.raises(NotAChainError, match=sentence):
        Chain.of(build(name))


SHARING = dict(num_kv_shared_layers=1, hidden_size_per_layer_input=8, vocab_size_per_layer_input=258)


@pytest.mark.parametrize(("name", "settings"), [("Gemma4Text", SHARING), ("Zamba2", {}), ("Llama", {})])
def test_a_resident_chain_takes_blocks_that_share_keys_or_weights(name, settings):
    model = build(name, **settings)
    chain = Chain.of(model, resident=True)
    assert chain.shares_calls == (name == "Llama")
    full = [ids[:1] for ids, inputs in batches() if not inputs]
    begun = [chain.begin(ids) for ids in full]
    every = [states for states, _ in begun]
    for i in range(len(chain)):  # as calibration does: every block takes all batches, twice, before the next one
        for j, (_, calls) in enumerate(begun):
            chain.block(i, every[j], calls)
            every[j] = chain.block(i, every[j], calls)
    for states, ids in zip(every, full, strict=True):
        torch.testing.assert_close(chain.finish(states, ids), model(ids, use_cache=False).logits, rtol=1e-5, atol=1e-5)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, hidden_states, extra=None, mask=None):
        return hidden_states + self.linear(hidden_states)


class Model(nn.Module):
    """Four blocks between an embedding and a head, with a flaw."""

    all_tied_weights_keys: dict = {}  # noqa: RUF012
    config = SimpleNamespace(pad_token_id=0)

    def __init__(self, flaw):
        super().__init__()
        self.flaw = flaw
        self.embedding, self.head = nn.Embedding(50, 16), nn.Linear(16, 50)
        self.layers = nn.ModuleList(Block() for _ in range(4))

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, ids, use_cache=None):
        states = embedded = self.embedding(ids)
        shared, outputs = [], []
        for i, layer in enumerate(self.layers):
            match self.flaw:
                case "between":
                    states = layer(states * 1.0)
                case "norm between":
                    states.add_(1) if i else None
                    states = layer(states, extra=states.mean() if i else None)
                case "skip":
                    states = layer(states, extra=outputs[0] if i == 3 else None)
                case "derived":
                    states = layer(states, extra=outputs[0].mean() if i == 3 else None)
                case "container":
                    states = layer(states, extra=(shared,))
                case "twice":
                    states = layer(states, extra=states)
                case "order":
                    states = self.layers[3 - i](states)
                case "left out":
                    states = layer(states) if i < 3 else states
                case "again":
                    states = layer(layer(states))
                case "branch":
                    states = layer(states) if states.sum() > 1e9 else layer(embedded)
                case "fails":
                    states = layer(states).undefined
                case "mask of ids":
                    states = layer(states, mask=ids == 0)
                case _:
                    states = layer(states, extra=embedded)
            outputs.append(states)
        if self.flaw == "last of all":
            states = states + outputs[1]
        return SimpleNamespace(logits=self.head(states))


@pytest.mark.parametrize(
    ("flaw", "sentence"),
    [
        ("between", "it does not hand block 1 what the block before gave out"),
        ("norm between", "it hands block 1 extra, which depends on what an earlier block gave out"),
        ("skip", "it hands block 3 extra, which depends on what an earlier block gave out"),
        ("derived", "it hands block 3 extra, which depends on what an earlier block gave out"),
        ("container", "it hands blocks 0 and 1 the same list as extra"),
        ("twice", "it hands block 1 what the block before gave out 2 times"),
        ("order", "it calls block 3 where block 0 would be next"),
        ("left out", "it calls 3 of its 4 blocks"),
        ("again", "it calls block 0 where block 1 would be next"),
        ("branch", "it does not hand block 1 what the block before gave out"),
        ("fails", r"it does not run with stand-ins for its blocks \('Tensor' object has no attribute 'undefined'\)"),
        ("last of all", "it computes its logits from more than what the last block gives out"),
    ],
)
def test_every_way_of_not_being_a_chain_is_seen(flaw, sentence):
    with pytest.raises(NotAChainError, match=f"^Model is no plain chain of blocks: {sentence}$"):
        Chain.of(Model(flaw).eval())


def test_what_depends_on_the_ids_alone_is_no_flaw():
    model = Model("none").eval()
    chain = Chain.of(model)
    assert not chain.shares_calls  # every block is handed the embeddings
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert torch.allclose(chain.finish(walk(chain, ids), ids), model(ids).logits)
    assert not Chain.of(Model("mask of ids").eval()).shares_calls


def test_blocks_are_found_by_the_weights_they_hold():
    model = build("Llama")
    model.small = nn.ModuleList([nn.Linear(2, 2)])
    assert find_blocks(model)[0] == "model.layers"
    assert [block_of(key, "model.layers") for key in ("model.layers.2.mlp.w", "model.layers_2.1.w", "lm_head.w")] == [
        2,
        None,
        None,
    ]
    model.model.layers[2].mlp = model.model.layers[0].mlp
    with pytest.raises(NotAChainError, match=r"LlamaForCausalLM shares weights of its block 2 with its block 0$"):
        find_blocks(model)
    model = build("Llama")
    model.model.layers[1].norm = model.model.norm
    with pytest.raises(NotAChainError, match=r"shares weights of its block 1 with the rest of the model$"):
        find_blocks(model)
    model = build("Llama")
    model.all_tied_weights_keys = {"model.layers.1.mlp.up_proj.weight": "model.layers.0.mlp.up_proj.weight"}
    with pytest.raises(
        NotAChainError, match=r"ties model.layers.1.mlp.up_proj.weight to .*, a block's weights to others$"
    ):
        find_blocks(model)
    with pytest.raises(NotAChainError, match="Linear keeps no list of blocks"):
        find_blocks(nn.Linear(2, 2))
