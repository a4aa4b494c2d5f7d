import hashlib
import re

import numpy as np
import pytest
from tokenizers import normalizers, pre_tokenizers, processors

from qbench.errors import RequestError
from qbench.evaluate.protocols.windows import TextWindows
from qbench.evaluate.text import join_rows, most_tokens, wikitext_pages
from qbench.sources.tiny import byte_tokenizer

# of WikiText-2 raw test with its rows joined, and of its ids for the reference model's tokenizer
WIKITEXT = "696cca6b65a171b0a358a4be6732cdfdf2dd6164a32e20fd70e3c13fc4dfae83"
WIKITEXT_IDS = "d58f0371d9335644a25374dc20e797b22e07c27c4399b136b3132b89f4b48f1d"


def embedded(name):
    return TextWindows(name=name).read().content


def test_embedded_texts_are_large_plain_and_disjoint():
    mini, calibration = embedded("mini"), embedded("mini-calibration")
    assert len(mini.encode()) >= 48_000
    assert len(calibration.encode()) >= 40_000
    assert mini.isascii()
    assert calibration.isascii()
    titles = [set(re.findall(r"^ = (.+) = $", text, re.M)) for text in (mini, calibration)]
    assert len(titles[0]) >= 40
    assert not titles[0] & titles[1]

    def word_runs(text, length=8):
        words = text.lower().split()
        return {tuple(words[i : i + length]) for i in range(len(words) - length)}

    assert not word_runs(mini) & word_runs(calibration)


def test_rows_of_a_raw_file(tmp_path):
    path = tmp_path / "wiki.raw"
    path.write_text(" \n = A = \n \n Text . \n")
    task = TextWindows(name="wikitext2", path=str(path), separator="\n\n")
    assert task.read().content == "\n\n = A = \n\n\n\n\n Text . \n"
    assert TextWindows(name="text", path=str(path)).read().content == path.read_text()
    assert join_rows(["a\n", "", " \n", "b"], "|") == "a\n|||b"


def test_unreadable_files(tmp_path):
    with pytest.raises(RequestError, match=r"cannot read task\.path=.*No such file"):
        TextWindows(name="x", path=str(tmp_path / "none")).read()
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(RequestError, match="not UTF-8"):
        TextWindows(name="x", path=str(tmp_path / "latin")).read()
    with pytest.raises(RequestError, match=r"set task\.path"):
        TextWindows(name="nothing").read()


def test_unreachable_hub_names_the_ways_out():
    task = TextWindows(name="wikitext2", dataset="Salesforce/wikitext", subset="x", split="test")
    with pytest.raises(RequestError, match=r"task\.path=FILE.*task=mini"):
        task.read()


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
def test_no_text_has_more_tokens_than_its_bytes_allow(form):
    """Byte by byte, behind a normalizer that lengthens the text, with a space in front, and BOS and EOS around it."""
    rust = byte_tokenizer().backend_tokenizer
    rust.normalizer = getattr(normalizers, form)()
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    rust.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 256), ("</s>", 257)]
    )
    for text in (
        "",
        "abc",
        "caf\u00e9",
        "\ufdfa" * 9,
        "\u0958\ufb2c" * 5,
        "\U0001d160" * 4,
        "\u0390" * 7,
        "\U0001f600\n",
    ):
        tokens = len(rust.encode(text).ids)
        assert len(text.encode()) <= tokens <= most_tokens(text)


@pytest.mark.slow
def test_wikitext_file_becomes_the_protocols_tokens(data, smollm2_folder):
    from transformers import AutoTokenizer

    task = TextWindows(name="w", path=str(data / "wiki.test.raw"), separator="\n\n")
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder)
    content = task.read().content
    assert hashlib.sha256(content.encode()).hexdigest() == WIKITEXT
    ids = tokenizer(content, verbose=False)["input_ids"]
    assert len(ids) == 304_986
    assert hashlib.sha256(np.asarray(ids, "<i8").tobytes()).hexdigest() == WIKITEXT_IDS


def test_articles_start_at_headings_of_the_first_level():
    raw = " \n = One = \n \n Text = with = signs . \n = = Part = = \n = = = Deep = = = \n = Two = \n More . \n"
    assert wikitext_pages(raw) == [
        " = One = \n \n Text = with = signs . \n = = Part = = \n = = = Deep = = = ",
        " = Two = \n More . \n",
    ]


def test_wikitext_file_becomes_the_62_articles_of_lm_eval(data):
    pages = wikitext_pages((data / "wiki.test.raw").read_text(encoding="utf-8"))
    assert len(pages) == 62
    assert pages[0].startswith(" = Robert Boulter = \n")
    assert len(re.split(r"\s+", " ".join(pages))) > 240_000
