"""Lightning's checkpoints: one ``*.ckpt`` file, which holds the module's state dict beside the trainer's state.

Where the layout comes from: ``dump_checkpoint`` of Lightning 2.5 (``trainer/connectors/checkpoint_connector.py``), a
file of torch.save. The names of ``state_dict`` begin with the attribute that holds the model. Lightning writes no
config.json: the one of the model that was trained has to lie beside the file. What its DeepSpeed strategy writes is a
folder of DeepSpeed's, with the tag ``checkpoint``.
"""

from __future__ import annotations

from pathlib import Path

from exporter.checkpoints.checkpoint import Checkpoint, refuse_tag
from exporter.checkpoints.torch_file import is_state_dict, read_torch_file
from exporter.errors import CheckpointError


def is_lightning(folder: Path) -> bool:
    """Whether ``folder`` holds checkpoint files of Lightning's."""
    return bool(_files(folder))


def open_lightning(folder: Path, tag: str | None) -> Checkpoint:
    """The weights of the one ``*.ckpt`` file in ``folder``.

    Raises:
        CheckpointError: there are several, or it is damaged, unsafe to read, or not Lightning's.
        UsageError: a tag is asked for, which only a DeepSpeed folder has.
    """
    refuse_tag(tag, folder)
    path, *others = _files(folder)
    if others:
        names = ", ".join(file.name for file in (path, *others))
        raise CheckpointError(
            f"There are {1 + len(others)} checkpoints of Lightning: {names}.",
            "Put the one to export alone into a folder, with config.json and the tokenizer.",
        )
    value = read_torch_file(path).value
    state = value.get("state_dict") if isinstance(value, dict) else None
    if not is_state_dict(state):
        raise CheckpointError(
            f"{path.name} has no state_dict that maps names to tensors, so it is no checkpoint of Lightning's.",
            "Save the weights with save_pretrained, or the state dict alone as pytorch_model.bin.",
        )
    step = value.get("global_step")
    return Checkpoint(format="pretrained", folder=folder, model=state, step=step if type(step) is int else None)


def _files(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.glob("*.ckpt") if not entry.is_dir())
