"""Sizes are exact and true bounds before a byte is written."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.errors import UsageError
from exporter.plan import ExportPlan, parse_size, plan_export
from exporter.tensors import DType, StoredTensor


def plan(sizes: dict[str, tuple[DType, tuple[int, ...]]], limit: int) -> ExportPlan:
    tensors = {name: StoredTensor(shape, DType.F32, ()) for name, (_, shape) in sizes.items()}
    return plan_export(tensors, {name: dtype for name, (dtype, _) in sizes.items()}, limit)


shapes = st.lists(st.integers(0, 40), max_size=3).map(tuple)
names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30).filter(lambda name: name != "__metadata__")


@given(
    st.dictionaries(names, st.tuples(st.sampled_from(list(DType)), shapes), min_size=1, max_size=30),
    st.integers(1, 20_000),
)
def test_no_shard_is_larger_than_the_limit_unless_one_tensor_is(
    sizes: dict[str, tuple[DType, tuple[int, ...]]], limit: int
) -> None:
    made = plan(sizes, limit)
    for shard in made.shards:
        assert shard.size <= limit or len(shard.tensors) == 1
        length = int.from_bytes(shard.header[:8], "little")
        entries = json.loads(shard.header[8:])
        assert length == len(shard.header) - 8
        assert length % 8 == 0
        assert shard.size == 8 + length + max(
            entry["data_offsets"][1] for entry in entries.values() if "dtype" in entry
        )
    too_large = [shard for shard in made.shards if shard.size > limit]
    assert len(made.notes) >= len(too_large)
    assert sorted(tensor.name for tensor in made.tensors) == sorted(sizes)
    assert made.total_size == sum(tensor.nbytes for tensor in made.tensors)
    if made.index is not None:
        index = json.loads(made.index)
        assert index["metadata"]["total_size"] == made.total_size
        assert index["weight_map"] == {tensor.name: shard.name for shard in made.shards for tensor in shard.tensors}


def test_one_shard_has_the_plain_name_and_no_index() -> None:
    made = plan({"a": (DType.F32, (4,)), "b": (DType.BF16, (4,))}, 1000)
    assert [shard.name for shard in made.shards] == ["model.safetensors"]
    assert made.index is None


def test_shards_are_filled_before_another_is_begun() -> None:
    made = plan({str(number): (DType.BF16, (100,)) for number in range(10)}, 1000)
    assert [len(shard.tensors) for shard in made.shards] == [3, 3, 3, 1]
    assert made.shards[0].name == "model-00001-of-00004.safetensors"


def test_a_tensor_larger_than_the_limit_is_alone_and_noted() -> None:
    made = plan({"a": (DType.F32, (4,)), "big": (DType.F32, (1000,)), "c": (DType.F32, (4,))}, 1000)
    assert [[tensor.name for tensor in shard.tensors] for shard in made.shards] == [["a"], ["big"], ["c"]]
    assert [note.split()[0] for note in made.notes] == ["big"]


def test_names_count_by_their_bytes() -> None:
    made = plan({"é" * 100 + str(number): (DType.BF16, (1,)) for number in range(20)}, 1000)
    assert all(shard.size <= 1000 for shard in made.shards)


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GB", 2 * 10**9), ("1.5 GiB", 3 * 2**29), ("500mb", 5 * 10**8), ("7", 7), ("10 B", 10), ("3KiB", 3072)],
)
def test_a_size_is_in_powers_of_1000_or_1024(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "two GB", "1XB", "nan", "inf", "1GBB", "0.1"])
def test_what_is_no_positive_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_size(text)
