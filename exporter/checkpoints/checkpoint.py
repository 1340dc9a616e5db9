"""What opening a checkpoint yields: its weights as lazy tensors, and the facts about where they come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from exporter.errors import CheckpointError, UsageError
from exporter.tensors import LazyTensor

WeightsChoice = Literal["auto", "master", "model"]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, opened: metadata only, no tensor data.

    ``model`` are the model's own weights (for DeepSpeed its 16-bit copy), ``master`` the optimizer's fp32 ones; each
    maps names to lazy tensors and is None where the checkpoint has none. ``aliases`` maps a tied name to the name that
    is stored. ``folder`` holds config.json and the tokenizer. ``undated`` says that the model's own weights lie in
    files that name no step, so that only the master weights can tell whether one is left over from another save.
    ``is_trained_alone`` says that the save holds no frozen parameter: what it lacks was left out of it. ``repo_id`` and
    ``revision`` (a commit) are those of the repository on the Hub that it was downloaded from.

    ``adapter`` is the adapter_config.json of an adapter, whose weights are no model before they are merged into their
    ``base``; ``config_changes`` are what the training changed in the base's config.json. ``dropped`` are names of
    tensors that are no part of the model, each with the reason.
    """

    format: str
    folder: Path
    model: Mapping[str, LazyTensor] | None = None
    master: Mapping[str, LazyTensor] | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    zero_stage: int | None = None
    world_size: int | None = None
    tag: str | None = None
    step: int | None = None
    deepspeed_config: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()
    undated: bool = False
    is_trained_alone: bool = False
    repo_id: str | None = None
    revision: str | None = None
    adapter: Mapping[str, Any] | None = None
    base: Checkpoint | None = None
    config_changes: Mapping[str, Any] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)

    @property
    def config_folder(self) -> Path:
        """Where config.json, generation_config.json and the model's own code are."""
        return self.base.folder if self.base else self.folder

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer is: an adapter that was saved without one uses that of its base."""
        has_own = any((self.folder / name).exists() for name in ("tokenizer_config.json", "tokenizer.json"))
        return self.folder if has_own else self.config_folder

    @property
    def hub_name(self) -> str | None:
        """NS/NAME@commit, where it comes from the Hub."""
        return f"{self.repo_id}@{self.revision}" if self.repo_id else None

    def choose(self, weights: WeightsChoice, is_exact: Callable[[], bool]) -> Literal["master", "model"]:
        """Which of the two sets of weights an export reads.

        auto means the model's own copy where it ``is_exact``, so that each tensor of it already has the dtype that will
        be written, or where it is all there is; else the master weights, which are compared with the copy.

        Raises:
            CheckpointError: the chosen weights are not in the checkpoint.
        """
        if weights == "auto":
            # ZeRO-3 gathers its copy into another file, which may be left over from another save: the masters decide.
            is_dated = bool(self.model) and self.zero_stage != 3 and not self.undated
            return "model" if self.master is None or (is_dated and is_exact()) else "master"
        if getattr(self, weights) is None:
            raise CheckpointError(
                f"The checkpoint has no {_DESCRIPTIONS[weights]}.", "Leave --weights out to take what is there."
            )
        return weights

    def renamed(self, names: Mapping[str, str]) -> Checkpoint:
        """The same weights under other names: ``names`` has the new one of each."""
        model, master = (
            None if tensors is None else {names[name]: tensor for name, tensor in tensors.items()}
            for tensors in (self.model, self.master)
        )
        return replace(self, model=model, master=master)

    def weights(self, chosen: Literal["master", "model"]) -> Mapping[str, LazyTensor]:
        """The tensors of one of the two sets, by name."""
        tensors = self.master if chosen == "master" else self.model
        assert tensors is not None
        return tensors


def refuse_tag(tag: str | None, folder: Path) -> None:
    """Only a DeepSpeed folder has tags.

    Raises:
        UsageError: one is asked for of another ``folder``.
    """
    if tag is not None:
        raise UsageError(f"There is no tag {tag!r}: {folder.name} is no DeepSpeed folder.", "Leave --tag out.")


_DESCRIPTIONS = {"master": "fp32 master weights", "model": "copy of the model's own weights"}
