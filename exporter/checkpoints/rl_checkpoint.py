"""What a reinforcement learning run left of a model: a file of its weights alone, for ``--rl_checkpoint``.

The meaning is that of Open-Assistant's export script (``model/model_training/tools/export_model.py``): a file of
torch.save with the state dict under ``module``, as DeepSpeed writes its model states under trlX. The value head of the
training is no part of the model, and the number of embedding rows is the one in the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporter.checkpoints.checkpoint import Checkpoint
from exporter.checkpoints.torch_file import is_state_dict, read_torch_file
from exporter.errors import CheckpointError
from exporter.tensors import LazyTensor

_VALUE_HEAD = re.compile(r"(?:(?:module|model)\.)*v_head\.[02]\.(?:weight|bias)")
"""trlX's value head: two linear layers with an activation between them."""

_EMBEDDING = re.compile(r"embed|(?:^|\.)wte\.")
"""In the name of the input embedding, which comes before others of such a name."""


def with_rl_weights(checkpoint: Checkpoint, path: Path) -> Checkpoint:
    """The checkpoint with the weights of the file ``path``: only config and tokenizer stay its own.

    Raises:
        IncompleteCheckpointError: there is no such file.
        CheckpointError: it is damaged, unsafe to read, or holds no state dict.
    """
    state = _state_dict(path.name, read_torch_file(path.resolve()).value)
    value_head = [name for name in state if _VALUE_HEAD.fullmatch(name)]
    weights = {name: tensor for name, tensor in state.items() if name not in value_head}
    return Checkpoint(
        format="pretrained",
        folder=checkpoint.folder,
        model=weights,
        dropped=dict.fromkeys(value_head, "value head of the reinforcement learning"),
        notes=(f"The weights are those of {path.name}; config and tokenizer are the checkpoint's.",),
        repo_id=checkpoint.repo_id,
        revision=checkpoint.revision,
        base=checkpoint.base,
        config_changes={**checkpoint.config_changes, **_vocabulary_size(weights)},
    )


def _state_dict(file: str, value: Any) -> Mapping[str, LazyTensor]:
    state = value.get("module", value) if isinstance(value, dict) else None
    if not is_state_dict(state):
        raise CheckpointError(
            f"{file} holds no state dict, neither alone nor under the key module.",
            "Name the file that the reinforcement learning wrote, such as mp_rank_00_model_states.pt.",
        )
    return state


def _vocabulary_size(weights: Mapping[str, LazyTensor]) -> dict[str, int]:
    """The change of config.json: as many rows as the embedding has, where its name says which one it is."""
    matrices = (tensor for name, tensor in weights.items() if _EMBEDDING.search(name) and len(tensor.shape) == 2)
    embedding = next(matrices, None)
    return {} if embedding is None else {"vocab_size": embedding.shape[0]}
