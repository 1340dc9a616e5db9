"""The checkpoint's own code: which modules are published, and from where."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from exporter.code import imports, read_code
from exporter.errors import CheckpointError, RefusedError

HERE = Path(__file__).parent


def folder_of(tmp_path: Path, auto_map: Any, *modules: str, file: str = "config.json", **code: str) -> Path:
    """A folder with a config and modules: empty ones, and those with code."""
    (tmp_path / file).write_text(json.dumps({"auto_map": auto_map}))
    for name, text in {**dict.fromkeys(modules, ""), **code}.items():
        (tmp_path / f"{name}.py").write_text(text)
    return tmp_path


def elsewhere(files: dict[tuple[str, str], str]) -> Any:
    return lambda repository, file: files[repository, file].encode()


def test_modules_are_read_with_what_they_import_and_no_others(tmp_path: Path) -> None:
    auto_map = {"AutoModel": "modeling.Tiny", "AutoTokenizer": ["tokenization.Tiny", None]}
    code = {
        "modeling": "import os\nfrom .layers import (\n  Layer,\n)\n",
        "layers": "def f():\n    from .deep import x\n",
    }
    folder = folder_of(tmp_path, auto_map, "tokenization", "deep", "unrelated", **code)
    assert read_code(folder).keys() == {"modeling.py", "layers.py", "deep.py", "tokenization.py"}
    assert read_code(folder)["layers.py"] == code["layers"].encode()
    (folder / "deep.py").unlink()
    with pytest.raises(RefusedError, match=r"layers\.py imports \.deep, but deep\.py is not beside"):
        read_code(folder)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "processor_config.json", "preprocessor_config.json"])
def test_each_config_that_transformers_reads_may_name_code(file: str, tmp_path: Path) -> None:
    assert read_code(folder_of(tmp_path, {"AutoX": "own.X"}, "own", file=file)).keys() == {"own.py"}


def test_the_code_of_a_processors_part_is_read_too(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("")
    part = {"image_processor": {"auto_map": {"AutoImageProcessor": "own.X"}}}
    (tmp_path / "processor_config.json").write_text(json.dumps(part))
    assert read_code(tmp_path).keys() == {"own.py"}


def test_code_elsewhere_is_taken_only_where_it_may_be(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"AutoModel": "other/repo--modeling.Tiny"})
    with pytest.raises(RefusedError, match="published unseen") as refusal:
        read_code(folder)
    assert "--trust_remote_code" in refusal.value.hint
    there = elsewhere({("other/repo", "modeling.py"): "from .layers import x", ("other/repo", "layers.py"): "y = 1"})
    assert read_code(folder, there) == {"modeling.py": b"from .layers import x", "layers.py": b"y = 1"}


def test_a_module_beside_config_json_goes_before_one_elsewhere(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"AutoModel": "other/repo--modeling.Tiny"}, modeling="mine = 1")
    assert read_code(folder) == {"modeling.py": b"mine = 1"}


def test_a_module_elsewhere_imports_from_beside_itself(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"AutoModel": "other/repo--modeling.Tiny"}, layers="mine = 1")
    there = elsewhere({("other/repo", "modeling.py"): "from .layers import x", ("other/repo", "layers.py"): "x = 1"})
    assert read_code(folder, there)["layers.py"] == b"x = 1"


def test_two_modules_of_one_name_are_refused_unless_they_are_equal(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"AutoModel": "a/b--modeling.Tiny", "AutoConfig": "c/d--modeling.Config"})
    files = {("a/b", "modeling.py"): "x = 1", ("c/d", "modeling.py"): "x = 1"}
    assert read_code(folder, elsewhere(files)) == {"modeling.py": b"x = 1"}
    files["c/d", "modeling.py"] = "x = 2"
    with pytest.raises(RefusedError, match=r"another modeling\.py"):
        read_code(folder, elsewhere(files))


@pytest.mark.parametrize(
    "entry",
    ["../own.X", "own", "own.sub.X", "a/b/c--own.X", "/home/me/run--own.X", "..--own.X", "a--b--own.X", "a b.X", ""],
)
def test_an_entry_that_names_no_module_is_refused(entry: str, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="which is neither"):
        read_code(folder_of(tmp_path, {"AutoModel": entry}, "own"), elsewhere({}))


@pytest.mark.parametrize("text", ["from ..above import x", "from .sub.module import x", "from .. import x"])
def test_a_package_is_refused(text: str) -> None:
    with pytest.raises(RefusedError, match="cannot lie beside"):
        imports("own.py", text.encode())


def test_a_part_of_the_model_with_code_elsewhere_is_refused(tmp_path: Path) -> None:
    for entry, is_refused in (("own.Config", False), ("other/repo--own.Config", True)):
        (tmp_path / "config.json").write_text(json.dumps({"text_config": {"auto_map": {"AutoConfig": entry}}}))
        if is_refused:
            with pytest.raises(RefusedError, match="part of the model"):
                read_code(tmp_path, elsewhere({}))
        else:
            assert read_code(tmp_path) == {}


@pytest.mark.parametrize("content", [b"def", b"x = \0", b"\xff", b"(" * 10_000, b"-" * 200_000 + b"1"])
def test_what_is_not_python_is_a_damaged_checkpoint(content: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"own\.py is not valid Python"):
        imports("own.py", content)


def test_code_is_not_run_and_its_warnings_are_not_shown(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert imports("own.py", b'x = "\\d"\nfrom . import a, b\nraise SystemExit\n') == ["a", "b"]


@pytest.mark.parametrize("value", ["x", 3, ["a"], True])
def test_an_auto_map_that_is_no_object_is_refused(value: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: auto_map"):
        read_code(folder_of(tmp_path, value, file="tokenizer_config.json"))


def test_a_module_that_is_a_link_out_of_the_folder_is_not_read(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder_of(folder, {"AutoModel": "own.X"}) / "own.py").symlink_to(HERE / "conftest.py")
    with pytest.raises(CheckpointError, match="leaves the checkpoint"):
        read_code(folder)


def test_a_module_too_large_to_be_parsed_in_bounded_memory_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"^large\.py has 1048578 bytes, too many for a module\.$"):
        imports("large.py", b"a\n" * (2**19 + 1))


def test_a_module_that_takes_a_minute_to_be_parsed_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"^slow\.py has too many braces for a module\.$"):
        imports("slow.py", b"f'" + b"{a}" * 10_001 + b"'")
