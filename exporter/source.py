"""Where a checkpoint is: in a folder, or in a model repository on the Hub, which is downloaded into the cache."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from exporter.checkpoints import Checkpoint, open_checkpoint
from exporter.checkpoints.adapter import BASE_HINT, base_name, keep_adapter, merge_adapter
from exporter.checkpoints.folder import read_json
from exporter.checkpoints.pretrained import LAYOUTS, open_pretrained
from exporter.code import imports, named_modules
from exporter.console import Console
from exporter.errors import CheckpointError, IncompleteCheckpointError, RefusedError, UsageError
from exporter.hub import Checkout, HubAccess, ModelId, check_out
from exporter.processor import PROCESSOR_FILES
from exporter.tokenizer import TEMPLATE_FOLDER, TOKENIZER_FILES

_RUN_FOLDER = re.compile(r"checkpoint-\d+")


def find_model(path: Path) -> ModelId | None:
    """The model on the Hub that ``path`` means; None where it is a folder.

    What is there is a folder. ``NAME/checkpoint-N``, and a name beside others that are there, is a folder with a typing
    error, unless it has a revision.

    Raises:
        UsageError: there is no such folder, and it cannot be a model on the Hub.
    """
    if os.path.exists(path):
        return None
    model = ModelId.parse(str(path))
    if model is None or (model.revision is None and (os.path.exists(path.parent) or _RUN_FOLDER.fullmatch(path.name))):
        raise UsageError(
            f"There is no checkpoint {path.name!r}.",
            "Name the folder that was trained, or a model on the Hub: NAMESPACE/NAME@main.",
        )
    return model


def open_model(path: Path, tag: str | None, base_model: str | None, access: HubAccess, console: Console) -> Checkpoint:
    """As :func:`open_source`; an adapter is merged into its base, ``base_model`` or the one that its config names.

    Raises:
        CheckpointError: the base is not there, or a tensor of the adapter matches none of it.
        RefusedError: it is not defined what the merge changes, or it changes nothing.
    """
    opened = open_source(path, tag, access, console)
    if opened.adapter is None:
        return opened
    return merge_adapter(opened, _open_base(base_model or base_name(opened.adapter), access, console))


def open_kept_adapter(
    path: Path, tag: str | None, base_model: str | None, access: HubAccess, console: Console
) -> Checkpoint:
    """The adapter at ``path`` as it is, with its base on the Hub: ``base_model`` or the one that its config names.

    Raises:
        UsageError: there is no adapter at ``path``.
        CheckpointError: a tensor of the adapter matches none of the base, or is not what its config says.
        RefusedError: the base is not named as a model on the Hub, or the adapter changes nothing.
    """
    opened = open_source(path, tag, access, console)
    if opened.adapter is None:
        raise UsageError(f"{path.name} holds a model and no adapter.", "Leave --keep_adapter out.")
    name = base_model or base_name(opened.adapter)
    if os.path.exists(name) or ModelId.parse(name) is None:
        raise RefusedError(
            f"The adapter's base model, {Path(name).name[:100]!r}, is not named as on the Hub: nobody else could load "
            "the adapter.",
            "Name the base model with --base_model NS/NAME, or leave --keep_adapter out to merge the adapter into it.",
        )
    return keep_adapter(opened, _open_base(name, access, console))


def _open_base(name: str, access: HubAccess, console: Console) -> Checkpoint:
    try:
        return open_source(Path(name), None, access, console)
    except (UsageError, IncompleteCheckpointError) as error:
        known = Path(name).name[:100]
        raise CheckpointError(f"The base model {known!r} is not here: {error.message}", BASE_HINT) from error


def open_source(path: Path, tag: str | None, access: HubAccess, console: Console) -> Checkpoint:
    """The checkpoint in the folder ``path``, or of the model on the Hub that it names.

    Raises:
        UsageError: there is neither.
        CheckpointError, RefusedError: as :func:`exporter.checkpoints.open_checkpoint` raises them.
        CredentialError, HubUnreachableError: as the Hub answers.
    """
    model = find_model(path)
    if model is None:
        return open_checkpoint(path, tag)
    checkout = check_out(model, access)
    console.note(f"{model} is commit {checkout.commit}.")
    checkout.fetch(_small_files(checkout))
    checkout.fetch(_weight_files(checkout))
    _fetch_code(checkout)
    # Only these files count: what else the cache has of the repository depends on what this machine did before.
    opened = open_pretrained(checkout.folder, tag)
    return replace(opened, repo_id=checkout.repo_id, revision=checkout.commit)


def _small_files(checkout: Checkout) -> list[str]:
    """The files beside the weights: configs, tokenizer, processor, and the card, whose license still holds."""
    names = {"config.json", "generation_config.json", "README.md", *TOKENIZER_FILES, *PROCESSOR_FILES}
    return sorted(name for name in checkout.files if name in names or name.startswith(f"{TEMPLATE_FOLDER}/"))


def _weight_files(checkout: Checkout) -> Iterator[str]:
    """The weight files that from_pretrained would take, and their index before them."""
    for single, index in LAYOUTS:
        if single in checkout.files:
            yield single
            return
        if index in checkout.files:
            yield index
            yield from sorted(_shards(checkout, index) & checkout.files)
            return
    if "adapter_config.json" in checkout.files:
        raise RefusedError(
            f"{checkout.repo_id} is an adapter without its base model.", "Download it, and name its folder."
        )
    raise CheckpointError(
        f"{checkout.repo_id} has neither model.safetensors nor pytorch_model.bin, whole or in shards.",
        "Name a model repository with such weights.",
    )


def _shards(checkout: Checkout, index: str) -> set[str]:
    weight_map = read_json(checkout.folder / index).get("weight_map")
    return {file for file in weight_map.values() if isinstance(file, str)} if isinstance(weight_map, dict) else set()


def _fetch_code(checkout: Checkout) -> None:
    """The modules that the configs name, and what they import, as far as the repository has them."""
    wanted = [module.file for module in named_modules(checkout.folder)]
    seen: set[str] = set()
    while wanted:
        file = wanted.pop()
        if file in checkout.files and file not in seen:
            seen.add(file)
            checkout.fetch([file])
            wanted += [f"{name}.py" for name in imports(file, (checkout.folder / file).read_bytes())]


@dataclass
class CodeElsewhere:
    """Reads modules of other repositories, each at the commit that its default branch has at the first question.

    ``commits`` are those commits, by repository.
    """

    access: HubAccess
    console: Console
    _checkouts: dict[str, Checkout] = field(default_factory=dict)

    @property
    def commits(self) -> dict[str, str]:
        return {name: checkout.commit for name, checkout in sorted(self._checkouts.items())}

    def __call__(self, repository: str, file: str) -> bytes:
        """The content of the Python file ``file``.

        Raises:
            UsageError: there is no such repository, as far as the token may see.
            RefusedError: the repository has no such file.
        """
        missing = RefusedError(
            f"The code of {repository} needs {file}, which that repository does not have.",
            "Copy the code beside config.json, with the modules that it imports.",
        )
        if repository not in self._checkouts:
            try:
                self._checkouts[repository] = check_out(ModelId(repository), self.access, file)
            except CheckpointError as error:
                raise missing from error
            self.console.note(f"The code of {repository} is published too, as of {self._checkouts[repository].commit}.")
        checkout = self._checkouts[repository]
        if file not in checkout.files:
            raise missing
        checkout.fetch([file])
        return (checkout.folder / file).read_bytes()
