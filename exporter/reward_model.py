"""Reward models: which class gives a text its score, for ``--reward_model``.

As in Open-Assistant's export script (``model/model_training/tools/export_model.py``) it is the one that transformers'
AutoModelForSequenceClassification takes. That script also makes a reward model of a causal one, with a head of random
numbers: here it is refused. Open-Assistant's own class, GPTNeoXRewardModel, is not in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from exporter.errors import RefusedError

_OPEN_ASSISTANT = "GPTNeoXRewardModel"
_AUTO_CLASS = "AutoModelForSequenceClassification"


def as_reward_model(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a reward model, with its class named where config.json leaves it to the model type.

    Raises:
        RefusedError: config.json names a class that scores nothing, or one whose code is not there.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as MAPPING

    usual = _own_class(config) or MAPPING.get(str(config.get("model_type")))
    name = (config.get("architectures") or [usual])[0]
    if name == usual is not None or name in MAPPING.values():
        return {**config, "architectures": [name]}
    if name == _OPEN_ASSISTANT or config.get("model_type") == "gpt_neox_reward_model":
        raise RefusedError(
            f"{_OPEN_ASSISTANT} is Open-Assistant's own class: transformers does not have it, nor has the checkpoint.",
            f"Copy its module beside config.json, name its classes there in auto_map, as AutoConfig and {_AUTO_CLASS}, "
            "and add --trust_remote_code.",
        )
    raise RefusedError(
        f"config.json names the architecture {name}, which is no reward model.",
        f"Leave --reward_model out; or, if the weights have a reward head, name {usual or 'the class of it'} there.",
    )


def _own_class(config: Mapping[str, Any]) -> str | None:
    """The class of the checkpoint's own code that transformers would take."""
    auto_map = config.get("auto_map")
    entry = auto_map.get(_AUTO_CLASS) if isinstance(auto_map, dict) else None
    return entry.rpartition(".")[2] if isinstance(entry, str) else None
