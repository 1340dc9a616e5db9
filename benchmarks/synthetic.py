"""Checkpoints of any size, laid out as DeepSpeed and transformers write them.

The pickles are those of real checkpoints (``tests/checkpoints``) with other names, shapes and tensors in them. torch
writes them with holes in the place of the elements. The holes of weights are then filled with random numbers and given
their CRC-32; those of Adam's moments, which nobody reads who exports, stay holes and take no disk.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import shutil
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

REAL = Path(__file__).parents[1] / "tests" / "checkpoints"
TAG = "global_step4"
BLOCK = 2**22
"""Elements that are made at once."""


@dataclass(frozen=True)
class Model:
    """A Llama; ``hidden``, ``intermediate`` and ``vocabulary`` are sizes of dimensions."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int = 32_000

    @property
    def config(self) -> dict[str, Any]:
        """config.json: that of a real checkpoint, with these sizes and heads of 64."""
        config: dict[str, Any] = json.loads((REAL / "llama-zero2" / "checkpoint" / "config.json").read_text())
        heads = max(self.hidden // 64, 1)
        return config | {
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "head_dim": self.hidden // heads,
            "vocab_size": self.vocabulary,
        }

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The parameters in the model's order."""
        hidden, intermediate = self.hidden, self.intermediate
        layer: dict[str, tuple[int, ...]] = {
            **{f"self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"},
            "mlp.gate_proj.weight": (intermediate, hidden),
            "mlp.up_proj.weight": (intermediate, hidden),
            "mlp.down_proj.weight": (hidden, intermediate),
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
        }
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, hidden)}
        for number in range(self.layers):
            shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
        shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (self.vocabulary, hidden)}
        return {name: torch.Size(shape) for name, shape in shapes.items()}

    @property
    def groups(self) -> list[dict[str, torch.Size]]:
        """The optimizer's parameter groups: with weight decay, and without."""
        shapes = self.shapes.items()
        return [{name: shape for name, shape in shapes if (len(shape) > 1) is decay} for decay in (True, False)]

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(shape.numel() for shape in self.shapes.values())


SIZES = {"0.2B": Model(1024, 2816, 12), "0.8B": Model(1536, 4096, 24), "3B": Model(2560, 6912, 36)}


