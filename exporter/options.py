"""What the user asked of an export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.checkpoints import WeightsChoice
from exporter.hub import Destination, HubAccess
from exporter.tensors import DType

TARGETS = {"bf16": DType.BF16, "fp16": DType.F16, "fp32": DType.F32, "keep": None}


@dataclass(frozen=True, kw_only=True)
class ReleaseOptions:
    """Where and how a release is committed."""

    hf_repo_name: str | None = None
    auth_token: str | None = None
    private: bool = True
    revision: str = "main"
    create_pr: bool = False
    release_tag: str | None = None
    commit_message: str | None = None

    def destination(self, repo_id: str) -> Destination:
        """The repository ``repo_id``, and the way to commit to it.

        Raises:
            UsageError: the options contradict each other, or name what cannot be.
        """
        return Destination(
            repo_id=repo_id,
            revision=self.revision,
            private=self.private,
            create_pr=self.create_pr,
            release_tag=self.release_tag,
            commit_message=self.commit_message,
        )


@dataclass(frozen=True)
class Options(ReleaseOptions):
    """What the user asked for. ``command`` is how the card shows it; ``max_shard_size`` is in bytes."""

    checkpoint: Path
    tag: str | None = None
    trust_remote_code: bool = False
    dtype: str = "bf16"
    weights: WeightsChoice = "auto"
    max_shard_size: int = 5_000_000_000
    allow_nonfinite: bool = False
    prompt_format: str = "auto"
    special_tokens: tuple[str, ...] = ()
    rl_checkpoint: Path | None = None
    reward_model: bool = False
    rope_scaling_type: str | None = None
    rope_scaling_factor: float | None = None
    license: str | None = None
    base_model: str | None = None
    languages: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    card_template: Path | None = None
    training_configs: tuple[Path, ...] = ()
    train_command: str | None = None
    rehearse: bool = False
    no_publish: bool = False
    output_folder: Path | None = None
    keep_adapter: bool = False
    overwrite: bool = False
    dry_run: bool = False
    verify: str = "source"
    jobs: int = 1
    cache_dir: Path | None = None
    command: str = ""

    @property
    def repo_name(self) -> str | None:
        """The repository that the card names; a rehearsal without a name gets one."""
        return "rehearsal/model" if self.rehearse and self.hf_repo_name is None else self.hf_repo_name

    @property
    def access(self) -> HubAccess:
        return HubAccess(token=self.auth_token, cache=self.cache_dir)

    @property
    def rope_kind(self) -> str:
        """As in Open-Assistant's export script, linear where nothing else is said."""
        return self.rope_scaling_type or "linear"

    @property
    def publishes(self) -> bool:
        return self.hf_repo_name is not None and not self.no_publish and not self.rehearse


def content_options(options: Options) -> dict[str, Any]:
    """The options that decide the bytes of the export."""
    return {
        "dtype": options.dtype,
        "weights": options.weights,
        "max_shard_size": options.max_shard_size,
        "prompt_format": Path(options.prompt_format).name,
        "special_tokens": list(options.special_tokens),
        "rl_checkpoint": options.rl_checkpoint.name if options.rl_checkpoint else None,
        "reward_model": options.reward_model,
        "rope_scaling_type": options.rope_kind if options.rope_scaling_factor is not None else None,
        "rope_scaling_factor": options.rope_scaling_factor,
        "hf_repo_name": options.repo_name,
        "trust_remote_code": options.trust_remote_code,
        "allow_nonfinite": options.allow_nonfinite,
        "keep_adapter": options.keep_adapter,
    }
