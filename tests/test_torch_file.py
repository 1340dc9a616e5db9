from __future__ import annotations

import argparse
import datetime
import enum
import gc
import io
import os
import pickle
import random
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path, PosixPath
from typing import Any

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exporter.checkpoints import archive, torch_file
from exporter.checkpoints.torch_file import Reference, Storage, Stub, read_torch_file
from exporter.checkpoints.unpickler import Unpickler
from exporter.errors import CheckpointError, IncompleteCheckpointError
from exporter.tensors import DType, LazyTensor, SourceFiles, StoredTensor, StridedTensor

CHECKPOINTS = Path(__file__).parent / "checkpoints"
REAL_FILES = sorted(
    path for path in CHECKPOINTS.glob("*/checkpoint/**/*") if path.suffix in (".pt", ".bin", ".pth") and path.is_file()
)
FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["archive", "stream"])


def elements(tensor: LazyTensor) -> torch.Tensor:
    with SourceFiles() as files:
        blocks = [block.clone() for block in tensor.blocks(files)]
    return torch.cat([torch.empty(0, dtype=tensor.dtype.torch), *blocks]).reshape(tensor.shape)


def assert_same(found: Any, truth: Any) -> None:
    """``found`` is ``truth``, its tensors bit for bit, as far as data goes: stubs are compared by class alone."""
    if isinstance(truth, torch.Tensor):
        assert isinstance(found, LazyTensor)
        assert (found.shape, found.dtype.torch) == (tuple(truth.shape), truth.dtype)
        bits = [t.detach().contiguous().flatten().view(torch.uint8) for t in (elements(found), truth)]
        assert torch.equal(*bits)
    elif isinstance(truth, dict):
        assert type(found) is dict and list(found) == list(truth)
        for key, value in truth.items():
            assert_same(found[key], value)
    elif isinstance(truth, torch.dtype):
        assert found.torch == truth
    elif type(truth) in (list, tuple, torch.Size):
        assert type(found) is (list if type(truth) is list else tuple) and len(found) == len(truth)
        for one, other in zip(found, truth, strict=True):
            assert_same(one, other)
    elif type(truth).__module__ == "builtins" and not isinstance(truth, type):
        assert type(found) is type(truth) and found == truth
    else:
        assert isinstance(found, Stub | Reference)


