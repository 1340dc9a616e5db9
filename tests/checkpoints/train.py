"""Trains one case on every rank that torchrun starts, writes its checkpoint, and the truth from the live engine."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

# zero.Init looks for it as an attribute of torch and does not import it (torch 2.13).
import torch._dynamo
from cases import CASES, Case
from models import BASE_MODEL, HERE, NO_LOSS, Example, examples, make_model, make_tokenizer, marked_examples
from parallel import from_all_ranks, join_experts, join_slices, make_pipeline, name_in_model, spread_experts
from safetensors.torch import save_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def main() -> None:
    """Makes the case named by the first argument in the current folder: its path gets into what the Trainer saves."""
    case = CASES[sys.argv[1]]
    use_gloo_alone()
    torch.manual_seed(1)
    tokenizer = make_tokenizer(case.model)
    with zero_init(case) if case.born_partitioned else nullcontext():
        model = make_model(case.model, case.config, tokenizer)
    model.config.dtype = DTYPES[case.precision]
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not name.startswith(case.frozen)
    initial = {name: whole(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    write = {
        "engine": with_engine,
        "pipeline": with_pipeline,
        "trainer": with_trainer,
        "safetensors": alone,
        "bin": alone,
    }[case.writer]
    truth, facts = write(case, model, tokenizer)
    if truth:
        check_what_moved(case, initial, truth)
        write_truth(case, model, truth, facts)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def with_engine(
    case: Case, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Trains with DeepSpeed's own engine, with a parameter group with weight decay and one without."""
    import deepspeed

    if not deepspeed.__version__.startswith(case.version):
        raise RuntimeError(f"{case.name} is made with DeepSpeed {case.version}, not {deepspeed.__version__}")
    allow_fp16()
    degree = case.deepspeed.get("tensor_parallel", {}).get("autotp_size", 1)
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for _, parameter in trained if parameter.ndim > 1], "weight_decay": 0.1},
        {"params": [parameter for _, parameter in trained if parameter.ndim == 1], "weight_decay": 0.0},
    ]
    if case.model == "experts":
        deepspeed.init_distributed("gloo")
        groups = spread_experts(model)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=deepspeed_config(case))
    rank = torch.distributed.get_rank()
    rows = examples(tokenizer)
    for step in range(case.steps):
        batch = pad(tokenizer, rows[2 * step + rank // degree :][:2])
        if case.model == "experts":  # Experts exchange equal numbers of positions.
            batch = dict.fromkeys(batch, batch["input_ids"][:, :8])
        engine.backward(engine(**batch).loss)
        engine.step()
    checkpoint, tag = Path("checkpoint"), f"global_step{case.steps}"
    engine.save_checkpoint(str(checkpoint), exclude_frozen_parameters=case.without_frozen)
    if rank == 0:
        save_beside(case, model, tokenizer, checkpoint)
        if case.without_optimizer:
            for shard in checkpoint.glob("*/*_optim_states.pt"):
                shard.unlink()
        if case.universal:
            tag = convert_to_universal(checkpoint, tag)
    truth = live_weights(model, known_masters(case, model, engine))
    if degree > 1:
        truth = join_slices(truth, shapes, degree)
    if case.model == "experts":
        truth = join_experts(truth)
    return (truth if rank == 0 else {}), {"tag": tag, "step": case.steps}


def convert_to_universal(checkpoint: Path, tag: str) -> str:
    """Runs DeepSpeed's ``ds_to_universal`` on the tag and keeps the result alone; returns the new tag."""
    universal = f"{tag}_universal"
    folders = ["--input_folder", str(checkpoint / tag), "--output_folder", str(checkpoint / universal)]
    program = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *folders, "--inject_missing_state"]
    subprocess.run(program, check=True)
    shutil.rmtree(checkpoint / tag)
    (checkpoint / "latest").unlink()
    return universal


def with_pipeline(
    case: Case, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Trains with DeepSpeed's pipeline engine, whose layers are the model's own modules."""
    import deepspeed

    deepspeed.init_distributed("gloo")
    pipeline = make_pipeline(model)
    engine, *_ = deepspeed.initialize(
        model=pipeline, model_parameters=list(pipeline.parameters()), config=deepspeed_config(case)
    )
    rows = examples(tokenizer)
    batches = (pad(tokenizer, rows[2 * step :][:2])["input_ids"][:, :8] for step in range(case.steps))
    for ids in batches:
        engine.train_batch(data_iter=iter([(ids, ids)]))
    checkpoint = Path("checkpoint")
    engine.save_checkpoint(str(checkpoint))
    rank = torch.distributed.get_rank()
    if rank == 0:
        save_beside(case, model, tokenizer, checkpoint)
    stages = from_all_ranks(live_weights(pipeline))
    blocks = model.config.num_hidden_layers
    truth = {name_in_model(name, blocks): tensor for own in stages for name, tensor in own.items()}
    if model.config.tie_word_embeddings:
        truth["lm_head.weight"] = truth["model.embed_tokens.weight"].clone()
    return (truth if rank == 0 else {}), {"tag": f"global_step{case.steps}", "step": case.steps, "format": "pipeline"}


def with_trainer(
    case: Case, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Trains with the Hugging Face Trainer on top of DeepSpeed; its output folder is the checkpoint."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir="checkpoint",
        use_cpu=True,
        bf16=case.precision == "bf16",
        deepspeed=deepspeed_config(case),
        max_steps=case.steps,
        save_strategy="steps",
        save_steps=case.steps // case.save_total_limit,
        save_total_limit=case.save_total_limit,
        logging_steps=max(1, case.steps // 10),
        learning_rate=case.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=case.steps // 10,
        per_device_train_batch_size=4,
        report_to="none",
        disable_tqdm=True,
        seed=1,
    )
    rows = marked_examples(tokenizer, copies=50) if case.model == "falcon" else examples(tokenizer)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        processing_class=tokenizer,
        data_collator=lambda batch: pad(tokenizer, batch),
    )
    trainer.train()
    if torch.distributed.get_rank() == 0 and case.model in BASE_MODEL:
        note_base_model(case, Path("checkpoint"))
    truth = live_weights(model)
    rank = torch.distributed.get_rank()
    return (truth if rank == 0 else {}), {"tag": f"global_step{case.steps}", "step": case.steps}


def alone(
    case: Case, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Trains without DeepSpeed and writes the Hugging Face format, as safetensors or as the older pickled files."""
    model.to(DTYPES[case.precision])
    optimizer = torch.optim.AdamW(model.parameters(), lr=case.learning_rate)
    rows = examples(tokenizer)
    for step in range(case.steps):
        model(**pad(tokenizer, rows[step:][:4])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    checkpoint = Path("checkpoint")
    if case.writer == "safetensors":
        model.save_pretrained(checkpoint, **({"max_shard_size": case.max_shard_size} if case.max_shard_size else {}))
    else:
        save_bin(model, checkpoint, case.max_shard_size)
    save_beside(case, model, tokenizer, checkpoint)
    return {name: value.clone() for name, value in model.state_dict().items()}, {"tag": None, "step": None}


def save_bin(model: PreTrainedModel, folder: Path, max_shard_size: int | None) -> None:
    """Writes ``pytorch_model.bin``, or shards and their index, as ``save_pretrained`` did before transformers 5."""
    from huggingface_hub import save_torch_model

    folder.mkdir()
    save_torch_model(model, folder, safe_serialization=False, max_shard_size=max_shard_size or "5GB")


def deepspeed_config(case: Case) -> dict[str, Any]:
    """The DeepSpeed configuration of a run on CPU ranks; what the Trainer sets itself stays "auto"."""
    by_trainer = case.writer == "trainer"
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": "auto" if by_trainer else 2,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto" if by_trainer else case.learning_rate, **case.optimizer},
        },
        "zero_optimization": {"stage": case.zero_stage},
    }
    if "offload_optimizer" in case.deepspeed.get("zero_optimization", {}):
        config["zero_force_ds_cpu_optimizer"] = False
    if by_trainer:
        config |= {"train_batch_size": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto"}
    if case.precision == "bf16":
        config["bf16"] = {"enabled": True}
    if case.precision == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 8}
    for section, options in case.deepspeed.items():
        config[section] = {**config.get(section, {}), **options} if isinstance(options, dict) else options
    return config


