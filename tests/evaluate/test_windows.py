"""Cutting windows: each protocol as its paper's script does it, and names that say what was done."""

import gzip
import json
import random

import numpy as np
import pytest
from tokenizers import processors

from qbench.config import RuntimeConfig
from qbench.errors import RequestError
from qbench.evaluate.text import Pages, Text
from qbench.registry import PROTOCOL, make
from qbench.sources.tiny import byte_tokenizer
from tests.conftest import refused

TEXT = Text("Seven grey geese crossed the river in a long, uneven line. " * 20, "test")


def task(**changes):
    return make(PROTOCOL, {"name": "t", "protocol": "windows", "window": 100} | changes)


def named(protocol):
    return protocol.protocol_name(protocol.name)


def pages(count=40):
    draw = random.Random(5)
    return Pages(["".join(draw.choices("abcdefgh .", k=draw.randint(20, 300))) for _ in range(count)], "pages")


def test_windows_are_cut_once_and_the_tail_is_dropped(tiny):
    windows = task().cut(TEXT, tiny[1])
    ids = tiny[1](TEXT.content)["input_ids"]
    assert windows.total_tokens == len(ids) == 1180
    assert windows.ids.tolist() == [ids[i : i + 100] for i in range(0, 1100, 100)]
    assert windows.dropped_tokens == 80
    assert windows.scored_tokens == 11 * 99
    assert windows.leading_special_tokens == 0
    assert task(max_windows=3).cut(TEXT, tiny[1]).ids.tolist() == windows.ids[:3].tolist()


def test_the_protocol_is_in_the_name(tiny):
    assert named(task(name="wikitext2", window=2048)) == "wikitext2:gptq-w2048"
    assert named(task(name="wikitext2", window=1024, max_windows=4)) == "wikitext2:gptq-w1024-first4"
    crops = task(name="c4_gptq", protocol="crops", window=2048, max_windows=256)
    assert named(crops) == "c4_gptq:crops256-w2048"
    joined = task(name="c4_new", protocol="pages", window=2048, max_windows=256, pages=1100)
    assert named(joined) == "c4_new:pages1100-w2048-first256"
    one, other = (task(name="text").cut(Text(c * 200, "f"), tiny[1]).protocol for c in "ab")
    assert one.startswith("text-")
    assert one.endswith(":gptq-w100")
    assert one != other


def test_crops_are_the_ones_that_gptqs_script_draws(tiny):
    """Its loop, with the global generator, page by page."""
    content, tokenizer = pages().content, tiny[1]
    random.seed(0)
    expected = []
    for _ in range(25):
        while True:
            page = tokenizer(content[random.randint(0, len(content) - 1)])["input_ids"]
            if len(page) > 100:
                break
        start = random.randint(0, len(page) - 100 - 1)
        expected.append(page[start : start + 100])
    windows = task(protocol="crops", max_windows=25).cut(pages(), tokenizer)
    assert windows.ids.tolist() == expected
    assert windows.total_tokens == 2500
    assert windows.dropped_tokens == 0


def test_pages_are_joined_by_a_space(tiny):
    windows = task(protocol="pages", pages=10, max_windows=5).cut(pages(), tiny[1])
    ids = tiny[1](" ".join(pages().content[:10]))["input_ids"]
    assert windows.ids.tolist() == [ids[i : i + 100] for i in range(0, 500, 100)]


def test_pages_of_a_packed_file(tmp_path):
    path = tmp_path / "c4.json.gz"
    path.write_bytes(gzip.compress("".join(json.dumps({"text": t, "url": "u"}) + "\n" for t in "ab").encode()))
    found = task(protocol="crops", path=str(path)).read()
    assert found.content == ["a", "b"]
    assert found.source == "c4.json.gz"
    with pytest.raises(RequestError, match=r"line 1 has no text under 'body'; set task\.column=NAME"):
        task(protocol="crops", path=str(path), column="body").read()
    path.write_bytes(path.read_bytes()[:30])
    with pytest.raises(RequestError, match=r"cannot read task\.path="):
        task(protocol="crops", path=str(path)).read()
    plain = tmp_path / "c4.json"
    plain.write_text('{"text": "a"}\nnot json\n')
    with pytest.raises(RequestError, match="line 2 is not a JSON object"):
        task(protocol="pages", path=str(plain)).read()


def with_bos(tokenizer):
    """The byte tokenizer, made to put its BOS before every text by itself."""
    alone = byte_tokenizer()
    alone.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return alone


