"""How the same is done without this project, as the libraries' documentation says; each way is a process of its own.

python -m benchmarks.peers pretrained|load_state_dict|zero_to_fp32 CHECKPOINT OUTPUT
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path


def pretrained(checkpoint: Path, output: Path) -> None:
    """from_pretrained in the target dtype, and save_pretrained."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).save_pretrained(output)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(output)


def load_state_dict(checkpoint: Path, output: Path) -> None:
    """The fp32 weights loaded into a model, as DeepSpeed's and the Trainer's guides do, then cast and saved."""
    import torch
    from deepspeed.utils.zero_to_fp32 import load_state_dict_from_zero_checkpoint
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint), dtype=torch.float32)
    load_state_dict_from_zero_checkpoint(model, str(checkpoint)).to(torch.bfloat16).save_pretrained(output)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(output)


def zero_to_fp32(checkpoint: Path, output: Path) -> None:
    """The script that DeepSpeed leaves in every checkpoint, then the way for a Hugging Face folder."""
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

    with tempfile.TemporaryDirectory(dir=output.parent) as name:
        convert_zero_checkpoint_to_fp32_state_dict(str(checkpoint), name, safe_serialization=True)
        for path in checkpoint.glob("*.json"):
            Path(name, path.name).write_bytes(path.read_bytes())
        pretrained(Path(name), output)


if __name__ == "__main__":
    {way.__name__: way for way in (pretrained, load_state_dict, zero_to_fp32)}[sys.argv[1]](*map(Path, sys.argv[2:]))
