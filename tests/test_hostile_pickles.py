"""Pickles that try to run something, to write to something, or to take unbounded memory or time.

An attack that runs code would create a canary file. Those that need nothing but the standard library are shown to do
so with the standard library's unpickler: they are real.
"""

from __future__ import annotations

import marshal
import os
import pickle
import re
import resource
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exporter.checkpoints.torch_file import Reference, Storage, Stub, read_torch_file
from exporter.errors import CheckpointError
from exporter.tensors import DType, LazyTensor

SEARCH_PATH = [os.path.abspath(entry) for entry in sys.path]
MAX_SECONDS = 10
MAX_MEMORY = 2 * 1024**3
STREAM_HEADER = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))


def name(module: str, qualified: str) -> bytes:
    return f"c{module}\n{qualified}\n".encode()


def computed(module: str, qualified: str) -> bytes:
    """A name that STACK_GLOBAL takes from the stack, where it may have dots."""
    return text(module) + text(qualified) + b"\x93"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def data(value: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(value)) + value


def number(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def listed(*items: bytes) -> bytes:
    return b"](" + b"".join(items) + b"e"


def mapped(*items: bytes) -> bytes:
    return b"}(" + b"".join(items) + b"u"


def of(*arguments: bytes) -> bytes:
    return b"(" + b"".join(arguments) + b"t"


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + of(*arguments) + b"R"


def method(called: str, target: bytes, *arguments: bytes) -> bytes:
    return call(call(name("operator", "methodcaller"), text(called), *arguments), target)


def pickled(body: bytes) -> bytes:
    return b"\x80\x04" + body + b"."


CANARY = "canary"
SOURCE = f"open({CANARY!r}, 'w').close()"
SYSTEM = name("os", "system")
EVIL = pickled(call(SYSTEM, text(f"touch {CANARY}")))


def standard_attacks() -> dict[str, bytes]:
    """Attacks that the standard library's unpickler carries out: each creates the canary."""
    touch, path, code, script = text(f"touch {CANARY}"), text(CANARY), text(SOURCE), text("script.py")
    command = listed(text("touch"), path)
    module = call(name("builtins", "__import__"), text("os"))
    imported = call(name("importlib", "import_module"), text("os"))
    compiled = data(marshal.dumps(compile(SOURCE, "x", "exec")))
    scope = mapped(text("__builtins__"), mapped(text("open"), name("builtins", "open")))
    inner = data(pickled(call(SYSTEM, touch)))
    starmap = call(name("itertools", "starmap"), SYSTEM, listed(of(touch)))
    handler = name("logging", "FileHandler")
    namespace = call(name("types", "SimpleNamespace"))
    return {
        "os.system": call(SYSTEM, touch),
        "posix.system": call(name("posix", "system"), touch),
        "os.system by a computed name": call(computed("os", "system"), touch),
        "os.system by a dotted name": call(computed("shutil", "os.system"), touch),
        "os.system by a dunder name": call(computed("os", "system.__call__"), touch),
        "os.system by a module's dict": call(method("get", computed("os", "__dict__"), text("system")), touch),
        "os.popen": method("close", call(name("os", "popen"), touch)),
        "os.mkdir": call(name("os", "mkdir"), path),
        "os.symlink": call(name("os", "symlink"), text("/"), path),
        "os.spawnvp": call(name("os", "spawnvp"), b"K\x00", text("touch"), command),
        "posix.open": call(name("posix", "open"), path, b"K\x41"),
        "subprocess.Popen": method("wait", call(name("subprocess", "Popen"), command)),
        "subprocess.check_output": call(name("subprocess", "check_output"), command),
        "subprocess.getoutput": call(name("subprocess", "getoutput"), touch),
        "pty.spawn": call(name("pty", "spawn"), command),
        "builtins.eval": call(name("builtins", "eval"), code),
        "builtins.exec": call(name("builtins", "exec"), code),
        "builtins.open": call(name("builtins", "open"), path, text("w")),
        "_io.FileIO": call(name("_io", "FileIO"), path, text("w")),
        "codecs.open": call(name("codecs", "open"), path, text("w")),
        "builtins.compile": call(
            name("builtins", "exec"), call(name("builtins", "compile"), code, text("x"), text("exec"))
        ),
        "builtins.getattr": call(call(name("builtins", "getattr"), module, text("system")), touch),
        "importlib.import_module": call(call(name("builtins", "getattr"), imported, text("system")), touch),
        "builtins.map": call(name("builtins", "list"), call(name("builtins", "map"), SYSTEM, listed(touch))),
        "builtins.set of a lazy iterator": call(name("builtins", "set"), starmap),
        "collections.deque of a lazy iterator": call(name("collections", "deque"), starmap),
        "functools.partial": call(call(name("functools", "partial"), SYSTEM, touch)),
        "operator.methodcaller": method("touch", call(name("pathlib", "PosixPath"), path)),
        "operator.attrgetter": call(call(call(name("operator", "attrgetter"), text("system")), module), touch),
        "types.FunctionType": call(
            call(name("types", "FunctionType"), call(name("marshal", "loads"), compiled), scope)
        ),
        "runpy.run_path": call(name("runpy", "run_path"), script),
        "runpy._run_code": call(name("runpy", "_run_code"), code, b"}"),
        "timeit.timeit": call(name("timeit", "timeit"), code, text("pass"), name("time", "time"), b"K\x01"),
        "cProfile.run": call(name("cProfile", "run"), code),
        "trace.Trace": method("run", call(name("trace", "Trace")), code),
        "code.InteractiveInterpreter": method("runsource", call(name("code", "InteractiveInterpreter")), code),
        "ctypes.pythonapi": call(computed("ctypes", "pythonapi.PyRun_SimpleString"), data(SOURCE.encode())),
        "pickle.loads": call(name("pickle", "loads"), inner),
        "_pickle.loads": call(name("_pickle", "loads"), inner),
        "logging.FileHandler": call(handler, path),
        "shutil.copy": call(name("shutil", "copy"), script, path),
        "sqlite3.connect": method("execute", call(name("sqlite3", "connect"), path), text("create table t (c)")),
        "INST": b"(" + touch + b"ios\nsystem\n",
        "OBJ": b"(" + handler + path + b"o",
        "BUILD that calls __setstate__": namespace + mapped(text("__setstate__"), SYSTEM) + b"b" + touch + b"b",
        "APPEND that calls append": namespace + mapped(text("append"), SYSTEM) + b"b" + touch + b"a",
        "ADDITEMS that calls add": namespace + mapped(text("add"), SYSTEM) + b"b(" + touch + b"\x90",
    }


def other_attacks() -> dict[str, bytes]:
    """Attacks through libraries, through what a reader must allow, and on the reader's own objects."""
    touch, path, evil_path = text(f"touch {CANARY}"), text(CANARY), text("evil.pt")
    command = listed(text("touch"), path)
    stub = call(name("argparse", "Namespace"))
    storage = of(text("storage"), name("torch", "FloatStorage"), text("0"), text("cpu"), b"K\x02") + b"Q"
    view = (b"K\x00", of(b"K\x02"), of(b"K\x01"))
    v2, from_type = name("torch._utils", "_rebuild_tensor_v2"), name("torch._tensor", "_rebuild_from_type_v2")
    return {
        "torch.load": call(name("torch", "load"), evil_path, b"N", name("pickle", "loads"), b"\x89"),
        "torch.serialization.load": call(name("torch.serialization", "load"), evil_path),
        "torch.storage._load_from_bytes": call(name("torch.storage", "_load_from_bytes"), data(EVIL)),
        "torch.hub.load": call(name("torch.hub", "load"), evil_path, text("x"), text("local")),
        "torch.hub.download_url_to_file": call(name("torch.hub", "download_url_to_file"), text("file:///x"), path),
        "torch.jit.load": call(name("torch.jit", "load"), evil_path),
        "torch.jit.CompilationUnit": call(name("torch.jit", "CompilationUnit"), text("def f(): ...")),
        "torch.save": call(name("torch", "save"), b"N", path),
        "torch.ops.load_library": call(computed("torch", "ops.load_library"), evil_path),
        "torch.classes.load_library": call(computed("torch._classes", "classes.load_library"), evil_path),
        "torch.utils.cpp_extension.load": call(name("torch.utils.cpp_extension", "load"), text("x"), evil_path),
        "torch._utils._import_dotted_name": call(
            call(name("torch._utils", "_import_dotted_name"), text("os.system")), touch
        ),
        "torch.utils.collect_env.run": call(name("torch.utils.collect_env", "run"), touch),
        "torch._inductor.runtime": call(name("torch._inductor.runtime.compile_tasks", "_reload_python_module"), touch),
        "torch.from_file": call(name("torch", "from_file"), path, b"\x88", b"K\x10"),
        "torch.FloatStorage.from_file": call(computed("torch", "FloatStorage.from_file"), path, b"\x88", b"K\x10"),
        "torch.Tensor.map_": call(computed("torch", "Tensor.map_"), storage, storage, SYSTEM),
        "a dotted name below torch": call(computed("torch", "serialization.os.system"), touch),
        "a dotted name below an allowed name": call(
            method("get", computed("torch._utils", "_rebuild_tensor_v2.__globals__"), text("os")), touch
        ),
        "a module's dunder name": call(computed("torch._utils", "__builtins__"), touch),
        "numpy.load": call(name("numpy", "load"), evil_path, b"N", b"\x88"),
        "numpy.memmap": call(name("numpy", "memmap"), path, text("uint8"), text("w+"), b"K\x00", of(b"K\x04")),
        "numpy runstring": call(name("numpy.testing._private.utils", "runstring"), touch, b"}"),
        "numpy.f2py": call(name("numpy.f2py.diagnose", "run_command"), touch),
        "numpy object array": call(name("numpy.core.multiarray", "_reconstruct"), name("numpy", "ndarray"))
        + of(b"K\x01", of(b"K\x01"), text("O"), b"\x89", listed(call(SYSTEM, touch)))
        + b"b",
        "transformers remote code": call(
            name("transformers.dynamic_module_utils", "get_class_from_dynamic_module"), evil_path
        ),
        "joblib.load": call(name("joblib", "load"), evil_path),
        "dill code": call(name("dill._dill", "_create_function"), call(name("dill._dill", "_load_type"), touch)),
        "cloudpickle code": call(name("cloudpickle.cloudpickle", "_make_function"), touch),
        "types.CodeType": call(name("types", "CodeType"), *[b"K\x00"] * 18),
        "weakref.finalize": call(name("weakref", "finalize"), name("uuid", "UUID"), SYSTEM, touch),
        "webbrowser.open": call(name("webbrowser", "open"), text(f"file:///{CANARY}")),
        "urllib.request.urlretrieve": call(name("urllib.request", "urlretrieve"), text("file:///dev/null"), path),
        "ctypes.CDLL": call(name("ctypes", "CDLL"), evil_path),
        "codecs.encode with a codec": call(name("_codecs", "encode"), touch, text("unicode_escape")),
        "codecs.encode of an object": call(name("_codecs", "encode"), b"N", text("latin1")),
        "codecs.decode": call(name("_codecs", "decode"), data(EVIL), text("zlib")),
        "bytes of a length": call(name("builtins", "bytes"), number(10**10)),
        "bytearray of a length": call(name("builtins", "bytearray"), number(10**10)),
        "set of a list of lists": call(name("builtins", "set"), listed(b"]")),
        "OrderedDict of a callable": call(name("collections", "OrderedDict"), SYSTEM),
        "OrderedDict with an unhashable key": call(name("collections", "OrderedDict"), listed(of(b"]", b"N"))),
        "defaultdict with a factory": call(name("collections", "defaultdict"), SYSTEM) + of(touch) + b"b",
        "rebuild of a class that runs": call(from_type, SYSTEM, name("torch", "Tensor"), of(touch), b"N"),
        "rebuild within rebuild": call(from_type, from_type, name("torch", "Tensor"), of(SYSTEM, touch), b"N"),
        "rebuild with the state of a class": call(from_type, v2, SYSTEM, of(storage, *view, b"\x89", b"}"), touch),
        "rebuild without arguments": call(v2),
        "rebuild without a storage": call(v2, SYSTEM, *view, b"\x89", b"}"),
        "rebuild with hooks": call(v2, storage, *view, b"\x89", mapped(b"K\x00", SYSTEM)),
        "rebuild with a function as arguments": v2 + SYSTEM + b"R",
        "parameter of a function": call(name("torch._utils", "_rebuild_parameter"), SYSTEM, b"\x88", b"}"),
        "wrapper subclass": call(name("torch._utils", "_rebuild_wrapper_subclass"), SYSTEM, touch),
        "Size of a function": call(name("torch", "Size"), SYSTEM),
        "storage of a class that runs": of(text("storage"), SYSTEM, touch, text("cpu"), b"K\x02") + b"Q",
        "persistent module": of(text("module"), SYSTEM, touch, touch) + b"Q" + of(touch) + b"R",
        "persistent id of a function": call(SYSTEM, touch) + b"Q",
        "__builtin__.eval": call(name("__builtin__", "eval"), text(SOURCE)),
        "PERSID": b"P" + CANARY.encode() + b"\n",
        "EXT1": b"\x82\x01)R",
        "EXT2": b"\x83\x01\x00)R",
        "EXT4": b"\x84\x01\x00\x00\x00)R",
        "NEXT_BUFFER": b"\x97\x98",
        "NEWOBJ": name("subprocess", "Popen") + of(command) + b"\x81",
        "NEWOBJ_EX": name("subprocess", "Popen") + b")" + mapped(text("args"), command) + b"\x92",
        "NEWOBJ of a result": call(SYSTEM, touch) + of(touch) + b"\x81",
        "BUILD of a class": stub + mapped(text("__class__"), SYSTEM) + b"b" + of(touch) + b"R",
        "BUILD of __setstate__": stub + mapped(text("__setstate__"), SYSTEM) + b"b" + touch + b"b",
        "BUILD of __dict__": stub + mapped(text("__dict__"), mapped(text("name"), touch)) + b"b",
        "BUILD of slots": stub + of(b"N", mapped(text("_identity"), SYSTEM, text("name"), SYSTEM)) + b"b",
        "BUILD onto a name": SYSTEM + mapped(text("module"), text("builtins")) + b"b" + of(touch) + b"R",
        "BUILD onto an allowed function": v2 + mapped(text("__code__"), SYSTEM) + b"b",
        "BUILD onto a dtype": name("torch", "float32") + mapped(text("_value_"), SYSTEM) + b"b",
        "BUILD onto a tensor": call(v2, storage, *view, b"\x89", b"}") + mapped(text("extents"), SYSTEM) + b"b",
        "BUILD onto a dict": b"}" + mapped(text("get"), SYSTEM) + b"b",
        "items of a name": SYSTEM + touch + b"a",
        "call of a dtype": call(name("torch", "float32"), text("float16")),
        "call of a tensor": call(call(v2, storage, *view, b"\x89", b"}"), touch),
        "call with a list of arguments": name("argparse", "Namespace") + b"]R",
        "a name that is too long": b"ca\n" + b"a" * 1001,
        "chain of calls": SYSTEM + of(touch) + b"R" + (b")R" * 1000),
    }


def small_bombs() -> dict[str, bytes]:
    """Small pickles that ask for memory, time or stack without bound."""
    deep_tuple = b")" + b"\x85" * 200_000
    twice = [(b"h" + bytes([index])) * 2 for index in range(60)]
    last = b"h" + bytes([60])
    doubled_list = b"]\x940" + b"".join(listed(pair) + b"\x940" for pair in twice) + last
    doubled_tuple = b")\x940" + b"".join(pair + b"\x86\x940" for pair in twice) + last
    stub = name("a", "b")
    doubled_stub = stub + b")\x81\x940" + b"".join(stub + of(pair) + b"\x81\x940" for pair in twice) + last
    encode = name("_codecs", "encode")
    return {
        "a deep tuple as a key": b"}" + deep_tuple + b"Ns",
        "a deep tuple in a set": b"\x8f(" + deep_tuple + b"\x90",
        "a deep tuple in a frozenset": b"(" + deep_tuple + b"\x91",
        "a deep tuple in a set that is called": call(name("builtins", "set"), listed(deep_tuple)),
        "a deep tuple as a key that is called": call(name("collections", "OrderedDict"), listed(of(deep_tuple, b"N"))),
        "a doubled tuple as a key": b"}" + doubled_tuple + b"Ns",
        "a wide tuple as a key": b"}(" + b"K\x01" * 100_000 + b"tNs",
        "a stub of a deep tuple as a key": b"}" + call(stub, deep_tuple) + b"Ns",
        "a deep list": b"]" * 100_000 + b"a" * 99_999,
        "a deep dict": b"}" + b"K\x00}" * 100_000 + b"s" * 100_000,
        "a doubled list": doubled_list,
        "a doubled tuple": doubled_tuple,
        "a doubled list in a stub": stub + of(doubled_list) + b"\x81",
        "doubled stubs": doubled_stub,
        "a list that holds itself": b"]\x94h\x00a",
        "a dict that holds itself": b"}\x94K\x00h\x00s",
        "integer keys of one hash": mapped(*(number(index * (2**61 - 1)) + b"N" for index in range(50_000))),
        "many tuple keys": mapped(*(number(index) + b"\x85N" for index in range(50_000))),
        "a memo index": b"Nr\xff\xff\xff\x7f",
        "a memo index that is not there": b"h\x07",
        "a long integer": b"\x8b" + struct.pack("<I", 2**20) + b"\xff" * 2**20,
        "an integer of two gigabytes": b"\x8b\xff\xff\xff\x7f",
        "an integer of a negative length": b"\x8b\xff\xff\xff\xff",
        "a text of four gigabytes": b"X\xff\xff\xff\xff",
        "a text of 2^62 bytes": b"\x8d" + struct.pack("<Q", 2**62),
        "bytes of 2^63 bytes": b"\x8e" + struct.pack("<Q", 2**63),
        "a bytearray of 2^40 bytes": b"\x96" + struct.pack("<Q", 2**40),
        "a frame of 2^63 bytes": b"\x95" + struct.pack("<Q", 2**63) + b"]",
        "a name without an end": b"c" + b"a" * 10_000_000,
        "a computed name of ten megabytes": computed("a" * 10_000_000, "b"),
        "a chain of calls": stub + b")R" * 20_000,
        "a text encoded over and over": text("a" * 10_000_000)
        + b"\x940("
        + b"".join(call(encode, b"h\x00", text("latin1")) for _ in range(1000))
        + b"t",
    }


def large_bombs() -> dict[str, bytes]:
    """Pickles of 20 MB that would take gigabytes."""
    return {
        "empty sets": b"\x8f" * 20_000_000,
        "empty lists": b"]" * 20_000_000,
        "empty dicts": b"}" * 20_000_000,
        "marks": b"(" * 20_000_000,
        "nested tuples": b")" + b"\x85" * 20_000_000,
        "stubs": name("a", "b") + b"\x940" + b"h\x00)\x81" * 5_000_000,
        "tensors": b"("
        + text("storage")
        + name("torch", "FloatStorage")
        + b"\x94"
        + text("0")
        + text("cpu")
        + b"K\x02tQ\x94"
        + name("torch._utils", "_rebuild_tensor_v2")
        + b"\x94"
        + of(b"h\x01", b"K\x00", of(b"K\x02"), of(b"K\x01"), b"N", b"N")
        + b"\x94"
        + b"h\x02h\x03R" * 4_000_000,
        "numbers": b"N" * 20_000_000,
    }


def as_archive(path: Path, pickle_bytes: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickle_bytes)
        archive.writestr("x/data/0", bytes(8))
    return path


def as_stream(path: Path, pickle_bytes: bytes) -> Path:
    path.write_bytes(STREAM_HEADER + pickle_bytes + pickle.dumps([], 2))
    return path


def assert_inert(value: Any) -> None:
    pending, seen = [value], set()
    while pending:
        node = pending.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if type(node) is Stub:
            pending += [node.name, node.args, node.state, node.items]
        elif type(node) in (dict, list, tuple, set, frozenset):
            pending += [*node, *(node.values() if type(node) is dict else ())]
        else:
            kinds = (str, bytes, bytearray, int, float, type(None), Reference, Storage, DType, LazyTensor)
            assert isinstance(node, kinds)


def read(path: Path) -> Any:
    """The inert value of ``path``, or None where it is refused in one line."""
    try:
        value = read_torch_file(path).value
    except CheckpointError as error:
        assert error.message.isprintable() and len(error.message) < 500
        return None
    assert_inert(value)
    return value


STANDARD, OTHER = standard_attacks(), other_attacks()
BOMBS = {"small": small_bombs, "large": large_bombs}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("script.py").write_text(SOURCE)
    Path("evil.pt").write_bytes(EVIL)
    return tmp_path


def in_this_module(code: str, folder: Path) -> str:
    """What ``code`` prints in a process of its own, which has imported this module as ``corpus``."""
    program = f"import sys; sys.path[:0] = {SEARCH_PATH!r}; import {__name__} as corpus; {code}"
    process = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    return process.stdout


def report_real_attacks() -> None:
    for title, body in STANDARD.items():
        try:
            pickle.loads(pickled(body))
        except Exception as error:
            print(title, type(error).__name__, file=sys.stderr)
        canary = Path(CANARY)
        if os.path.lexists(canary):
            print("\nran:", title)
            canary.rmdir() if canary.is_dir() and not canary.is_symlink() else canary.unlink()


def test_the_attacks_are_real(folder: Path) -> None:
    output = in_this_module("corpus.report_real_attacks()", folder)
    ran = {line.removeprefix("ran: ") for line in output.splitlines() if line.startswith("ran: ")}
    assert ran == STANDARD.keys()


@pytest.mark.parametrize("write", [as_archive, as_stream])
@pytest.mark.parametrize("title", [*STANDARD, *OTHER])
def test_an_attack_does_nothing(folder: Path, title: str, write: Callable[[Path, bytes], Path]) -> None:
    body = (STANDARD | OTHER)[title]
    for nested in (body, listed(text("weights"), body), mapped(text("weights"), body), body + b"0N"):
        read(write(Path("x.pt"), pickled(nested)))
        assert sorted(os.listdir()) == ["evil.pt", "script.py", "x.pt"]


@pytest.mark.parametrize(
    ("title", "reason"),
    [
        ("Size of a function", "a torch.Size that is no shape"),
        ("parameter of a function", "a parameter without a tensor"),
        ("rebuild with a function as arguments", "no tuple of arguments"),
        ("call with a list of arguments", "no tuple of arguments"),
        ("codecs.encode with a codec", "encodes text in another way"),
        ("a name that is too long", "by what is not a name"),
        ("persistent id of a function", "a persistent id that is no storage's"),
        ("storage of a class that runs", "2 elements of 'os.system'"),
        ("BUILD onto a name", "sets attributes of a Reference"),
        ("BUILD onto a dtype", "sets attributes of a DType"),
        ("BUILD onto a tensor", "sets attributes of a StoredTensor"),
        ("items of a name", "appends to a Reference"),
        ("call of a tensor", "calls a StoredTensor"),
        ("NEWOBJ of a result", "makes an object of a Stub"),
        ("EXT1", "the opcode b'\\x82'"),
        ("PERSID", "the opcode b'P'"),
    ],
)
def test_what_no_pickler_of_tensors_writes_is_refused(folder: Path, title: str, reason: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(reason)):
        read_torch_file(as_archive(Path("x.pt"), pickled(OTHER[title])))


def test_only_functions_of_torch_rebuild_a_tensor(folder: Path) -> None:
    tensor = OTHER["rebuild with the state of a class"]
    assert isinstance(read(as_archive(Path("x.pt"), pickled(tensor))), LazyTensor)
    other = tensor.replace(b"ctorch._utils\n", b"cevil\n")
    assert isinstance(read(as_archive(Path("x.pt"), pickled(other))), Stub)


def test_what_a_name_means_does_not_depend_on_how_it_begins(folder: Path) -> None:
    for module, qualified in [
        ("torch", "float32.itemsize"),
        ("torch.float32", "x"),
        ("Torch", "Size"),
        ("torch", "size"),
    ]:
        value = read(as_archive(Path("x.pt"), pickled(call(computed(module, qualified), text("a")))))
        assert (value.name, value.args) == (f"{module}.{qualified}", ("a",))


def test_the_readers_own_objects_stay_as_they_are(folder: Path) -> None:
    for title, body in OTHER.items():
        if title.startswith("BUILD"):
            read(as_archive(Path("x.pt"), pickled(body)))
    assert Stub("a", ()).__class__ is Stub and Stub("a", ()).state is None
    assert DType.F32.value == "float32"
    value = read(as_archive(Path("x.pt"), pickled(OTHER["BUILD of __dict__"])))
    assert (value.name, value.args, value.items) == ("argparse.Namespace", (), [])


def report_bombs(size: str) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    for title, body in BOMBS[size]().items():
        for write in (as_archive, as_stream):
            path = write(Path("x.pt"), pickled(body))
            start = time.monotonic()
            value = read(path)
            seconds = time.monotonic() - start
            print(f"{seconds:.2f}", "refused" if value is None else "read", title, sep="\t")
            if value is not None:
                assert value == value and repr(value)


@pytest.mark.parametrize("size", ["small", pytest.param("large", marks=pytest.mark.slow)])
def test_bombs_take_bounded_memory_and_time(folder: Path, size: str) -> None:
    reports = [line.split("\t") for line in in_this_module(f"corpus.report_bombs({size!r})", folder).splitlines()]
    assert {title for _, _, title in reports} == BOMBS[size]().keys()
    assert [title for seconds, _, title in reports if float(seconds) > MAX_SECONDS] == []
    read_titles = {title for _, outcome, title in reports if outcome == "read"}
    assert read_titles == ({"a chain of calls", "doubled stubs", "a frame of 2^63 bytes"} if size == "small" else set())