def save(value: Any, path: Path, zipped: bool = True, protocol: int = 2) -> Path:
    torch.save(value, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    return path


def refusal(path: Path) -> str:
    """The message with which ``path`` is refused, which is one line, names the file and says nothing of its folder."""
    with pytest.raises(CheckpointError) as caught:
        read_torch_file(path)
    assert path.name in caught.value.message
    for line in (caught.value.message, caught.value.hint):
        assert line.isprintable() and len(line) < 500 and str(path.parent) not in line
    return caught.value.message


# Tensors


@FORMATS
@pytest.mark.parametrize("dtype", DType)
def test_each_dtype_reads_back_bit_for_bit(tmp_path: Path, dtype: DType, zipped: bool) -> None:
    numbers = torch.randint(0, 2 if dtype is DType.BOOL else 256, (4, 3 * dtype.itemsize), dtype=torch.uint8)
    tensor = numbers.view(dtype.torch)
    value = {"matrix": tensor, "scalar": tensor[0, 0], "empty": tensor[:0], "row": tensor[1]}
    assert_same(read_torch_file(save(value, tmp_path / "model.pt", zipped)).value, value)


@FORMATS
def test_views_and_shared_storages_read_as_their_elements(tmp_path: Path, zipped: bool) -> None:
    base = torch.randn(4, 6, 5)
    value = {
        "base": base,
        "transpose": base.transpose(0, 2),
        "row": base[2],
        "column": base[:, :, 3],
        "steps": base.flatten()[3::7],
        "end": base.flatten()[-1:],
        "expanded": torch.tensor([[1.0], [2.0]]).expand(2, 9),
        "row of one": base.flatten()[5:11].as_strided((1, 6), (99, 1)),
        "parameter": torch.nn.Parameter(base.permute(1, 0, 2)),
        "buffer": torch.nn.Buffer(base[1:]),
    }
    path = save(value, tmp_path / "model.pt", zipped)
    found = read_torch_file(path).value
    assert_same(found, torch.load(path, weights_only=False))
    assert isinstance(found["row of one"], StoredTensor) and isinstance(found["transpose"], StridedTensor)
    assert found["base"].extents[0].offset + 2 * 30 * 4 == found["row"].extents[0].offset


def test_parameters_and_tensors_with_attributes_are_their_tensors(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.randn(3))
    parameter.ds_id = 7
    tensor = torch.randn(2, 2)
    tensor.note = {"a": [1]}
    path = save([parameter, tensor], tmp_path / "x.pt")
    pickled = zipfile.ZipFile(path).read("x/data.pkl")
    assert b"_rebuild_parameter_with_state" in pickled and b"_rebuild_from_type_v2" in pickled
    assert_same(read_torch_file(path).value, torch.load(path, weights_only=False))


@FORMATS
def test_tensors_that_no_weight_can_be_are_stubs(tmp_path: Path, zipped: bool) -> None:
    value = {
        "complex": torch.zeros(2, dtype=torch.complex64),
        "negated": torch.ones(2, dtype=torch.complex64).conj().imag,
        "sparse": torch.eye(2).to_sparse(),
        "float": torch.arange(3.0),
        "meta": torch.empty(2, device="meta"),
        "wide": torch.zeros(3, dtype=torch.complex128),
    }
    found = read_torch_file(save(value, tmp_path / "x.pt", zipped)).value
    assert_same(found.pop("float"), value["float"])
    assert {name: type(tensor) for name, tensor in found.items()} == dict.fromkeys(found, Stub)
    assert found["complex"].name == "torch._utils._rebuild_tensor_v2"


def test_a_member_is_the_storages_entry_with_its_checksum(tmp_path: Path) -> None:
    path = save({"a": torch.arange(10.0)[3:5]}, tmp_path / "x.pt")
    (extent,) = read_torch_file(path).value["a"].extents
    member = extent.member
    assert member is not None and member.path == path
    assert path.read_bytes()[member.offset :][: member.nbytes] == torch.arange(10.0).numpy().tobytes()
    assert member.crc32 == zlib.crc32(torch.arange(10.0).numpy().tobytes())
    assert (extent.offset, extent.numel) == (member.offset + 3 * 4, 2)


def test_checksums_that_torch_did_not_write_are_none(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        path = save({"a": torch.arange(10.0)}, tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_torch_file(path).value["a"].extents[0].member.crc32 is None


def test_a_bare_storage_is_where_its_bytes_lie(tmp_path: Path) -> None:
    path = save(torch.arange(6, dtype=torch.uint8).untyped_storage(), tmp_path / "x.pt")
    storage = read_torch_file(path).value
    assert isinstance(storage, Storage) and path.read_bytes()[storage.offset :][:6] == bytes(range(6))


# Other values


class Split(enum.Enum):
    TRAIN = 3


class Attributes:
    class Nested(dict[str, int]):
        pass

    def __init__(self) -> None:
        self.size = 4
        self.parent = self


@FORMATS
def test_objects_of_any_class_are_stubs_that_carry_their_data(tmp_path: Path, zipped: bool) -> None:
    value = {
        "namespace": argparse.Namespace(lr=0.5, tags=["a"]),
        "path": PosixPath("runs/1"),
        "date": datetime.date(2024, 2, 29),
        "enum": Split.TRAIN,
        "array": numpy.arange(3),
        "number": numpy.float64(1.5),
        "cycle": Attributes(),
        "nested": Attributes.Nested(a=1),
        "class": Attributes,
        "function": os.system,
        "dtype": torch.bfloat16,
        "device": torch.device("cuda:1"),
        "size": torch.Size([2, 3]),
        "default": defaultdict(list, a=[1]),
        "ordered": OrderedDict([("b", 1), ("a", 2)]),
    }
    found = read_torch_file(save(value, tmp_path / "x.pt", zipped, 4)).value
    assert found["namespace"].name == "argparse.Namespace"
    assert found["namespace"].state == {"lr": 0.5, "tags": ["a"]}
    assert found["path"].args == ("runs", "1")
    assert found["date"].name == "datetime.date" and found["date"].args == (b"\x07\xe8\x02\x1d",)
    assert found["enum"] == Stub(f"{__name__}.Split", (3,)) != Stub(f"{__name__}.Split", (4,))
    assert numpy.arange(3).tobytes() in found["array"].state
    assert numpy.float64(1.5).tobytes() in found["number"].args
    assert found["cycle"].state == {"size": 4, "parent": found["cycle"]}
    assert found["nested"].name == f"{__name__}.Attributes.Nested" and found["nested"].items == [("a", 1)]
    assert found["class"] == Reference(__name__, "Attributes")
    assert found["function"] == Reference("posix", "system")
    assert (found["dtype"], found["device"].args, found["size"]) == (DType.BF16, ("cuda", 1), (2, 3))
    assert (found["default"], list(found["ordered"].items())) == ({"a": [1]}, [("b", 1), ("a", 2)])


@FORMATS
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_a_whole_module_is_a_stub_with_its_parameters(tmp_path: Path, zipped: bool) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 3))
    found = read_torch_file(save(module, tmp_path / "x.pt", zipped)).value
    assert found.name == "torch.nn.modules.container.Sequential"
    assert_same(found.state["_modules"]["0"].state["_parameters"], dict(module[0].named_parameters()))


def test_a_state_dict_with_its_metadata_is_a_dict(tmp_path: Path) -> None:
    state = torch.nn.Linear(2, 3).state_dict()
    assert state._metadata
    assert_same(read_torch_file(save(state, tmp_path / "x.pt")).value, dict(state))


SCALARS = st.none() | st.booleans() | st.integers(-(2**200), 2**200) | st.floats(allow_nan=False) | st.text()
SCALARS |= st.binary(max_size=300)
KEYS = st.text() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.tuples(st.integers(0, 9), st.text())
PLAIN = st.recursive(
    SCALARS | st.sets(KEYS) | st.frozensets(KEYS),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(KEYS, inner),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, derandomize=True, max_examples=60)
@given(value=PLAIN, protocol=st.integers(2, 5), zipped=st.booleans())
def test_plain_data_reads_back_as_it_was_saved(tmp_path: Path, value: Any, protocol: int, zipped: bool) -> None:
    path = save(value, tmp_path / "x.pt", zipped, protocol)
    assert_same(read_torch_file(path).value, value)


def test_large_values_read_back(tmp_path: Path) -> None:
    value = {"text": "é" * 70_000, "bytes": b"\xff" * 70_000, "array": bytearray(9), "numbers": list(range(100_000))}
    assert read_torch_file(save(value, tmp_path / "x.pt", protocol=5)).value == value


def test_indexes_of_python_2_begin_at_one(tmp_path: Path) -> None:
    python2 = b"\x80\x02}q\x01(U\x01aq\x02]q\x03(h\x02h\x02eu."
    assert pickle.loads(python2) == {"a": ["a", "a"]}
    assert read_torch_file(write_archive(tmp_path / "x.pt", python2)).value == {"a": ["a", "a"]}


# Real checkpoints


class Inert:
    def __new__(cls, *args: Any) -> Inert:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.state = state


@pytest.mark.parametrize("path", REAL_FILES, ids=lambda path: str(path.relative_to(CHECKPOINTS)))
def test_files_of_real_trainings_read_as_with_torch(path: Path) -> None:
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    with torch.serialization.safe_globals([(type("Inert", (Inert,), {}), name) for name in names]):
        truth = torch.load(path, weights_only=True)
    file = read_torch_file(path)
    assert_same(file.value, truth)
    assert file.root == path.stem


def test_reading_imports_neither_torch_nor_a_class_of_the_file(tmp_path: Path) -> None:
    path = save({"a": torch.zeros(3), "parser": argparse.ArgumentParser}, tmp_path / "x.pt")
    code = (
        "import sys; from pathlib import Path; from exporter.checkpoints.torch_file import read_torch_file;"
        f"print(read_torch_file(Path({str(path)!r})).value); assert not {{'torch', 'argparse'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1], timeout=60)


def test_what_it_took_to_read_a_file_is_freed_without_the_collector(tmp_path: Path) -> None:
    path = save({"a": torch.zeros(3), "b": OrderedDict(c=b"bytes")}, tmp_path / "x.pt")
    gc.collect()
    gc.disable()
    try:
        read_torch_file(path)
        assert not [thing for thing in gc.get_objects() if isinstance(thing, Unpickler | archive.Archive)]
    finally:
        gc.enable()


def test_local_headers_are_read_many_at_once_and_data_between_them_never(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    pread = os.pread

    def note(descriptor: int, length: int, offset: int) -> bytes:
        lengths.append(length)
        return pread(descriptor, length, offset)

    many = save({str(number): torch.empty(0) for number in range(5000)}, tmp_path / "many.pt")
    large = save({str(number): torch.zeros(100_000) for number in range(5)}, tmp_path / "large.pt")
    monkeypatch.setattr(os, "pread", note)
    assert len(read_torch_file(many).value) == 5000
    assert len(lengths) < 20
    lengths.clear()
    assert len(read_torch_file(large).value) == 5
    assert sum(lengths) < 10_000


def test_the_root_is_the_name_under_which_the_file_was_saved(tmp_path: Path) -> None:
    path = save({}, tmp_path / "rank.0.pt")
    assert read_torch_file(path.rename(tmp_path / "rank.1.pt")).root == "rank.0"
    buffer = io.BytesIO()
    torch.save({}, buffer)
    (tmp_path / "nameless.pt").write_bytes(buffer.getvalue())
    assert read_torch_file(tmp_path / "nameless.pt").root == "archive"
    assert read_torch_file(save({}, tmp_path / "old.pt", zipped=False)).root == "archive"


# Files that are not of torch.save


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(IncompleteCheckpointError, match=r"model\.pt"):
        read_torch_file(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "0 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\n", "begins with b'version '"),
        (struct.pack("<Q", 2) + b"{}", "expected a file of torch.save"),
        (pickle.dumps({"a": 1}), "not one of torch.save"),
        (pickle.dumps(0x1950A86A20F9469CFC6C, 2), "cut short"),
        (b"PK\x03\x04", "too few"),
        (b"PK\x03\x04" + bytes(100), "cut short"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    assert reason in refusal(path)


def test_a_tar_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    assert "tar archive" in refusal(path)


def test_a_torchscript_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    assert "TorchScript" in refusal(path)


def test_a_pipe_a_device_and_a_folder_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / "zero.pt").symlink_to("/dev/zero")
    for name in ("pipe.pt", "folder.pt", "zero.pt"):
        assert "not a regular file" in refusal(tmp_path / name)


@FORMATS
def test_big_endian_tensors_are_refused(tmp_path: Path, zipped: bool) -> None:
    path = save({"a": torch.zeros(1)}, tmp_path / "x.pt", zipped)
    content = path.read_bytes()
    if zipped:
        content = content.replace(b"little", b"bigbig").replace(
            struct.pack("<I", zlib.crc32(b"little")), struct.pack("<I", zlib.crc32(b"bigbig"))
        )
    else:
        content = content.replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89")
    path.write_bytes(content)
    assert "little-endian" in refusal(path)


# Archives that torch.save does not write


def write_archive(path: Path, pickled: bytes, members: dict[str, bytes] | None = None, root: str = "x") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{root}/data.pkl", pickled)
        for name, content in (members or {}).items():
            archive.writestr(f"{root}/{name}", content)
    return path


def change(find: bytes, put: bytes) -> Callable[[bytearray, int], None]:
    def apply(content: bytearray, directory: int) -> None:
        assert find in content
        content[:] = content.replace(find, put)

    return apply


def patch(offset: int, put: bytes, *, in_directory: bool = False) -> Callable[[bytearray, int], None]:
    """Overwrite bytes at ``offset`` of the file, or of the directory."""

    def apply(content: bytearray, directory: int) -> None:
        start = offset % len(content) + (directory if in_directory else 0)
        assert content[start : start + len(put)] != put
        content[start : start + len(put)] = put

    return apply


def append_junk(content: bytearray, directory: int) -> None:
    content += b"junk"


def prepend_archive(content: bytearray, directory: int) -> None:
    content[:0] = b"PK\x03\x04" + bytes(60)


def overlap(content: bytearray, directory: int) -> None:
    """The second entry is placed where the first lies."""
    second = content.index(b"PK\x01\x02", directory + 1)
    content[second + 42 : second + 46] = bytes(4)


def misplace(content: bytearray, directory: int) -> None:
    """The second entry is placed beyond the end."""
    second = content.index(b"PK\x01\x02", directory + 1)
    content[second + 42 : second + 46] = b"\xfe\xff\xff\xff"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (append_junk, "does not end as an archive"),
        (prepend_archive, "directory goes from"),
        (overlap, "where another"),
        (change(b"x/data/0", b"y/data/0"), "does not lie in one folder"),
        (change(b"x/data/0", b"x/data/1"), "lacks the storage '0'"),
        (change(b"x/data/0", b"x/data\xff0"), "not UTF-8"),
        (change(b"x/data/0", b"x/version"[:8]), "lacks the storage '0'"),
        (change(b"x/data.pkl", b"x/data.pkk"), "no member data.pkl"),
        (change(b"x/", b"./"), "does not lie in one folder"),
        (patch(8, b"\x08\x00"), "disagrees"),
        (patch(14, b"1234"), "disagrees"),
        (patch(18, b"1234"), "disagrees"),
        (patch(30, b"z"), "another member"),
        (patch(8, b"\x01", in_directory=True), "encrypted"),
        (patch(10, b"\x08", in_directory=True), "is compressed"),
        (patch(16, b"1234", in_directory=True), "disagrees"),
        (patch(20, b"1234", in_directory=True), "is compressed"),
        (patch(20, b"\xff\xff\xff\x7f" * 2, in_directory=True), "disagrees"),
        (patch(20, b"\xff\xff\xff\xff" * 2, in_directory=True), "more than 32 bits"),
        (patch(34, b"\x01", in_directory=True), "not a list of members"),
        (patch(38, struct.pack("<I", 0o120777 << 16), in_directory=True), "not a plain file"),
        (patch(42, b"\x01", in_directory=True), "first member"),
        (patch(42, b"\xf0\xff\xff\x7f", in_directory=True), "first member"),
        (change(b"K\x07", b"K\x08"), "CRC-32"),
        (patch(-14, b"\x01\x00\x01\x00"), "does not have 1 entries"),
        (patch(-14, b"\x03\x00\x03\x00"), "fewer than 3 entries"),
        (patch(-14, b"\x01\x00\x02\x00"), "directory goes from"),
        (misplace, "ends before byte"),
    ],
)
def test_damaged_archives_are_refused(tmp_path: Path, damage: Callable[[bytearray, int], None], reason: str) -> None:
    pickled = pickle_of({"tensor": STORAGE + b"K\x00K\x02\x85K\x01\x85", "seven": b"K\x07"})
    path = write_archive(tmp_path / "x.pt", pickled, {"data/0": bytes(8)})
    assert read_torch_file(path).value["seven"] == 7
    content = bytearray(path.read_bytes())
    damage(content, content.index(b"PK\x01\x02"))
    path.write_bytes(content)
    assert reason in refusal(path)


@pytest.mark.parametrize(
    ("offset", "reason"),
    [
        (-98, "no zip64 end record"),
        (-34, "does not lie at byte"),
        (-82, "no zip64 end record"),
        (-14, "two end records disagree"),
        (-12, "two end records disagree"),
        (-22, "does not end as an archive"),
    ],
)
def test_damaged_end_records_of_torch_are_refused(tmp_path: Path, offset: int, reason: str) -> None:
    path = save({"a": torch.zeros(1)}, tmp_path / "x.pt")
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)
    assert reason in refusal(path)


