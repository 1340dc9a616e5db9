"""DeepSpeed folders: damaged ones are refused by name, unusual ones read as what the live engine held.

Every case is a copy of a checkpoint that DeepSpeed wrote, changed in one place.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from exporter.checkpoints import Checkpoint, open_checkpoint, zero
from exporter.checkpoints.copies import is_constant
from exporter.checkpoints.unpickler import Unpickler
from exporter.errors import CheckpointError, ExportError, IncompleteCheckpointError, UsageError
from exporter.tensors import DType, Extent, LazyTensor, SourceFiles
from tests.conftest import Case

ZERO2, ZERO3 = Case("llama-zero2"), Case("llama-zero3")
FROZEN2, FROZEN3 = Case("llama-frozen-zero2"), Case("llama-frozen-zero3")
TIED2 = Case("llama-tied-zero2")
STEP = "global_step4"
MODEL = "mp_rank_00_model_states.pt"
GROUPS = {2: "single_partition_of_fp32_groups", 3: "fp32_flat_groups"}


class Plain:
    """Stands for any class of DeepSpeed, which the tests can do without."""

    def __init__(self, *args: Any) -> None:
        self.args = args


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name == "ZeroStageEnum":
            return int
        return Plain if module.startswith("deepspeed") else super().find_class(module, name)


_pickle_module = SimpleNamespace(
    __name__="pickle", Unpickler=_Unpickler, load=lambda file, **_: _Unpickler(file).load()
)


def load(path: Path) -> Any:
    return torch.load(path, weights_only=False, pickle_module=_pickle_module)


def edit(path: Path, change: Callable[[dict[str, Any]], None], name: str | None = None) -> None:
    """Change what the file holds and save it as the same file, or as one that was called ``name``."""
    state = load(path)
    change(state)
    saved = path.with_name(name or path.name)
    torch.save(state, saved)
    saved.replace(path)


def set_model(**values: Any) -> Callable[[Path], None]:
    """Give the model states of every rank these values."""

    def change(tag: Path) -> None:
        for path in tag.glob("*model_states.pt"):
            edit(path, lambda state: state.update(values))

    return change


def set_shard(rank: int, **values: Any) -> Callable[[Path], None]:
    """Give the optimizer state of one rank these values."""
    return lambda tag: edit(shard(tag, rank), lambda state: state["optimizer_state_dict"].update(values))


def drop(*keys: str) -> Callable[[Path], None]:
    """Take these keys out of every file, as older DeepSpeeds have it."""

    def forget(state: dict[str, Any]) -> None:
        for mapping in (state, state.get("optimizer_state_dict", {})):
            for key in keys:
                mapping.pop(key, None)

    def change(tag: Path) -> None:
        for path in tag.glob("*_states.pt"):
            edit(path, forget)

    return change


def shard(tag: Path, rank: int) -> Path:
    return tag / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def damaged(case: Case, place: Path, *damages: Callable[[Path], Any]) -> Path:
    checkpoint = case.copy(place)
    for damage in damages:
        damage(checkpoint / STEP)
    return checkpoint


def read(tensor: LazyTensor) -> torch.Tensor:
    with SourceFiles() as files:
        blocks = [block.clone() for block in tensor.blocks(files)]
    return torch.cat(blocks).reshape(tensor.shape) if blocks else torch.empty(tensor.shape)


def assert_master_is_true(checkpoint: Checkpoint, case: Case) -> None:
    master = checkpoint.weights("master")
    for name, value in case.truth.items():
        if name not in checkpoint.aliases:
            assert torch.equal(read(master[name]), value), name


def swap(first: Path, second: Path) -> None:
    spare = first.with_name("spare")
    first.rename(spare)
    second.rename(first)
    spare.rename(second)


def save_again(path: Path) -> None:
    """The same content in an archive that is named after the file, as a script that loads and saves leaves it."""
    edit(path, lambda state: None)


def one_step_later(state: dict[str, Any]) -> None:
    for entry in state["optimizer_state_dict"]["base_optimizer_state"]["state"].values():
        entry["step"] += 1


def one_step_later_in_the_groups(state: dict[str, Any]) -> None:
    base = state["optimizer_state_dict"]["base_optimizer_state"]
    base["state"] = {}
    base["param_groups"][0]["step"] = 5


def reverse_shapes(state: dict[str, Any]) -> None:
    state["param_shapes"] = [dict(reversed(group.items())) for group in state["param_shapes"]]


def lose_a_parameter(state: dict[str, Any]) -> None:
    state["param_shapes"][0].popitem()


REFUSED: list[tuple[str, Case, list[Callable[[Path], Any]], str]] = [
    ("a missing rank", ZERO2, [lambda tag: shard(tag, 0).unlink()], "bf16_zero_pp_rank_0_mp_rank_00_optim.* missing"),
    ("the last rank missing", ZERO2, [lambda tag: shard(tag, 1).unlink()], "one of 2 partitions, but 1 files"),
    ("the last rank missing", ZERO3, [lambda tag: shard(tag, 1).unlink()], "one of 2 partitions, but 1 files"),
    (
        "a rank's model states missing",
        ZERO3,
        [lambda tag: (tag / f"zero_pp_rank_1_{MODEL}").unlink()],
        "1 ranks' model",
    ),
    (
        "all model states missing",
        ZERO2,
        [lambda tag: (tag / MODEL).unlink()],
        "no folder of that name with model states",
    ),
    (
        "a rank that is numbered far away",
        ZERO3,
        [lambda tag: shutil.copy(shard(tag, 1), shard(tag, 10**15))],
        "missing",
    ),
    ("a rank copied over another", ZERO2, [lambda tag: shutil.copy(shard(tag, 0), shard(tag, 1))], "was saved as"),
    (
        "a rank copied over another and saved again",
        ZERO2,
        [lambda tag: shutil.copy(shard(tag, 0), shard(tag, 1)), lambda tag: save_again(shard(tag, 1))],
        "rank_1_.* holds the same partitions as .*rank_0_",
    ),
    (
        "a rank copied over another and saved again",
        ZERO3,
        [lambda tag: shutil.copy(shard(tag, 1), shard(tag, 0)), lambda tag: save_again(shard(tag, 0))],
        "rank_1_.* holds the same partitions as .*rank_0_",
    ),
    ("swapped ranks", ZERO3, [lambda tag: swap(shard(tag, 0), shard(tag, 1))], "rank_0_.* was saved as .*rank_1_"),
    ("a rank of the next step", ZERO2, [lambda tag: edit(shard(tag, 1), one_step_later)], "step 5.*step 4"),
    (
        "a rank of the next step, counted by FusedAdam",
        ZERO2,
        [
            lambda tag: edit(shard(tag, 1), one_step_later_in_the_groups),
            lambda tag: edit(
                shard(tag, 0),
                lambda s: s["optimizer_state_dict"]["base_optimizer_state"]["param_groups"][0].update(step=4),
            ),
            lambda tag: edit(
                shard(tag, 0), lambda s: s["optimizer_state_dict"]["base_optimizer_state"].update(state={})
            ),
        ],
        "step 5.*step 4",
    ),
    (
        "model states of another step",
        ZERO3,
        [lambda tag: edit(tag / f"zero_pp_rank_1_{MODEL}", lambda s: s.update(global_steps=5))],
        "global_steps 5",
    ),
    (
        "model states with parameters in another order",
        ZERO3,
        [lambda tag: edit(tag / f"zero_pp_rank_1_{MODEL}", reverse_shapes)],
        "param_shapes",
    ),
    (
        "an extra rank of a larger world",
        ZERO2,
        [lambda tag: shutil.copy(shard(tag, 1), shard(tag, 2)), lambda tag: save_again(shard(tag, 2))],
        "one of 2 partitions, but 3 files",
    ),
    (
        "a rank under two names",
        ZERO2,
        [lambda tag: shutil.copy(shard(tag, 1), tag / shard(tag, 1).name.removeprefix("bf16_"))],
        "are both of rank 1",
    ),
    ("shapes without a parameter", ZERO2, [lambda tag: edit(tag / MODEL, lose_a_parameter)], "one number for each"),
    (
        "shapes without a parameter",
        ZERO3,
        [lambda tag: [edit(path, lose_a_parameter) for path in tag.glob("*model_states.pt")]],
        "hold .* elements",
    ),
    ("shapes of a thousand dimensions", ZERO2, [set_model(param_shapes=[{"a": (2,) * 1000}])], "names to shapes"),
    ("shapes that are none", ZERO2, [set_model(param_shapes=[{"a": "b"}])], "names to shapes"),
    ("ties that are none", ZERO2, [set_model(shared_params=[1, 2])], "shared_params"),
    ("buffer names that are none", ZERO3, [set_model(buffer_names=[{}])], "buffer_names"),
    ("a module of other things", ZERO2, [set_model(module={"weight": 1})], "module is not a mapping"),
    ("a name of two lines", ZERO2, [set_model(module={"a\nb": torch.ones(1)})], "module is not a mapping"),
    ("a partition count of text", ZERO2, [set_shard(0, partition_count="2")], "partition_count"),
    ("a partition count of nothing", ZERO3, [set_shard(0, partition_count=[None])], "partition_count"),
    ("a stage of text", ZERO2, [set_shard(0, zero_stage="two")], "zero_stage"),
    ("paddings for other parameters", ZERO2, [set_shard(0, param_alignment_paddings=[[0], [0]])], "paddings"),
    ("negative paddings", ZERO2, [set_shard(0, param_alignment_paddings=[[-1] * 16, [0] * 5])], "paddings"),
    (
        "paddings of one rank alone",
        ZERO2,
        [set_shard(1, param_alignment_paddings=[[0] * 15 + [1], [0] * 5])],
        "paddings",
    ),
    (
        "partitions of integers",
        ZERO2,
        [
            set_shard(rank, single_partition_of_fp32_groups=[torch.arange(n) + rank for n in (6992, 40)])
            for rank in (0, 1)
        ],
        "floating-point",
    ),
    (
        "partitions of two types",
        ZERO3,
        [set_shard(1, fp32_flat_groups=[torch.randn(n).half() for n in (6992, 40)])],
        "rank_1_.* holds float16 partitions, .*rank_0_.* float32",
    ),
    (
        "another number of parameter groups",
        ZERO2,
        [set_shard(1, single_partition_of_fp32_groups=[torch.ones(9)])],
        "groups",
    ),
    (
        "no partitions",
        ZERO3,
        [lambda tag: edit(shard(tag, 0), lambda s: s["optimizer_state_dict"].pop(GROUPS[3]))],
        "vectors",
    ),
    ("no optimizer state", ZERO2, [lambda tag: edit(shard(tag, 0), lambda s: s.clear())], "optimizer_state_dict"),
    ("a list for a state", ZERO2, [lambda tag: torch.save([1], tag / MODEL)], "does not hold a mapping"),
    ("frozen parameters left out of the save", FROZEN3, [set_model(frozen_param_fragments={})], "frozen parameter"),
    (
        "a frozen parameter cut short",
        FROZEN3,
        [
            lambda tag: edit(
                tag / f"zero_pp_rank_1_{MODEL}",
                lambda s: s["frozen_param_fragments"].update(
                    {name: piece[:-3] for name, piece in s["frozen_param_fragments"].items()}
                ),
            )
        ],
        "do not make up its shape",
    ),
    (
        "a shard that is a pipe",
        ZERO2,
        [lambda tag: shard(tag, 1).unlink(), lambda tag: os.mkfifo(shard(tag, 1))],
        "regular",
    ),
    (
        "a shard that is a link out of the folder",
        ZERO2,
        [
            lambda tag: shutil.move(shard(tag, 1), tag.parent.parent / "away.pt"),
            lambda tag: shard(tag, 1).symlink_to(tag.parent.parent / "away.pt"),
        ],
        "symbolic link",
    ),
    ("an empty shard", ZERO3, [lambda tag: shard(tag, 1).write_bytes(b"")], "rank_1_mp_rank_00_optim_states.pt is"),
    (
        "a shard that is still being written",
        ZERO3,
        [lambda tag: shard(tag, 1).write_bytes(shard(tag, 1).read_bytes()[:-1000])],
        "rank_1_mp_rank_00_optim_states.pt is damaged",
    ),
]


@pytest.mark.parametrize(
    ("case", "damages", "reason"), [row[1:] for row in REFUSED], ids=[f"{row[0]}-{row[1].name}" for row in REFUSED]
)
def test_a_damaged_folder_is_refused_in_one_line(
    case: Case, damages: list[Callable[[Path], Any]], reason: str, tmp_path: Path
) -> None:
    checkpoint = damaged(case, tmp_path, *damages)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(checkpoint)
    assert re.search(reason, caught.value.message), caught.value.message
    assert "\n" not in caught.value.message + caught.value.hint
    assert str(tmp_path) not in caught.value.message
    assert caught.value.exit_code == 3


def old_layout(*damages: Callable[[Path], Any]) -> list[Callable[[Path], Any]]:
    return [drop("param_alignment_paddings", "ds_version", "param_slice_mappings", "group_paddings"), *damages]


HEALTHY: list[tuple[str, Case, list[Callable[[Path], Any]]]] = [
    ("no keys of newer versions", ZERO2, old_layout(drop("frozen_param_shapes", "frozen_param_fragments"))),
    ("no keys of newer versions", ZERO3, old_layout(drop("frozen_param_shapes", "frozen_param_fragments"))),
    (
        "frozen parameters in the module alone, as stage 1 has them",
        FROZEN2,
        [drop("frozen_param_shapes", "frozen_param_fragments")],
    ),
    ("tied names in the module alone", TIED2, [drop("shared_params")]),
    ("no partition count", ZERO2, [drop("partition_count")]),
    ("one partition count for all groups", ZERO2, [set_shard(rank, partition_count=2) for rank in (0, 1)]),
    (
        "a script's own objects",
        ZERO2,
        [set_model(args=Plain(), scores=complex(1, 2), path=Path("a"), global_steps="4")],
    ),
    (
        "shapes in one mapping",
        ZERO3,
        [
            set_model(
                param_shapes={
                    n: s
                    for group in load(ZERO3.checkpoint / STEP / f"zero_pp_rank_0_{MODEL}")["param_shapes"]
                    for n, s in group.items()
                }
            )
        ],
    ),
    (
        "module tensors that are no longer contiguous",
        ZERO2,
        [
            lambda tag: edit(
                tag / MODEL,
                lambda s: s["module"].update(
                    {n: t.t().contiguous().t() for n, t in s["module"].items() if t.dim() == 2}
                ),
            )
        ],
    ),
    ("an archive that knows no name", ZERO3, [lambda tag: save_to_stream(shard(tag, 0))]),
    (
        "a file from before torch 1.6",
        ZERO2,
        [lambda tag: torch.save(load(shard(tag, 0)), shard(tag, 0), _use_new_zipfile_serialization=False)],
    ),
]


def save_to_stream(path: Path) -> None:
    state = load(path)
    with path.open("wb") as file:
        torch.save(state, file)


@pytest.mark.parametrize(
    ("case", "changes"), [row[1:] for row in HEALTHY], ids=[f"{row[0]}-{row[1].name}" for row in HEALTHY]
)
def test_an_unusual_folder_holds_what_the_live_engine_held(
    case: Case, changes: list[Callable[[Path], Any]], tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(damaged(case, tmp_path, *changes))
    assert_master_is_true(checkpoint, case)
    if case.facts["tied"]:
        assert checkpoint.aliases == case.facts["tied"]


def write_zero2(folder: Path, groups: list[list[tuple[str, torch.Tensor]]], ranks: int) -> None:
    """What DeepSpeed writes for parameters of these values: joined, padded to twice the ranks, and cut."""
    tag = folder / "global_step1"
    tag.mkdir(parents=True)
    (folder / "latest").write_text("global_step1")
    parameters = dict(pair for group in groups for pair in group)
    shapes = [{name: value.shape for name, value in group} for group in groups]
    torch.save({"module": parameters, "param_shapes": shapes, "buffer_names": []}, tag / MODEL)
    parts: list[list[torch.Tensor]] = [[] for _ in range(ranks)]
    for group in groups:
        flat = torch.cat([value.flatten() for _, value in group]) if group else torch.empty(0)
        flat = torch.cat([flat, torch.zeros(-len(flat) % (2 * ranks))])
        for rank, part in enumerate(flat.chunk(ranks) if len(flat) else [flat] * ranks):
            parts[rank].append(part.clone())
    for rank in range(ranks):
        value = {"zero_stage": 2, "partition_count": [ranks] * len(groups), GROUPS[2]: parts[rank]}
        torch.save({"optimizer_state_dict": value}, shard(tag, rank))


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_scalars_empty_parameters_and_empty_groups_are_read(ranks: int, tmp_path: Path) -> None:
    groups = [
        [("scalar", torch.tensor(3.5)), ("nothing", torch.empty(0, 7)), ("weight", torch.randn(3, 7))],
        [],
        [("bias", torch.randn(3))],
    ]
    write_zero2(tmp_path / "run", groups, ranks)
    checkpoint = open_checkpoint(tmp_path / "run")
    for source in ("master", "model"):
        weights = checkpoint.weights(source)  # type: ignore[arg-type]
        for name, value in (pair for group in groups for pair in group):
            assert torch.equal(read(weights[name]), value), (source, name)


def test_ranks_of_padding_alone_are_no_copies(tmp_path: Path) -> None:
    write_zero2(tmp_path / "run", [[("bias", torch.ones(3))]], ranks=8)
    assert torch.equal(read(open_checkpoint(tmp_path / "run").weights("master")["bias"]), torch.ones(3))


def test_a_tag_may_have_the_name_of_a_trainers_checkpoint(tmp_path: Path) -> None:
    write_zero2(tmp_path / "run", [[("bias", torch.ones(3))]], ranks=1)
    (tmp_path / "run" / "global_step1").rename(tmp_path / "run" / "checkpoint-1")
    (tmp_path / "run" / "latest").write_text("checkpoint-1")
    assert open_checkpoint(tmp_path / "run").tag == "checkpoint-1"


@pytest.mark.parametrize("name", ["tiny-zero2-without-frozen", "tiny-zero3-without-frozen"])
def test_frozen_parameters_that_were_left_out_of_the_save_are_called_so(
    name: str, export: Callable[..., tuple[Path, dict[str, Any]]]
) -> None:
    for weights in ("auto", "master"):
        with pytest.raises(CheckpointError, match=r"were left out of the save: .*embed_tokens") as caught:
            export(Case(name).checkpoint, weights=weights, prompt_format="none")
        assert "exclude_frozen_parameters=False" in caught.value.hint


def test_a_save_without_frozen_parameters_of_a_model_that_has_none_is_whole(
    tmp_path: Path, export: Callable[..., tuple[Path, dict[str, Any]]]
) -> None:
    """exclude_frozen_parameters writes no frozen_param_shapes, here of a model that is trained as a whole."""
    changed = set_model(frozen_param_shapes=None, frozen_param_fragments=None)
    _, report = export(damaged(ZERO3, tmp_path / "copy", changed), prompt_format="none")
    assert report["tensors"]["written"] == len(ZERO3.truth)


# Which tag is meant


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"\xff\xfe\x00", b"../elsewhere", b"/etc", b"..", b"gone", b"a\x00b", b"a\nb", b"x" * 5000]
)
def test_a_broken_latest_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    checkpoint = ZERO2.copy(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (checkpoint / "latest").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"^latest "):
        open_checkpoint(checkpoint)
    assert open_checkpoint(checkpoint, STEP).tag == STEP


def test_a_latest_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    checkpoint = ZERO2.copy(tmp_path)
    (checkpoint / "latest").unlink()
    (checkpoint / "latest").mkdir()
    with pytest.raises(CheckpointError, match="latest is not a regular file"):
        open_checkpoint(checkpoint)


def test_without_latest_the_only_tag_is_read_and_of_several_one_must_be_chosen(tmp_path: Path) -> None:
    checkpoint = ZERO2.copy(tmp_path)
    (checkpoint / "latest").unlink()
    opened = open_checkpoint(checkpoint)
    assert (opened.tag, len(opened.notes)) == (STEP, 1)
    shutil.copytree(checkpoint / STEP, checkpoint / "global_step12")
    with pytest.raises(IncompleteCheckpointError, match="2 tags: global_step4, global_step12") as caught:
        open_checkpoint(checkpoint)
    assert "--tag" in caught.value.hint
    assert open_checkpoint(checkpoint, "global_step12").tag == "global_step12"
    with pytest.raises(UsageError, match="no tag 'global_step5'"):
        open_checkpoint(checkpoint, "global_step5")
    with pytest.raises(UsageError):
        open_checkpoint(checkpoint, "../checkpoint/global_step4")


def test_a_tag_newer_than_latest_is_told(tmp_path: Path) -> None:
    checkpoint = ZERO2.copy(tmp_path)
    shutil.copytree(checkpoint / STEP, checkpoint / "global_step12")
    assert [note for note in open_checkpoint(checkpoint).notes if "global_step12 is newer" in note]
    shutil.copytree(checkpoint / STEP, checkpoint / "the best one")
    (checkpoint / "latest").write_text("the best one\n")
    best = open_checkpoint(checkpoint)
    assert (best.tag, best.notes) == ("the best one", ())


def test_the_folder_of_a_tag_is_refused_with_the_way_to_export_it() -> None:
    with pytest.raises(CheckpointError, match="global_step4 is a tag") as caught:
        open_checkpoint(ZERO2.checkpoint / STEP)
    assert f"--tag {STEP}" in caught.value.hint


def test_a_checkpoint_that_is_a_link_out_of_the_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint-4").symlink_to(ZERO2.checkpoint)
    with pytest.raises(CheckpointError, match="checkpoint-4 is a symbolic link"):
        open_checkpoint(tmp_path / "run")


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(path: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", deny)
    with pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
        open_checkpoint(tmp_path)


def test_what_a_script_stored_in_place_of_a_step_is_no_step(tmp_path: Path) -> None:
    assert open_checkpoint(damaged(ZERO2, tmp_path, set_model(global_steps=Plain(), ds_config=Plain()))).step is None


def test_every_error_of_opening_is_an_expected_one(tmp_path: Path) -> None:
    """Whatever stands at a key that the reader looks at, it opens or refuses."""
    odd: list[Any] = [
        None,
        0,
        -1,
        "x",
        [],
        {},
        [None],
        {"a": None},
        {1: 2},
        [[0]],
        (1,),
        Plain(),
        torch.ones(2),
        {"a": {}},
    ]
    keys = ["module", "param_shapes", "buffer_names", "shared_params", "frozen_param_shapes", "frozen_param_fragments"]
    keys += ["mp_world_size", "dp_world_size", "ds_config", "global_steps"]
    shard_keys = ["zero_stage", "partition_count", "param_alignment_paddings", "base_optimizer_state", GROUPS[2]]
    model, optimizer = load(ZERO2.checkpoint / STEP / MODEL), load(shard(ZERO2.checkpoint / STEP, 0))
    tag = ZERO2.copy(tmp_path) / STEP
    for value in odd:
        for key in keys:
            torch.save(model | {key: value}, tag / MODEL)
            _open_or_refuse(tag.parent)
        torch.save(model, tag / MODEL)
        for key in shard_keys:
            inner = optimizer["optimizer_state_dict"] | {key: value}
            torch.save(optimizer | {"optimizer_state_dict": inner}, shard(tag, 0))
            _open_or_refuse(tag.parent)
        for step in ("state", "param_groups"):
            for entry in ({0: {"step": value}}, [{"step": value}]):
                inner = optimizer["optimizer_state_dict"] | {"base_optimizer_state": {step: entry}}
                torch.save(optimizer | {"optimizer_state_dict": inner}, shard(tag, 0))
                _open_or_refuse(tag.parent)
        torch.save(optimizer, shard(tag, 0))


def _open_or_refuse(folder: Path) -> None:
    try:
        open_checkpoint(folder)
    except ExportError as error:
        assert "\n" not in error.message


def _write_holes(folder: Path, ranks: int, layers: int, width: int) -> None:
    """ZeRO-3 of ``layers`` parameters of ``width`` elements: torch's headers and pickles, and holes for elements."""
    (folder / STEP).mkdir(parents=True)
    (folder / "latest").write_text(STEP)
    names = [f"layers.{number}.weight" for number in range(layers)]
    with FakeTensorMode(), torch.serialization.skip_data(materialize_fake_tensors=True):
        state = {
            "module": {name: torch.empty(0) for name in names},
            "param_shapes": [{name: torch.Size([width]) for name in names}],
            "global_steps": 4,
        }
        for rank in range(ranks):
            partition = {"fp32_flat_groups": [torch.empty(layers * width // ranks)], "zero_stage": 3}
            file = folder / STEP / f"zero_pp_rank_{rank}_mp_rank_00"
            torch.save(state, f"{file}_model_states.pt")
            torch.save({"optimizer_state_dict": partition | {"partition_count": ranks}}, f"{file}_optim_states.pt")


def test_a_huge_checkpoint_is_opened_with_one_look_at_each_pickle_and_none_at_its_elements(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks, layers, width = 8, 500, 2**23
    _write_holes(tmp_path / "checkpoint", ranks, layers, width)
    parsed: list[Unpickler] = []
    load_pickle = Unpickler.load

    def count(self: Unpickler) -> Any:
        parsed.append(self)
        return load_pickle(self)

    checked: list[Any] = []

    def note(group: Any) -> bool:
        checked.append(group)
        return are_shapes(group)

    are_shapes = zero._is_shapes
    monkeypatch.setattr(zero, "_is_shapes", note)
    monkeypatch.setattr(Unpickler, "load", count)
    monkeypatch.setattr(SourceFiles, "_read", lambda *args: pytest.fail("elements were read"))
    opened = open_checkpoint(tmp_path / "checkpoint")
    assert len(parsed) == 1 + ranks, "the ranks' model states have the same pickle"
    assert len(checked) <= 2, "and so the same shapes"
    assert opened.master is not None
    assert sum(tensor.nbytes for tensor in opened.master.values()) == 4 * layers * width


def test_equal_partitions_that_are_holes_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "hole").open("wb") as file:
        file.write(b"\1" * 65536)
        file.truncate(2**36)
    with monkeypatch.context() as patched:
        patched.setattr(SourceFiles, "_read", lambda *args: pytest.fail("elements were read"))
        assert is_constant(Extent(tmp_path / "hole", 2**20, DType.F32, 2**30))
    assert not is_constant(Extent(tmp_path / "hole", 0, DType.F32, 2**16))
