"""Exports a checkpoint with the README's command to a Hub on this machine, and uses the result as a stranger would.

``python demo/demo.py CHECKPOINT QUESTION [OPTION ...]`` needs no token and no network: the Hub, the home of the Hub's
client and everything downloaded from it are gone at the end. OPTIONs are passed on to the export command.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from huggingface_hub import HfApi

from exporter.card import extract_sample_code
from exporter.rehearsal import RehearsalHub
from exporter.tokenizer import QUESTION

REPOSITORY = "OpenAssistant/falcon-7b-sft-top1"
EXPORT = Path(__file__).parent.parent / "export_model.py"


def main() -> None:
    checkpoint, question, *options = sys.argv[1:]
    with RehearsalHub(organizations=[REPOSITORY.split("/")[0]]) as hub, tempfile.TemporaryDirectory() as home:
        local = {name: "127.0.0.1,localhost" for name in ("NO_PROXY", "no_proxy")}
        environment = {**os.environ, **local, "HF_ENDPOINT": hub.endpoint, "HF_HOME": home, "HF_TOKEN": hub.token}
        command = ["--dtype", "bf16", "--hf_repo_name", REPOSITORY, "--trust_remote_code"]
        command += ["--auth_token", hub.token, checkpoint, "--max_shard_size", "2GB", *options]

        title("The plan")
        run([str(EXPORT), *command, "--dry_run"], environment)
        title("The export")
        print("$ python export_model.py", shlex.join("<auth_token>" if word == hub.token else word for word in command))
        run([str(EXPORT), *command], environment)

        api = HfApi(endpoint=hub.endpoint, token=hub.token)
        title("The files in the repository")
        for entry in api.list_repo_tree(REPOSITORY, recursive=True):
            print(f"{getattr(entry, 'size', 0):>12,}  {entry.path}")
        for commit in reversed(api.list_repo_commits(REPOSITORY)):
            print(f"commit {commit.commit_id[:12]}  {commit.title}")
        card = hub.read(REPOSITORY, "README.md").decode()
        title("The card")
        print(card)
        code = extract_sample_code(card) or ""
        title("The sample code's output, run as printed")
        run(["-c", code], environment)
        title(f"The same code without sampling, asked: {question}")
        asked = (
            code.replace(QUESTION, question).replace("do_sample=True", "do_sample=False").replace("    top_k=10,\n", "")
        )
        run(["-c", asked], environment)


def title(text: str) -> None:
    print(f"\n=== {text} ===\n", flush=True)


def run(arguments: list[str], environment: dict[str, str]) -> None:
    """Run Python with ``arguments``; the demo ends with the first failure."""
    finished = subprocess.run([sys.executable, *arguments], env=environment)
    if finished.returncode:
        sys.exit(finished.returncode)


if __name__ == "__main__":
    main()
