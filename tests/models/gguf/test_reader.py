"""The reader: what a file says comes out, and no lie of it does harm."""

from __future__ import annotations

import random
import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest

from engine.config import StartupError
from engine.models.gguf.reader import find_gguf, model_name, open_gguf
from tests.models.gguf.files import array, file, scalar, small_file, string, tensor, write

PAIR = [("a", scalar("u8", 1))]


def refused(path: Path, data: bytes) -> str:
    with pytest.raises(StartupError) as caught:
        open_gguf(write(path, data))
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message and len(message) < 400
    return message


def test_values_and_tensors(tmp_path: Path) -> None:
    model = open_gguf(write(tmp_path / "a.gguf", small_file()))
    assert model.get("u8") == 1 and model.get("i64") == 1 and model.get("f64") == 1.0
    assert model.get("bool") is True and model.get("text") == "größe" and model.get("absent") is None
    assert model.words("words") == ["a", "", "ü" * 9] and model.words("none") == []
    assert model.get("list.i16") == [0, 1, 1] and model.get("list.bool") == [False, True, True]
    embedding, norm, experts = model.tensors.values()
    assert (embedding.type, embedding.shape, embedding.end - embedding.begin) == ("Q8_0", (3, 32), 102)
    assert (norm.type, norm.shape, norm.begin - embedding.begin) == ("F32", (5,), 128)
    assert (experts.type, experts.shape, experts.end - experts.begin) == ("Q4_0", (2, 2, 32), 72)
    assert model.weights() == ("Q8_0", 102 + norm.end - norm.begin + 72)