@pytest.mark.parametrize(("batch", "near"), [(4096, 512), (4, 512), (4, 20), (1, 0)])
def test_a_member_is_checked_wherever_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int, near: int
) -> None:
    monkeypatch.setattr(archive, "_BATCH", batch)
    monkeypatch.setattr(archive, "_NEAR_BYTES", near)
    path = write_archive(tmp_path / "x.pt", b"\x80\x02N.", {f"data/{number}": bytes(3 * number) for number in range(9)})
    content = path.read_bytes()
    assert read_torch_file(path).value is None
    headers = [index for index in range(len(content)) if content.startswith(b"PK\x03\x04", index)]
    assert len(headers) == 10
    for header in headers:
        for offset, reason in ((5, None), (6, "disagrees"), (26, "another member"), (33, "another member")):
            damaged = bytearray(content)
            damaged[header + offset] ^= 1
            path.write_bytes(damaged)
            if reason is None:
                assert read_torch_file(path).value is None
            else:
                assert reason in refusal(path)


def test_an_archive_with_a_comment_is_refused(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "x.pt", b"\x80\x02N.")
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"PK\x05\x06" + bytes(16) + b"\x01\x00"
    assert "does not end as an archive" in refusal(path)


def test_a_huge_directory_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    with path.open("wb") as file:
        file.write(b"PK\x03\x04")
        file.seek(300_000_000)
        file.write(struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 9, 9, 299_999_996, 4, 0))
    assert "too many" in refusal(path)


