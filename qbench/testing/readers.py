"""The conformance suite that any reader of files, ours or a third party's, must pass.

    from qbench.testing import ReaderConformance

    class TestMine(ReaderConformance):             # pytest finds it by its name
        def make(self):
            return Mine()

        def write(self, model, folder):            # a file of this kind that holds the model
            ...
            return path, decoded                   # what the format's own decoder gives, by the model's names

Every method tests one contract of qbench.readers.reader.Reader and says in its failure which one is broken. The model
is a random one of two layers. Damaged copies are made from what `write` wrote; none may end in anything but a sentence
or an honest read.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from qbench.format.format import Format
from qbench.model.linears import find_linears
from qbench.passes.walk import without_storage
from qbench.readers.file import File, reader_of, shapes
from qbench.readers.reader import Reader, ReadError
from qbench.sources.tiny import build


class ReaderConformance:
    """Subclass it under a name that starts with `Test` and define `make` and `write`."""

    kind: ClassVar[str] = "dense"  # of the tiny model; moe for one with fused experts
    damaged: ClassVar[int] = 40  # copies

    def make(self) -> Reader:
        raise NotImplementedError

    def write(self, model: Any, folder: Path) -> tuple[Path, Mapping[str, Tensor]]:
        """Writes a file or folder below `folder`; gives its place and what each weight decodes to, as a tensor."""
        raise NotImplementedError

    @pytest.fixture(scope="class")
    def model(self) -> Any:
        return build(self.kind, 0)[0]

    @pytest.fixture(scope="class")
    def skeleton(self, model: Any) -> Any:
        return without_storage(model)

    @pytest.fixture(scope="class")
    def written(self, model: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Mapping[str, Tensor]]:
        return self.write(model, tmp_path_factory.mktemp("written"))

    def test_recognizes_its_own_and_nothing_else(self, written: tuple, tmp_path: Path) -> None:
        reader, (path, _) = self.make(), written
        assert reader.recognizes(path), "recognizes must tell a file of its kind"
        _, first = reader_of(path)
        assert type(first) is type(reader), f"{type(first).__name__} recognizes it as well, and is asked first"
        (tmp_path / "empty").mkdir()
        (tmp_path / "text.txt").write_text("no weights")
        (tmp_path / "bytes.bin").write_bytes(bytes(range(256)) * 8)
        for name in ("empty", "text.txt", "bytes.bin", "absent"):
            assert not reader.recognizes(tmp_path / name), f"recognizes must be False for {name}"

    def test_has_every_linear_in_its_shape(self, written: tuple, skeleton: Any) -> None:
        held = self.make().open(written[0], skeleton)
        for name, shape in shapes(find_linears(skeleton)).items():
            assert f"{name}.weight" in held.entries, f"there must be an entry {name}.weight"
            assert tuple(held.entries[f"{name}.weight"].shape) == shape, f"{name}: the shape must be the model's"
        assert any(entry.quantized for entry in held.entries.values()), "no entry says that it is quantized"
        assert held.made_by, "made_by must say how it was made"
        assert held.file_bytes > 0, "file_bytes must be the size of what holds the weights"

    def test_decodes_to_the_bit(self, written: tuple, skeleton: Any) -> None:
        held, decoded = self.make().open(written[0], skeleton), written[1]
        assert decoded, "write must say what the weights decode to"
        for name, expected in decoded.items():
            found, entry = held.read(name), held.entries[name]
            assert isinstance(found, Format) == entry.quantized, f"{name}: a Format if its entry says quantized"
            assert tuple(found.shape) == tuple(entry.shape), f"{name}: the shape must be the entry's"
            dense = found.dequantize(expected.dtype) if isinstance(found, Format) else found.to(expected.dtype)
            different = int((dense != expected).sum())
            assert not different, f"{name}: {different} of {dense.numel()} numbers are not the reference decoder's"

    def test_can_be_read_twice(self, written: tuple, skeleton: Any) -> None:
        held = self.make().open(written[0], skeleton)
        name = next(name for name, entry in held.entries.items() if entry.quantized)
        one, other = (held.read(name).dequantize() for _ in range(2))  # type: ignore[union-attr]
        assert torch.equal(one, other), "read must give the same numbers again"

    def test_stands_in_a_pass(self, written: tuple, model: Any, skeleton: Any) -> None:
        bound = File(path=str(written[0])).pinned().for_model(skeleton)
        layers = find_linears(model).layers
        [quantized] = bound.quantize_layers([name := next(iter(layers))], [layers[name].weight], None)
        assert isinstance(quantized, Format)
        assert quantized.nbytes > 0

    def test_another_model_is_refused(self, written: tuple) -> None:
        other = build("moe" if self.kind == "dense" else "dense", 0)[0]
        with pytest.raises(ReadError):
            File(path=str(written[0])).for_model(without_storage(other))

    @pytest.mark.parametrize("seed", range(4))
    def test_damage_is_a_sentence_or_an_honest_read(
        self, written: tuple, skeleton: Any, tmp_path: Path, seed: int
    ) -> None:
        rng = random.Random(seed)
        for _ in range(self.damaged // 4):
            copy = tmp_path / "copy" / written[0].name
            shutil.rmtree(copy.parent, ignore_errors=True)
            copy.parent.mkdir()
            (shutil.copytree if written[0].is_dir() else shutil.copy)(written[0], copy)
            files = [copy] if copy.is_file() else sorted(p for p in copy.rglob("*") if p.is_file())
            said = _damage(rng.choice(files), rng)
            try:
                if not self.make().recognizes(copy):
                    continue
                held = self.make().open(copy, skeleton)
                for name in held.entries:
                    held.read(name)
            except ReadError as error:
                sentence = str(error)
            except Exception as error:
                raise AssertionError(f"{said}: {type(error).__name__} in place of a ReadError: {error}") from error
            else:
                sentence = ""
            assert "\n" not in sentence, f"{said}: a ReadError is one sentence"


def _damage(file: Path, rng: random.Random) -> str:
    """Changes the file and says how: cut off, a byte flipped (half of the time near the front), bytes put in."""
    content = bytearray(file.read_bytes())
    way = rng.choice(("cut", "flip", "flip", "insert"))
    place = rng.randrange(min(len(content), 4096) if rng.random() < 0.5 else len(content)) if content else 0
    if way == "cut":
        del content[place:]
    elif way == "flip" and content:
        content[place] ^= 1 << rng.randrange(8)
    else:
        content[place:place] = rng.randbytes(rng.randint(1, 16))
    file.write_bytes(bytes(content))
    return f"{file.name}: {way} at byte {place}"
