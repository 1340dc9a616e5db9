"""DeepSpeed pipeline folders: a file for each layer, whose tensors have their names within the layer.

Where the layout comes from: DeepSpeed 0.19.8 (``deepspeed/runtime/pipe/module.py``: ``ckpt_layer_path``,
``save_state_dict``), checked against the weights of live pipelines. Each stage is a model-parallel rank: its optimizer
shards hold the fp32 masters of its layers. What a layer is called in the model is nowhere in the checkpoint: a tensor
is named ``<layer>.<name within it>`` here, and :func:`exporter.architecture.name_layers` finds its name in the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from exporter.checkpoints.checkpoint import Checkpoint
from exporter.checkpoints.torch_file import is_state_dict
from exporter.checkpoints.zero import SAVE_AGAIN, Slice, choose_tag, has_file, read_slices, read_state_file
from exporter.errors import CheckpointError, IncompleteCheckpointError, RefusedError
from exporter.tensors import LazyTensor

_LAYER = re.compile(r"layer_(?P<layer>\d+)-(?P<cut>.*)model_states\.pt")
_TIED = re.compile(r"tied_modules\.[^.]+\.(?P<name>.+)")


def is_pipeline(folder: Path) -> bool:
    """Whether a tag in ``folder`` has files of a pipeline's layers."""
    return has_file(folder, _LAYER)


def open_pipeline(folder: Path, tag: str | None) -> Checkpoint:
    """The weights of ``tag``, named ``<layer>.<name within it>``.

    Raises:
        CheckpointError: a file is missing, damaged, from another rank, step or run, or unsafe to read.
        RefusedError: the layers are cut by tensor parallelism.
        UsageError: there is no such tag.
    """
    name, notes = choose_tag(folder, tag)
    slices = read_slices(folder, name)
    model = _read_layers(folder / name)
    master = _master_weights(slices, model)
    if master is None:
        notes = (
            *notes,
            "The layers have no named fp32 master weights: their own copy is all there is, without a step.",
        )
    checkpoint = slices[0].checkpoint("pipeline", model, master)
    return replace(
        checkpoint,
        world_size=(checkpoint.world_size or 1) * len(slices),
        aliases={},
        notes=notes,
        undated=True,
        is_trained_alone=False,
    )


def _read_layers(folder: Path) -> dict[str, LazyTensor]:
    """The tensors of all layers, in the layers' order; layers that are mere functions have no file."""
    layers: dict[int, Path] = {}
    for path in folder.iterdir():
        match = _LAYER.fullmatch(path.name)
        if match is None:
            continue
        if match["cut"]:
            raise RefusedError(
                f"{path.name} is a slice of a layer: the pipeline's layers are cut by tensor parallelism, and nothing "
                "in the checkpoint says how.",
                SAVE_AGAIN,
            )
        if layers.setdefault(int(match["layer"]), path) != path:
            raise CheckpointError(
                f"{path.name} and {layers[int(match['layer'])].name} are both of layer {int(match['layer'])}.",
                "Remove the one that is left over.",
            )
    if not layers:
        raise IncompleteCheckpointError(
            f"{folder.name} has no layer_*-model_states.pt.", "Copy the files of all layers."
        )
    return {
        f"{layer}.{name}": tensor for layer in sorted(layers) for name, tensor in _read_layer(layers[layer]).items()
    }


def _read_layer(path: Path) -> Mapping[str, LazyTensor]:
    state = read_state_file(path)
    if not is_state_dict(state.value):
        raise CheckpointError(f"{state.name} is not a mapping from names to tensors.", "Copy the file again.")
    return state.value


def _master_weights(slices: Sequence[Slice], model: Mapping[str, LazyTensor]) -> dict[str, LazyTensor] | None:
    """The stages' fp32 masters by layer; the layers' own tensors where there is none (buffers, frozen parameters).

    None where a stage has no masters, or does not name them (DeepSpeed's stage 0), or has some of no layer.
    """
    masters: dict[str, LazyTensor] = {}
    for part in slices:
        if not part.shards or not part.states[0].value.get("param_shapes"):
            return None
        masters |= part.master() or {}
    layers = {name.partition(".")[0] for name in masters.keys() & model.keys()}
    named: dict[str, LazyTensor] = {}
    for name, tensor in masters.items():
        targets = [name] if name in model else _tied_layers(name, tensor, model, layers)
        if not targets:
            return None
        named |= dict.fromkeys(targets, tensor)
    return {**model, **named}


def _tied_layers(name: str, tensor: LazyTensor, model: Mapping[str, LazyTensor], others: set[str]) -> list[str]:
    """The names under which layers without masters of their own hold a tensor of a module that they share.

    Such a module is called by its key and not by a layer. Whether it is the right one shows when the masters are
    compared with the layers' copy.
    """
    match = _TIED.fullmatch(name)
    within = match["name"] if match else None
    return [
        place
        for place, found in model.items()
        for layer, _, own in [place.partition(".")]
        if layer not in others and own == within and found.shape == tensor.shape
    ]