def test_a_pickle_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_archive(tmp_path / "x.pt", b"\x80\x02N.")
    monkeypatch.setattr(torch_file, "MAX_PICKLE_BYTES", 3)
    assert "data.pkl has 4 bytes, expected at most 3" in refusal(path)


def test_stubs_are_equal_only_as_plain_values() -> None:
    assert Stub("a", (1, "b")) == Stub("a", (1, "b")) and hash(Stub("a", (1,))) == hash(Stub("a", (1,)))
    for other in (Stub("b", (1,)), Stub("a", (2,)), Stub("a", (1,), {}), Stub("a", (1,), None, [1]), ("a", (1,))):
        assert Stub("a", (1,)) != other
    assert Stub("a", ([],)) != Stub("a", ([],))


@pytest.mark.parametrize("name", ["x/data.pkl", "y/data.pkl", "data.pkl"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_second_data_pkl_is_refused(tmp_path: Path, name: str) -> None:
    path = write_archive(tmp_path / "x.pt", b"\x80\x02N.")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, b"\x80\x02N.")
    assert "two members" in refusal(path) or "one folder" in refusal(path)


def test_a_deflated_bomb_is_refused_without_inflating_it(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(100_000_000))
    assert "compressed" in refusal(path)


def test_zip64_archives_of_other_writers_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("x/data.pkl", "w", force_zip64=True) as member:
            member.write(pickle_of({"t": STORAGE + b"K\x00K\x02\x85K\x01\x85"}))
        with archive.open("x/data/0", "w", force_zip64=True) as member:
            member.write(struct.pack("<2f", 1, 2))
    assert_same(read_torch_file(path).value["t"], torch.tensor([1.0, 2.0]))


def write_zip64(path: Path, *values: tuple[int, int, int]) -> Path:
    """Members of a pickle each; the directory has ``values`` (size, compressed size, place) in its zip64 fields."""
    pickled, elsewhere = b"\x80\x02N.", 0xFFFFFFFF
    crc32 = zlib.crc32(pickled)
    members = directory = b""
    for number, fields in enumerate(values):
        name = b"x/data.pkl" if number == 0 else b"x/data/%03d" % number
        lengths = crc32, elsewhere, elsewhere, len(name)
        members += struct.pack("<4s5H3I2H", b"PK\x03\x04", 45, 0, 0, 0, 0, *lengths, 0) + name + pickled
        directory += struct.pack("<4s6H3I5H2I", b"PK\x01\x02", 45, 45, 0, 0, 0, 0, *lengths, 28, 0, 0, 0, 0, elsewhere)
        directory += name + struct.pack("<2H3Q", 1, 24, *fields)
    count, start = len(values), len(members)
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, count, count, len(directory), start, 0)
    path.write_bytes(members + directory + end)
    return path