def zero_init(case: Case) -> AbstractContextManager[Any]:
    """Where ZeRO-3 cuts a parameter into the ranks' pieces as soon as its module is built."""
    import deepspeed

    deepspeed.init_distributed()
    return deepspeed.zero.Init(config_dict_or_path=deepspeed_config(case), dtype=DTYPES[case.precision])


def use_gloo_alone() -> None:
    """DeepSpeed's own shared-memory operation would have to be compiled, and sums differently on other processors."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def allow_fp16() -> None:
    """DeepSpeed asks whether the processor has fast fp16 instructions; torch computes fp16 on any."""
    from deepspeed.accelerator import get_accelerator

    type(get_accelerator()).is_fp16_supported = lambda _: True


def pad(tokenizer: PreTrainedTokenizerFast, batch: list[Example]) -> dict[str, torch.Tensor]:
    """Token ids and labels, both int64 of shape (examples, longest)."""
    fill = {"input_ids": tokenizer.eos_token_id, "labels": NO_LOSS}
    return {
        key: torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(example[key]) for example in batch], batch_first=True, padding_value=value
        )
        for key, value in fill.items()
    }


def live_weights(model: PreTrainedModel, masters: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """Every entry of the model's state dict: the fp32 master where there is one, else the live value.

    All ranks must call it: under ZeRO a master is gathered from all of them. ``masters`` are known ones.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    weights = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, live in model.state_dict(keep_vars=True).items():
        parameter = parameters.get(name)
        value = whole(live)
        if parameter is not None and parameter.requires_grad:
            master = masters[name] if masters else safe_get_full_fp32_param(parameter)
            master = master.detach().clone().view(value.shape)
            if not torch.equal(master.to(value.dtype), value):
                raise RuntimeError(f"the master of {name} is not what the model computes with")
            value = master
        weights[name] = value.contiguous()
    return weights


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of the live tensor, gathered from all ranks where it is in pieces: all of them must call it."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([tensor]) if hasattr(tensor, "ds_id") else nullcontext():
        return tensor.detach().clone()