@pytest.mark.parametrize("adds_one_by_itself", [False, True])
def test_a_bos_at_the_start_of_every_window(tiny, adds_one_by_itself):
    """Window - 1 tokens of text follow it, and all of them are scored; there is never a second one."""
    tokenizer, bare = (with_bos(tiny[1]) if adds_one_by_itself else tiny[1]), tiny[1](TEXT.content)["input_ids"]
    windows = task(add_bos_token=True).cut(TEXT, tokenizer)
    assert windows.ids.tolist() == [[256, *bare[i : i + 99]] for i in range(0, 1089, 99)]
    assert windows.protocol == "t:gptq-w100-bos"
    assert (windows.total_tokens, windows.scored_tokens, windows.dropped_tokens) == (1180, 11 * 99, 1180 - 11 * 99)
    assert (windows.bos_policy, windows.leading_special_tokens) == ("BOS at the start of every window", 1)
    none = task(add_bos_token=False).cut(TEXT, tokenizer)
    assert none.ids.tolist() == [bare[i : i + 100] for i in range(0, 1100, 100)]
    assert (none.protocol, none.bos_policy, none.leading_special_tokens) == ("t:gptq-w100-nobos", "none", 0)
    by_itself = task().cut(TEXT, tokenizer)
    assert by_itself.ids[0].tolist() == ([256, *bare[:99]] if adds_one_by_itself else bare[:100])
    assert by_itself.leading_special_tokens == adds_one_by_itself
    assert (
        len({w.token_ids_sha256 for w in (windows, none, by_itself)}) == 2 + adds_one_by_itself
    )  # null is false, or not


def test_crops_and_pages_with_a_bos(tiny):
    crops = task(protocol="crops", max_windows=9, add_bos_token=True).cut(pages(), tiny[1])
    shorter = task(protocol="crops", max_windows=9, window=99).cut(pages(), tiny[1])
    assert (crops.ids[:, 0] == 256).all()
    assert crops.ids[:, 1:].tolist() == shorter.ids.tolist()
    assert crops.dropped_tokens == 0
    assert crops.protocol == "t:crops9-w100-bos"
    joined = task(protocol="pages", pages=10, max_windows=5, add_bos_token=True).cut(pages(), tiny[1])
    assert joined.ids[:, 0].tolist() == [256] * 5
    assert joined.protocol == "t:pages10-w100-first5-bos"


def test_a_bos_that_the_tokenizer_has_not_is_refused(tiny):
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = None
    for data, changes in ((TEXT, {}), (pages(), {"protocol": "crops", "max_windows": 2})):
        with pytest.raises(
            RequestError, match=r"task\.add_bos_token=true, but this model's tokenizer has no BOS token"
        ):
            task(add_bos_token=True, **changes).cut(data, tokenizer)


def test_refusals(tiny):
    tokenizer = tiny[1]
    with pytest.raises(RequestError, match=r"1180 tokens, less than one window of 2048"):
        task(window=2048).cut(TEXT, tokenizer)
    with pytest.raises(RequestError, match=r"has 11 windows of 100 tokens, task.max_windows asks for 12"):
        task(max_windows=12).cut(TEXT, tokenizer)
    with pytest.raises(RequestError, match="no page of pages is longer than one window of 400 tokens, the longest has"):
        task(protocol="crops", window=400, max_windows=2).cut(pages(), tokenizer)
    with pytest.raises(RequestError, match=r"holds 40 pages, the protocol joins the first 1100.*task\.pages=40"):
        task(protocol="pages", pages=1100).cut(pages(), tokenizer)


def test_what_no_tokenizer_could_cut_is_refused_without_one():
    task(window=1180).check_length(TEXT)
    task(max_windows=11).check_length(TEXT)
    with pytest.raises(RequestError, match=r"has at most 1188 tokens, less than one window of 2048"):
        task(window=2048).check_length(TEXT)
    with pytest.raises(RequestError, match=r"has at most 11 windows of 100 tokens, .* asks for 12; .*max_windows=null"):
        task(max_windows=12).check_length(TEXT)
    longest = max(len(page) for page in pages().content)
    task(protocol="crops", window=longest - 1, max_windows=2).check_length(pages())
    with pytest.raises(RequestError, match=rf"no page of pages is longer .*, the longest has at most {longest + 8}"):
        task(protocol="crops", window=2 * longest, max_windows=2).check_length(pages())
    with pytest.raises(RequestError, match=r"holds 40 pages, the protocol joins the first 1100.*task\.pages=40"):
        task(protocol="pages", pages=1100).check_length(pages())
    with pytest.raises(RequestError, match=r"has at most \d+ tokens, less than one window of 99999"):
        task(protocol="pages", pages=40, window=99999).check_length(pages())


@pytest.mark.parametrize(
    ("changes", "key", "names"),
    [
        ({"window": 1}, "task.window", ["2"]),
        ({"max_windows": 0}, "task.max_windows", ["1"]),
        ({"protocol": "magic"}, "task.protocol", ["crops", "lmeval", "pages", "windows"]),
        ({"protocol": "crops"}, "task.max_windows", ["crops"]),
        ({"protocol": "pages"}, "task.pages", ["1"]),
        ({"limit": 4}, "task.limit", ["task.max_windows", "task.window"]),
    ],
)
def test_wrong_settings(changes, key, names):
    with pytest.raises(RequestError) as error:
        task(**changes).check(RuntimeConfig())
    refused(error.value, key, names)


@pytest.mark.slow
def test_crops_of_the_c4_sample(data, smollm2_folder):
    """Real pages, real tokenizer: the draws are the same on every machine."""
    from transformers import AutoTokenizer

    crops = task(protocol="crops", path=str(data / "c4-sample-1000.json.gz"), window=2048, max_windows=8)
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    windows = crops.cut(crops.read(), tokenizer)
    assert windows.ids.shape == (8, 2048)
    assert len(np.unique(windows.ids[:, :50], axis=0)) > 4