@pytest.mark.parametrize("value", [2**32, 2**62, 2**63 - 45, 2**63 - 1, 2**63, 2**64 - 1])
def test_sizes_and_places_that_no_file_has_are_refused(tmp_path: Path, value: int) -> None:
    first, path = (4, 4, 0), tmp_path / "x.pt"
    assert read_torch_file(write_zip64(path, first, (4, 4, 44))).value is None
    assert "compressed" in refusal(write_zip64(path, first, (value, 4, 44))) or value >= 2**63
    assert "compressed" in refusal(write_zip64(path, first, (4, value, 44))) or value >= 2**63
    assert "where another begins" in refusal(write_zip64(path, first, (value, value, 44))) or value >= 2**63
    assert "ends before byte" in refusal(write_zip64(path, first, (4, 4, value))) or value >= 2**63


def test_the_directory_may_list_members_in_any_order(tmp_path: Path) -> None:
    path = write_zip64(tmp_path / "x.pt", (4, 4, 0), (4, 4, 44), (4, 4, 88))
    content = path.read_bytes()
    *entries, end = (content[start : start + 84] for start in range(132, len(content), 84))
    path.write_bytes(content[:132] + b"".join(reversed(entries)) + end)
    assert path.read_bytes() != content
    assert read_torch_file(path).value is None