def write_pretrained(folder: Path, model: Model) -> None:
    """An fp32 folder with one ``model.safetensors``, as ``save_pretrained`` writes it."""
    _write_beside("llama-safetensors", folder, model)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in model.shapes.items():
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + 4 * shape.numel()]}
        end += 4 * shape.numel()
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for start in range(0, end // 4, BLOCK):
            file.write(_random(min(BLOCK, end // 4 - start)).numpy())


def write_zero2(folder: Path, model: Model, ranks: int = 2) -> None:
    """ZeRO-2: each group's parameters joined and cut into ``ranks`` partitions; a bf16 copy in the model states."""
    states, shards = _write_zero2_files(folder, model, ranks)
    opened = [_open(path)["optimizer_state_dict"]["single_partition_of_fp32_groups"] for path in shards]
    module = _open(states)["module"]
    for index, group in enumerate(model.groups):
        first = module[next(iter(group))]
        copy = first.new_empty(0).set_(first.untyped_storage())
        for partitions, part in zip(opened, copy.chunk(ranks), strict=True):
            _randomize(partitions[index])
            part.copy_(partitions[index])
    for path in (states, *shards):
        _add_checksums(path)


def write_zero3(folder: Path, model: Model, ranks: int = 2) -> None:
    """ZeRO-3: each parameter cut into ``ranks`` pieces, the pieces of a rank joined; no 16-bit copy."""
    for path in write_zero3_files(folder, model, ranks):
        for vector in _open(path)["optimizer_state_dict"]["fp32_flat_groups"]:
            _randomize(vector)
        _add_checksums(path)


def _write_zero2_files(folder: Path, model: Model, ranks: int) -> tuple[Path, list[Path]]:
    """The model states and the ranks' shards, with holes."""
    real = _write_beside("llama-zero2", folder, model)
    state = torch.load(real / "mp_rank_00_model_states.pt", weights_only=False)
    shard = torch.load(real / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", weights_only=False)
    sizes = [_rounded(sum(shape.numel() for shape in group.values()), 2 * ranks) for group in model.groups]
    optimizer = shard["optimizer_state_dict"]
    optimizer["group_paddings"] = [0 for _ in sizes]
    optimizer["partition_count"] = [ranks for _ in sizes]
    optimizer["param_alignment_paddings"] = [[0 for _ in group] for group in model.groups]
    with FakeTensorMode():
        copies = [torch.empty(size, dtype=torch.bfloat16) for size in sizes]
        _describe(state, model, ranks)
        views = {
            name: view for group, copy in zip(model.groups, copies, strict=True) for name, view in _views(group, copy)
        }
        state["module"] = OrderedDict((name, views[name]) for name in model.shapes)
        states = _save(state, folder / TAG / "mp_rank_00_model_states.pt")
        shards = []
        for rank in range(ranks):
            optimizer["single_partition_of_fp32_groups"] = [torch.empty(size // ranks) for size in sizes]
            optimizer["base_optimizer_state"]["state"] = _moments(size // ranks for size in sizes)
            shards.append(_save(shard, folder / TAG / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"))
    return states, shards


def write_zero3_files(folder: Path, model: Model, ranks: int) -> list[Path]:
    """A ZeRO-3 checkpoint with holes for all elements: of any size on any disk. Returns the ranks' shards."""
    real = _write_beside("llama-zero3", folder, model)
    state = torch.load(real / "zero_pp_rank_0_mp_rank_00_model_states.pt", weights_only=False)
    shard = torch.load(real / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", weights_only=False)
    sizes = [sum(math.ceil(shape.numel() / ranks) for shape in group.values()) for group in model.groups]
    optimizer = shard["optimizer_state_dict"]
    optimizer["partition_count"] = ranks
    shards = []
    with FakeTensorMode():
        _describe(state, model, ranks)
        state["module"] = OrderedDict((name, torch.empty(0, dtype=torch.bfloat16)) for name in model.shapes)
        for rank in range(ranks):
            _save(state, folder / TAG / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
            optimizer["fp32_flat_groups"] = [torch.empty(size) for size in sizes]
            optimizer["optimizer_state_dict"]["state"] = _moments(sizes)
            shards.append(_save(shard, folder / TAG / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"))
    return shards


def _write_beside(real: str, folder: Path, model: Model) -> Path:
    """Everything but the weights; returns the tag's folder of the ``real`` checkpoint."""
    checkpoint = REAL / real / "checkpoint"
    (folder / TAG if (checkpoint / TAG).exists() else folder).mkdir(parents=True)
    for path in checkpoint.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            shutil.copy(path, folder)
    (folder / "config.json").write_text(json.dumps(model.config, indent=2))
    return checkpoint / TAG


def _describe(state: dict[str, Any], model: Model, ranks: int) -> None:
    state["param_shapes"] = [OrderedDict(group) for group in model.groups]
    state["dp_world_size"] = ranks


def _views(group: Mapping[str, torch.Size], vector: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    position = 0
    for name, shape in group.items():
        yield name, vector[position : position + shape.numel()].view(shape)
        position += shape.numel()


def _moments(sizes: Iterable[int]) -> dict[int, dict[str, torch.Tensor]]:
    """Adam's state of each group."""
    return {
        index: {"step": torch.empty(()), "exp_avg": torch.empty(size), "exp_avg_sq": torch.empty(size)}
        for index, size in enumerate(sizes)
    }


def _rounded(numel: int, multiple: int) -> int:
    return -(-numel // multiple) * multiple


def _save(value: Any, path: Path) -> Path:
    """torch.save without the elements of tensors."""
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(value, path)
    return path


def _open(path: Path) -> Any:
    """What ``path`` holds; what is written into its tensors goes into the file."""
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        return torch.load(path, mmap=True, weights_only=False)


def _randomize(vector: torch.Tensor) -> None:
    for block in vector.split(BLOCK):
        block.copy_(_random(block.numel()))


def _random(numel: int) -> torch.Tensor:
    return torch.empty(numel).normal_(std=0.02)


def _add_checksums(path: Path) -> None:
    """Note the CRC-32 of every storage that is no hole in the archive's directory, as torch.save does."""
    with zipfile.ZipFile(path) as archive:
        members, directory = archive.infolist(), archive.start_dir
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as content:
        entry = directory
        for member in members:
            start = member.header_offset + 30 + sum(struct.unpack_from("<2H", content, member.header_offset + 26))
            stop = start + member.file_size
            if "/data/" in member.filename and member.file_size and _has_data(file.fileno(), start, stop):
                crc = 0
                for position in range(start, stop, 4 * BLOCK):
                    crc = zlib.crc32(content[position : min(position + 4 * BLOCK, stop)], crc)
                struct.pack_into("<I", content, entry + 16, crc)
            entry += 46 + sum(struct.unpack_from("<3H", content, entry + 28))


def _has_data(descriptor: int, start: int, stop: int) -> bool:
    """Whether the bytes are something else than a hole, whose borders are those of pages."""
    try:
        return os.lseek(descriptor, start, os.SEEK_DATA) + mmap.PAGESIZE < stop
    except OSError:
        return False