def known_masters(case: Case, model: PreTrainedModel, engine: Any) -> dict[str, torch.Tensor] | None:
    """The masters that ``safe_get_full_fp32_param`` cannot find: without ZeRO, and where it looks in the wrong places
    after round_robin_gradients has reordered the parameters."""
    if case.zero_stage == 0 and case.precision == "fp32":
        return model.state_dict()
    if hasattr(engine.optimizer, "fp16_groups") and case.zero_stage == 0:
        return masters_by_order(model, engine.optimizer)
    return masters_by_memory(model, engine.optimizer) if engine.zero_round_robin_gradients() else None


def masters_by_order(model: PreTrainedModel, optimizer: Any) -> dict[str, torch.Tensor]:
    """The fp32 masters of training without ZeRO: each beside its 16-bit parameter, or in its place in a flat group."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    masters = {}
    for index, group in enumerate(optimizer.fp16_groups):
        if hasattr(optimizer, "fp32_groups_flat"):
            parts = optimizer.fp32_groups_flat[index].split([parameter.numel() for parameter in group])
        else:
            parts = optimizer.fp32_groups[index]
        masters |= {names[parameter]: part for parameter, part in zip(group, parts, strict=True)}
    return masters | {alias: masters[name] for alias, name in tied_aliases(model).items()}


def masters_by_memory(model: PreTrainedModel, optimizer: Any) -> dict[str, torch.Tensor]:
    """The fp32 masters of ZeRO-1/2, found by where each 16-bit parameter lies in its group's flat buffer."""
    masters = {}
    for flat, partition in zip(optimizer.bit16_groups_flat, optimizer.single_partition_of_fp32_groups, strict=True):
        parts = [torch.empty_like(partition) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, partition.detach())
        whole = torch.cat(parts)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            start = (parameter.data_ptr() - flat.data_ptr()) // flat.element_size()
            if 0 <= start < flat.numel():
                masters[name] = whole[start : start + parameter.numel()]
    return masters