def test_what_the_package_writes(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_context_length(77)
    writer.add_rope_freq_base(1e4)
    writer.add_token_list(["x", "yy"])
    writer.add_token_types([1, 3])
    writer.add_custom_alignment(64)
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    writer.add_tensor("token_embd.weight", values)
    writer.add_tensor("other", np.ones((2, 3, 4), dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = open_gguf(tmp_path / "a.gguf")
    assert model.get("general.architecture") == "llama" and model.get("llama.context_length") == 77
    assert model.words("tokenizer.ggml.tokens") == ["x", "yy"]
    assert model.array("tokenizer.ggml.token_type").tolist() == [1, 3]
    stored = model.tensors["token_embd.weight"]
    data = stored.file.read_bytes()[stored.begin : stored.end]
    assert (np.frombuffer(data, "<f4").reshape(stored.shape) == values).all()
    assert model.tensors["other"].shape == (2, 3, 4)


NESTED = struct.pack("<IIQ", 9, 9, 1)
LIES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "no GGUF file"),
    "magic": (file(PAIR, [], b"", magic=b"GGML"), "no GGUF file"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1", "Git LFS"),
    "version 1": (file(PAIR, [], b"", version=1), "version 1"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "tensors": (file(PAIR, [], b"", num_tensors=2**63), "number of tensors"),
    "pairs": (file(PAIR, [], b"", num_pairs=2**64 - 1), "number of metadata pairs"),
    "key length": (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62) + b"\0" * 64, "length of key 0"),
    "string length": (file([("a", struct.pack("<IQ", 8, 2**63))], [], b"\0" * 64), "length of a"),
    "array length": (file([("a", struct.pack("<IIQ", 9, 6, 2**61))], [], b"\0" * 64), "length of a"),
    "word count": (file([("a", struct.pack("<IIQ", 9, 8, 2**40))], [], b"\0" * 64), "length of a"),
    "word length": (file([("a", struct.pack("<IIQQ", 9, 8, 2, 2**63))], [], b"\0" * 64), "truncated"),
    "value type": (file([("a", struct.pack("<I", 13))], [], b"\0" * 64), "unknown type 13"),
    "array type": (file([("a", struct.pack("<IIQ", 9, 77, 1))], [], b"\0" * 64), "unknown type 77"),
    "nested": (file([("a", NESTED)], [], b"\0" * 64), "array of the unknown type 9"),
    "twice": (file(PAIR * 2, [], b""), "key a stands twice"),
    "not utf-8": (file([("a", string(b"\xff\xfe"))], [], b""), "not UTF-8"),
    "control": (file([("a\nb", scalar("u8", 1))] * 2, [], b""), r"'a\nb'"),
    "alignment 0": (file([("general.alignment", scalar("u32", 0))], [], b""), "general.alignment"),
    "alignment 48": (file([("general.alignment", scalar("u32", 48))], [], b""), "general.alignment"),
    "alignment text": (file([("general.alignment", string("32"))], [], b""), "general.alignment"),
    "alignment huge": (file([("general.alignment", scalar("u64", 2**40))], [], b""), "general.alignment"),
    "dimensions": (file([], [tensor("t", (1,) * 5, 0, 0)], b"\0" * 64), "5 dimensions"),
    "tensor type": (file([], [tensor("t", (1,), 4, 0)], b"\0" * 64), "unknown type 4"),
    "offset": (file([], [tensor("t", (1,), 0, 2**63)], b"\0" * 64), "truncated"),
    "unaligned": (file([], [tensor("t", (1,), 0, 4)], b"\0" * 64), "alignment"),
    "size": (file([], [tensor("t", (2**40, 2**40), 0, 0)], b"\0" * 64), "truncated"),
    "half a block": (file([], [tensor("t", (2, 48), 2, 0)], b"\0" * 64), "blocks of 32"),
    "half a superblock": (file([], [tensor("t", (1, 128), 12, 0)], b"\0" * 256), "blocks of 256"),
    "two at once": (file([], [tensor("t", (4,), 0, 0), tensor("u", (4,), 0, 0)], b"\0" * 64), "overlaps"),
    "one name": (file([], [tensor("t", (4,), 0, 0), tensor("t", (4,), 0, 32)], b"\0" * 64), "stands twice"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies(tmp_path: Path, lie: str) -> None:
    data, expected = LIES[lie]
    assert expected in refused(tmp_path / "a.gguf", data)


def test_cut_anywhere(tmp_path: Path) -> None:
    whole = small_file()
    needed = open_gguf(write(tmp_path / "whole.gguf", whole)).tensors["blk.0.ffn_gate_exps.weight"].end
    for length in range(0, needed, 3):
        refused(tmp_path / "a.gguf", whole[:length])


def test_changed_bytes_and_numbers(tmp_path: Path) -> None:
    """Every outcome is a model or one line, and takes no more memory than the file."""
    whole, rng, path = small_file(), random.Random(0), tmp_path / "a.gguf"
    outcomes = [0, 0]
    tracemalloc.start()
    try:
        for _ in range(600):
            data = bytearray(whole)
            at = rng.randrange(len(whole) - 256)
            if rng.random() < 0.5:
                data[at] = rng.randrange(256)
            else:
                number = rng.choice((0, 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1, rng.getrandbits(64)))
                data[at : at + 8] = number.to_bytes(8, "little")
            path.write_bytes(data)
            try:
                model = open_gguf(path)
            except StartupError as error:
                assert "\n" not in str(error) and len(str(error)) < 600
                outcomes[0] += 1
                continue
            outcomes[1] += 1
            for name in model._values:
                model.get(name)
            assert all(0 <= each.begin <= each.end <= len(data) for each in model.tensors.values())
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
    assert min(outcomes) > 50


def parts(tmp_path: Path, count: int = 3, told: int = 3) -> list[Path]:
    paths = []
    for number in range(count):
        pairs = [("split.count", scalar("u16", told)), ("split.no", scalar("u16", number))]
        if number == 0:
            pairs += [("words", array("str", ["of", "the", "first"])), ("split.tensors.count", scalar("i32", told))]
        data = np.full(8, number, dtype=np.float32).tobytes()
        name = f"a-{number + 1:05d}-of-{told:05d}.gguf"
        paths.append(write(tmp_path / name, file(pairs, [tensor(f"t{number}", (8,), 0, 0)], data)))
    return paths


def test_a_model_in_parts(tmp_path: Path) -> None:
    paths = parts(tmp_path)
    # Any of them may be named.
    for path in paths:
        model = open_gguf(path)
        assert model.path == paths[0] and model.words("words") == ["of", "the", "first"]
        assert [each.file for each in model.tensors.values()] == paths
    assert model_name(paths[1]) == "a" and find_gguf(tmp_path) == paths[0]
    paths[1].unlink()
    with pytest.raises(StartupError, match=r"00002-of-00003.gguf: is not there"):
        open_gguf(paths[0])


def test_parts_that_do_not_fit(tmp_path: Path) -> None:
    paths = parts(tmp_path)
    with pytest.raises(StartupError, match="is part of 3"):
        open_gguf(paths[0].rename(tmp_path / "b.gguf"))
    paths = parts(tmp_path)
    paths[1].write_bytes(paths[2].read_bytes())
    with pytest.raises(StartupError, match="tensor t2 is in"):
        open_gguf(paths[0])


def test_the_one_of_a_directory(tmp_path: Path) -> None:
    assert find_gguf(tmp_path) is None
    one = write(tmp_path / "one.Q4_0.gguf", small_file())
    write(tmp_path / "mmproj-one.gguf", small_file())
    assert find_gguf(tmp_path) == one
    write(tmp_path / "one.Q8_0.gguf", small_file())
    with pytest.raises(StartupError, match="several models"):
        find_gguf(tmp_path)