# Tensors that their storage does not hold

STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x02tQ"
HUGE = b"\x8a\x08" + struct.pack("<q", 2**62)
MINUS_ONE = b"J\xff\xff\xff\xff"


def pickle_of(entries: dict[str, bytes]) -> bytes:
    """A dict; an entry that begins with a storage becomes a tensor of it, with offset, size and stride."""
    pickled = b"\x80\x02}("
    for name, value in entries.items():
        rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n("
        tensor = rebuild + value + b"\x89}tR" if value.startswith(STORAGE[:8]) else value
        pickled += b"X" + struct.pack("<I", len(name)) + name.encode() + tensor
    return pickled + b"u."


@pytest.mark.parametrize(
    ("view", "reason"),
    [
        (b"K\x00K\x03\x85K\x01\x85", "byte 12 of a storage of 8"),
        (b"K\x01K\x02\x85K\x01\x85", "byte 12 of a storage of 8"),
        (b"K\x03K\x00\x85K\x01\x85", "byte 12 of a storage of 8"),
        (b"K\x00K\x02\x85K\x02\x85", "byte 12 of a storage of 8"),
        (MINUS_ONE + b"K\x02\x85K\x01\x85", "without a valid storage, offset"),
        (b"K\x01K\x02\x85" + MINUS_ONE + b"\x85", "without a valid storage, offset"),
        (b"K\x00" + MINUS_ONE + b"\x85K\x01\x85", "without a valid storage, offset"),
        (b"K\x00" + HUGE + b"\x85K\x01\x85", "of a storage of 8"),
        (b"K\x00" + HUGE + HUGE + b"\x86K\x00K\x00\x86", "on a storage of 8 bytes"),
        (HUGE + b"K\x02\x85K\x01\x85", "of a storage of 8"),
        (b"K\x00\x8a\x09" + bytes(8) + b"\x01\x85K\x01\x85", "without a valid storage, offset"),
        (b"K\x00K\x02\x85)", "shape (2,) and stride ()"),
        (b"K\x00X\x01\0\0\0a\x85K\x01\x85", "without a valid storage, offset"),
        (b"K\x00\x88\x85K\x01\x85", "without a valid storage, offset"),
        (b"K\x00(" + b"K\x01" * 65 + b"t(" + b"K\x01" * 65 + b"t", "without a valid storage, offset"),
    ],
)
def test_views_beyond_their_storage_are_refused(tmp_path: Path, view: bytes, reason: str) -> None:
    assert reason in refusal(write_archive(tmp_path / "x.pt", pickle_of({"t": STORAGE + view}), {"data/0": bytes(8)}))


@pytest.mark.parametrize(
    ("storage", "reason"),
    [
        (STORAGE.replace(b"K\x02", b"K\x03"), "8 bytes, expected 12"),
        (STORAGE.replace(b"K\x02", MINUS_ONE), "-1 elements"),
        (STORAGE.replace(b"FloatS", b"DoubleS"), "8 bytes, expected 16"),
        (STORAGE.replace(b"FloatS", b"FancyS"), "torch.FancyStorage"),
        (STORAGE.replace(b"\x010", b"\x019", 1).replace(b"\0\0\x000X", b"\0\0\x009X"), "lacks the storage '9'"),
        (STORAGE.replace(b"X\x01\0\0\x000", b"X\x09\0\0\0../data/0"), "lacks the storage '../data/0'"),
        (b"X\x01\0\0\x000Q", "persistent id"),
        (b")Q", "persistent id"),
        (STORAGE.replace(b"tQ", b"NNNtQ"), "persistent id"),
        (STORAGE + STORAGE.replace(b"FloatS", b"IntS") + b"\x86", "in two ways"),
        (STORAGE + STORAGE.replace(b"FloatS", b"HalfS").replace(b"K\x02", b"K\x04") + b"\x86", "in two ways"),
    ],
)
def test_storages_that_the_archive_does_not_hold_are_refused(tmp_path: Path, storage: bytes, reason: str) -> None:
    pickled = b"\x80\x02" + storage + b"."
    assert reason in refusal(write_archive(tmp_path / "x.pt", pickled, {"data/0": bytes(8)}))


def test_bytes_after_the_pickle_are_refused(tmp_path: Path) -> None:
    assert "ends at byte" in refusal(write_archive(tmp_path / "x.pt", b"\x80\x02N.N."))


def test_a_stream_with_storages_beyond_its_end_is_refused(tmp_path: Path) -> None:
    path = save([], tmp_path / "x.pt", zipped=False)
    header, _, _ = path.read_bytes().partition(b"\x80\x02]q\x00.")
    storages = [STORAGE.replace(b"K\x02tQ", HUGE + b"NtQ").replace(b"\x000X", b"\x00%dX" % key) for key in (0, 1)]
    entries = pickle.dumps(["0", "1"], 2) + struct.pack("<q", 2**62)
    path.write_bytes(header + b"\x80\x02" + b"".join(storages) + b"\x86." + entries)
    assert "ends before its storage '1'" in refusal(path)


@pytest.mark.parametrize("damage", ["longer", "shorter", "count", "key"])
def test_a_stream_whose_storages_do_not_fit_is_refused(tmp_path: Path, damage: str) -> None:
    path = save({"a": torch.arange(3.0)}, tmp_path / "x.pt", zipped=False)
    content = bytearray(path.read_bytes())
    if damage == "longer":
        content += b"\0"
    elif damage == "shorter":
        del content[-1:]
    elif damage == "count":
        content[-20] += 1
    else:
        content[content.rindex(b"q\x01a.") - 1] ^= 1
    path.write_bytes(content)
    assert "storage" in refusal(path)


# Fuzz


def seeds(folder: Path) -> Iterator[tuple[bytes, Callable[[bytes], bytes]]]:
    """Files, and for the pickles in them alone, how to make a file of a changed one."""
    value = {
        "weights": {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.nn.Parameter(torch.ones(2).half())},
        "args": argparse.Namespace(path=PosixPath("a"), sets={1, 2}, numbers=(1.5, 2**70, b"bytes")),
        "e": numpy.arange(3),
        "shape": torch.Size([2]),
        "f8": torch.ones(3).to(torch.float8_e4m3fn),
    }
    for zipped in (True, False):
        for protocol in (2, 4):
            content = save(value, folder / "seed.pt", zipped, protocol).read_bytes()
            yield content, lambda changed: changed
            if zipped:
                with zipfile.ZipFile(io.BytesIO(content)) as archive:
                    members = {name.removeprefix("seed/"): archive.read(name) for name in archive.namelist()}
                pickled = members.pop("data.pkl")
                yield (
                    pickled,
                    lambda changed, members=members: write_archive(folder / "y", changed, members).read_bytes(),
                )


def mutate(content: bytes, choose: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(choose.choice((1, 1, 1, 2, 8))):
        start = choose.randrange(len(changed))
        length = choose.randrange(1, 9)
        match choose.randrange(5):
            case 0:
                changed[start] ^= 1 << choose.randrange(8)
            case 1:
                changed[start] = choose.randrange(256)
            case 2:
                del changed[start : start + length]
            case 3:
                source = choose.randrange(len(changed))
                changed[start:start] = changed[source : source + length]
            case _:
                changed[start : start + 4] = choose.choice((b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", bytes(4)))
        if not changed:
            break
    return bytes(changed)


def assert_read_or_refused(path: Path) -> None:
    try:
        value = read_torch_file(path).value
    except CheckpointError as error:
        assert "\n" not in error.message and len(error.message) < 500
        return
    pending, seen = [value], set()
    while pending:
        node = pending.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, Stub):
            pending += [node.args, node.state, node.items]
        elif isinstance(node, dict | list | tuple | set | frozenset):
            pending += [*node, *(node.values() if isinstance(node, dict) else ())]
        elif isinstance(node, LazyTensor):
            elements(node)
        else:
            assert isinstance(node, str | bytes | bytearray | int | float | None | Reference | Storage | DType)


@pytest.mark.parametrize("rounds", [100, pytest.param(10_000, marks=pytest.mark.slow)])
def test_changed_files_are_read_or_refused_and_nothing_else(tmp_path: Path, rounds: int) -> None:
    choose = random.Random(4)
    for content, as_file in list(seeds(tmp_path)):
        for _ in range(rounds):
            (tmp_path / "x.pt").write_bytes(as_file(mutate(content, choose)))
            assert_read_or_refused(tmp_path / "x.pt")


@FORMATS
def test_a_file_that_was_cut_short_is_refused(tmp_path: Path, zipped: bool) -> None:
    content = save({"a": torch.arange(6.0), "b": argparse.Namespace(c=1)}, tmp_path / "x.pt", zipped).read_bytes()
    for length in (*range(0, len(content), 11), *range(len(content) - 30, len(content))):
        (tmp_path / "x.pt").write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            read_torch_file(tmp_path / "x.pt")