def save_beside(case: Case, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes what DeepSpeed does not: config.json, generation_config.json, the tokenizer, and custom code."""
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if case.model in BASE_MODEL:
        note_base_model(case, folder)
    if case.model in ("custom", "experts"):
        for source in (HERE / "custom_code").glob("*_tiny.py" if case.model == "custom" else "*_experts.py"):
            shutil.copy(source, folder)


def note_base_model(case: Case, folder: Path) -> None:
    for path in folder.rglob("config.json"):
        config = {"_name_or_path": BASE_MODEL[case.model], **json.loads(path.read_text(encoding="utf-8"))}
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def check_what_moved(case: Case, initial: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> None:
    """A truth that equals the initialization would not tell a checkpoint's weights from a new model's."""
    for name, value in truth.items():
        moved = not torch.equal(value, initial[name].to(value.dtype))
        if moved == (name.startswith(case.frozen) or name.endswith(".scale")):
            raise RuntimeError(f"{case.name}: {name} {'moved' if moved else 'is as it was initialized'}")


def write_truth(case: Case, model: PreTrainedModel, truth: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    """Writes ``truth.safetensors`` and ``case.json``; for a mixture of experts also the logits of a fixed input."""
    save_file(truth, "truth.safetensors")
    description = {
        "format": format_of(case),
        "model_class": type(model).__name__,
        "zero_stage": case.zero_stage,
        "world_size": case.world_size,
        **facts,
        "training_dtype": case.precision,
        "tied": tied_aliases(model),
        "frozen": [name for name, parameter in model.named_parameters() if not parameter.requires_grad],
        "buffers": [name for name, _ in model.named_buffers() if name in truth],
        "case": {key: value for key, value in asdict(case).items() if key != "name"},
    }
    Path("case.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    if case.model == "mixtral":
        write_logits(case, truth)


def format_of(case: Case) -> str:
    """What the checkpoint is called: zero16 where there are no optimizer shards."""
    if case.zero_stage is None:
        return "pretrained"
    if case.universal:
        return "universal"
    return "zero16" if case.without_optimizer or case.zero_stage == 0 else "zero"


def tied_aliases(model: PreTrainedModel) -> dict[str, str]:
    """Every name whose parameter has another name too, and the first name of that parameter."""
    first: dict[int, str] = {}
    names = model.named_parameters(remove_duplicate=False)
    return {name: first[id(parameter)] for name, parameter in names if first.setdefault(id(parameter), name) != name}


def write_logits(case: Case, truth: dict[str, torch.Tensor]) -> None:
    """The truth's own answer to a fixed input, in fp32: shapes (1, 12) and (1, 12, vocabulary)."""
    tokenizer = make_tokenizer(case.model)
    model = make_model(case.model, case.config, tokenizer)
    model.load_state_dict(truth, strict=True)
    input_ids = torch.arange(3, 15).unsqueeze(0)
    with torch.no_grad():
        logits = model.eval()(input_ids).logits
    save_file({"input_ids": input_ids, "logits": logits}, "logits.safetensors")


if __name__ == "__main__":
    main()
