"""Cutting windows: each protocol as its paper's script does it, and names that say what was done."""

import gzip
import json
import random

import numpy as np
import pytest

from qbench.config import RuntimeConfig, TaskConfig
from qbench.errors import RequestError
from qbench.evaluate.text import Pages, Text
from qbench.evaluate.windows import check, check_length, cut, cut_windows, protocol_name, read

TEXT = Text("Seven grey geese crossed the river in a long, uneven line. " * 20, "test")


def task(**changes):
    return TaskConfig(**{"name": "t", "protocol": "windows", "window": 100} | changes)


def pages(count=40):
    draw = random.Random(5)
    return Pages(["".join(draw.choices("abcdefgh .", k=draw.randint(20, 300))) for _ in range(count)], "pages")


def test_windows_are_cut_once_and_the_tail_is_dropped(tiny):
    windows = cut_windows(TEXT, tiny[1], task())
    ids = tiny[1](TEXT.content)["input_ids"]
    assert windows.total_tokens == len(ids) == 1180
    assert windows.ids.tolist() == [ids[i : i + 100] for i in range(0, 1100, 100)]
    assert windows.dropped_tokens == 80
    assert windows.scored_tokens == 11 * 99
    assert windows.leading_special_tokens == 0
    assert cut_windows(TEXT, tiny[1], task(max_windows=3)).ids.tolist() == windows.ids[:3].tolist()


def test_the_protocol_is_in_the_name(tiny):
    assert protocol_name(task(name="wikitext2", window=2048)) == "wikitext2:gptq-w2048"
    assert protocol_name(task(name="wikitext2", window=1024, max_windows=4)) == "wikitext2:gptq-w1024-first4"
    crops = task(name="c4_gptq", protocol="crops", window=2048, max_windows=256)
    assert protocol_name(crops) == "c4_gptq:crops256-w2048"
    joined = task(name="c4_new", protocol="pages", window=2048, max_windows=256, pages=1100)
    assert protocol_name(joined) == "c4_new:pages1100-w2048-first256"
    one, other = (cut_windows(Text(c * 200, "f"), tiny[1], task(name="text")).protocol for c in "ab")
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
    windows = cut(pages(), tokenizer, task(protocol="crops", max_windows=25))
    assert windows.ids.tolist() == expected
    assert windows.total_tokens == 2500
    assert windows.dropped_tokens == 0


def test_pages_are_joined_by_a_space(tiny):
    windows = cut(pages(), tiny[1], task(protocol="pages", pages=10, max_windows=5))
    ids = tiny[1](" ".join(pages().content[:10]))["input_ids"]
    assert windows.ids.tolist() == [ids[i : i + 100] for i in range(0, 500, 100)]


def test_pages_of_a_packed_file(tmp_path):
    path = tmp_path / "c4.json.gz"
    path.write_bytes(gzip.compress("".join(json.dumps({"text": t, "url": "u"}) + "\n" for t in "ab").encode()))
    found = read(task(protocol="crops", path=str(path)))
    assert found.content == ["a", "b"]
    assert found.source == "c4.json.gz"
    with pytest.raises(RequestError, match=r"line 1 has no text under 'body'; set task\.column=NAME"):
        read(task(protocol="crops", path=str(path), column="body"))
    path.write_bytes(path.read_bytes()[:30])
    with pytest.raises(RequestError, match=r"cannot read task\.path="):
        read(task(protocol="crops", path=str(path)))
    plain = tmp_path / "c4.json"
    plain.write_text('{"text": "a"}\nnot json\n')
    with pytest.raises(RequestError, match="line 2 is not a JSON object"):
        read(task(protocol="pages", path=str(plain)))


def test_refusals(tiny):
    tokenizer = tiny[1]
    with pytest.raises(RequestError, match=r"1180 tokens, less than one window of 2048"):
        cut_windows(TEXT, tokenizer, task(window=2048))
    with pytest.raises(RequestError, match=r"has 11 windows of 100 tokens, task.max_windows asks for 12"):
        cut_windows(TEXT, tokenizer, task(max_windows=12))
    with pytest.raises(RequestError, match="no page of pages is longer than one window of 400 tokens, the longest has"):
        cut(pages(), tokenizer, task(protocol="crops", window=400, max_windows=2))
    with pytest.raises(RequestError, match=r"holds 40 pages, the protocol joins the first 1100.*task\.pages=40"):
        cut(pages(), tokenizer, task(protocol="pages", pages=1100))


def test_what_no_tokenizer_could_cut_is_refused_without_one():
    check_length(TEXT, task(window=1180))
    check_length(TEXT, task(max_windows=11))
    with pytest.raises(RequestError, match=r"has at most 1188 tokens, less than one window of 2048"):
        check_length(TEXT, task(window=2048))
    with pytest.raises(RequestError, match=r"has at most 11 windows of 100 tokens, .* asks for 12; .*max_windows=null"):
        check_length(TEXT, task(max_windows=12))
    longest = max(len(page) for page in pages().content)
    check_length(pages(), task(protocol="crops", window=longest - 1, max_windows=2))
    with pytest.raises(RequestError, match=rf"no page of pages is longer .*, the longest has at most {longest + 8}"):
        check_length(pages(), task(protocol="crops", window=2 * longest, max_windows=2))
    with pytest.raises(RequestError, match=r"holds 40 pages, the protocol joins the first 1100.*task\.pages=40"):
        check_length(pages(), task(protocol="pages", pages=1100))
    with pytest.raises(RequestError, match=r"has at most \d+ tokens, less than one window of 99999"):
        check_length(pages(), task(protocol="pages", pages=40, window=99999))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"window": 1}, r"task\.window must be at least 2"),
        ({"max_windows": 0}, r"task\.max_windows"),
        ({"protocol": "magic"}, r"unknown task\.protocol 'magic'; choose from: crops, lmeval, pages, windows"),
        ({"protocol": "crops"}, "number of crops to draw"),
        ({"protocol": "pages"}, r"task\.pages must be at least 1"),
        ({"limit": 4}, r"are for task=lmeval; use task\.max_windows"),
        ({"divergence_topk": 0}, r"task\.divergence=false turns it off"),
    ],
)
def test_wrong_settings(changes, sentence):
    with pytest.raises(RequestError, match=sentence):
        check(task(**changes), RuntimeConfig())


@pytest.mark.slow
def test_crops_of_the_c4_sample(data, smollm2_folder):
    """Real pages, real tokenizer: the draws are the same on every machine."""
    from transformers import AutoTokenizer

    crops = task(protocol="crops", path=str(data / "c4-sample-1000.json.gz"), window=2048, max_windows=8)
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    windows = cut(read(crops), tokenizer, crops)
    assert windows.ids.shape == (8, 2048)
    assert len(np.unique(windows.ids[:, :50], axis=0)) > 4
