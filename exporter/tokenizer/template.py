"""Chat templates: where they lie, and what they render.

A template is a program. transformers' own sandbox keeps it from everything but its arguments; a process of its own
bounds the time and memory that it takes.
"""

from __future__ import annotations

import functools
import json
import math
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from exporter.errors import CheckpointError
from exporter.tokenizer.files import CONFIG, TEMPLATE, TEMPLATE_FOLDER, TokenizerFiles

MAX_SECONDS = 3
"""Processor time that a rendering may take."""
WAIT_SECONDS = 60
"""How long a renderer is waited for: it also has to start, perhaps on a busy machine."""
MAX_MEMORY = 512 * 1024 * 1024
"""Bytes that a rendering may take."""
MAX_CHARACTERS = 1024 * 1024
"""Characters of a rendered chat."""

QUESTION = "What is a meme, and what's the history behind this word?"
"""What a user asks in the card's example, too."""

_REPLY = "An idea that spreads."
_USER = {"role": "user", "content": QUESTION}
_SYSTEM = {"role": "system", "content": "Answer in one sentence."}
_ASSISTANT = {"role": "assistant", "content": _REPLY}

_RENDERER = """
import json, sys
request = json.load(sys.stdin)
sys.path[:] = request.pop("path")
sys.modules["torch"] = None
from exporter.tokenizer.template import render_all
json.dump(render_all(**request), sys.stdout)
"""

Message = Mapping[str, Any]


class TemplateError(Exception):
    """A chat template that does not render; the message is one line."""


def packaged_template(name: str) -> str:
    """The chat template of a prompt format that this package knows."""
    return (Path(__file__).parents[1] / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


def own_templates(files: TokenizerFiles) -> dict[str, str]:
    """The checkpoint's chat templates by name, as transformers 4.57 and 5 find them: files first, then the config.

    Raises:
        CheckpointError: the config's ``chat_template`` is neither a text nor a list of named texts, or a file is not
            UTF-8.
    """
    names = [name for name in files.contents if name == TEMPLATE or name.startswith(f"{TEMPLATE_FOLDER}/")]
    if names:
        return {"default" if name == TEMPLATE else Path(name).stem: _text(files, name) for name in names}
    return _inline_templates(files)


def keep_templates(files: TokenizerFiles) -> None:
    """Leave the checkpoint's templates as they are, but for one in the config that its files override."""
    if own_templates(files) != _inline_templates(files):
        files.drop(CONFIG, "chat_template")


def replace_templates(files: TokenizerFiles, template: str) -> None:
    """Make ``template`` the only one, in the file where transformers 4.57 and 5 look first."""
    for name in [name for name in files.contents if name.startswith(f"{TEMPLATE_FOLDER}/")]:
        files.remove(name)
    files.drop(CONFIG, "chat_template")
    files.replace(TEMPLATE, template.encode())


def check_template(template: str, special_tokens: Mapping[str, str]) -> str | None:
    """Render ``template`` once; what it writes after an assistant's reply, or None where it takes no reply.

    Raises:
        TemplateError: it renders neither a user's message nor one that follows a system message.
    """
    chats: list[list[Message]] = [[_USER], [_SYSTEM, _USER], [_USER, _ASSISTANT], [_SYSTEM, _USER, _ASSISTANT]]
    prompt, system_prompt, *replies = _render_apart(template, special_tokens, [(c, c[-1] is _USER) for c in chats])
    if "text" not in prompt and "text" not in system_prompt:
        raise TemplateError(prompt["error"])
    return next((reply["text"].rpartition(_REPLY)[2] for reply in replies if _REPLY in reply.get("text", "")), None)


def render(
    template: str, special_tokens: Mapping[str, str], messages: Sequence[Message], add_generation_prompt: bool
) -> str:
    """The chat ``messages`` as ``template`` renders it in transformers' ``apply_chat_template``.

    Raises:
        TemplateError: it does not render.
    """
    (answer,) = _render_apart(template, special_tokens, [(list(messages), add_generation_prompt)])
    if "error" in answer:
        raise TemplateError(answer["error"])
    return answer["text"]


def render_all(
    template: str, special_tokens: Mapping[str, str], chats: Sequence[tuple[list[Message], bool]]
) -> list[dict[str, str]]:
    """A ``text`` or an ``error`` for each of ``chats``, rendered in this process under its limits."""
    from transformers.utils.chat_template_utils import render_jinja_template

    _limit_this_process()
    answers = []
    for messages, add_generation_prompt in chats:
        try:
            (text,), _ = render_jinja_template(
                conversations=[messages],
                chat_template=template,
                add_generation_prompt=add_generation_prompt,
                **special_tokens,
            )
        except Exception as error:  # a template can raise anything
            answers.append({"error": " ".join(f"{type(error).__name__}: {str(error)[:300]}".split())})
        else:
            long = len(text) > MAX_CHARACTERS
            answers.append({"error": f"it renders more than {MAX_CHARACTERS} characters"} if long else {"text": text})
    return answers


def _render_apart(
    template: str, special_tokens: Mapping[str, str], chats: Sequence[tuple[list[Message], bool]]
) -> list[dict[str, str]]:
    requests = [json.dumps([template, dict(special_tokens), chat]) for chat in chats]
    new = {request: chat for request, chat in zip(requests, chats, strict=True) if request not in _rendered}
    if new:
        request = {"template": template, "special_tokens": dict(special_tokens), "chats": list(new.values())}
        _rendered.update(zip(new, json.loads(_answer(json.dumps({**request, "path": sys.path}))), strict=True))
    return [_rendered[request] for request in requests]


_rendered: dict[str, dict[str, str]] = {}
"""The answers so far: the same chat is asked for at several places, and a renderer takes half a second to start."""


def _answer(request: str) -> str:
    """The renderer's answer to ``request``, both JSON."""
    run = functools.partial(
        subprocess.run,
        [sys.executable, "-I", "-c", _RENDERER],
        input=request,
        capture_output=True,
        encoding="utf-8",
        timeout=WAIT_SECONDS,
    )
    with ThreadPoolExecutor(max_workers=1) as waiting:
        answer = waiting.submit(run)
        import transformers.modeling_utils  # noqa: F401  (what comes next needs it, and it takes as long as the renderer)

        try:
            renderer = answer.result()
        except subprocess.TimeoutExpired as error:
            raise TemplateError(f"it takes more than {WAIT_SECONDS} seconds") from error
    if renderer.returncode < 0:
        raise TemplateError(f"it takes more than {MAX_SECONDS} seconds, or too much memory")
    renderer.check_returncode()
    return str(renderer.stdout)


def _limit_this_process() -> None:
    import resource

    seconds = math.ceil(time.process_time()) + MAX_SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    usage = Path("/proc/self/statm")  # where there is none, the system does not enforce RLIMIT_AS either
    if usage.exists():
        limit = int(usage.read_text().split()[0]) * resource.getpagesize() + MAX_MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _text(files: TokenizerFiles, name: str) -> str:
    try:
        return files.contents[name].decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{name} is not UTF-8 text at byte {error.start}.", "Save it as UTF-8.") from error


def _inline_templates(files: TokenizerFiles) -> dict[str, str]:
    value = files.get(CONFIG, "chat_template")
    if value is None or isinstance(value, str):
        return {"default": value} if value else {}
    try:
        templates = {entry["name"]: entry["template"] for entry in value}
    except (TypeError, KeyError):
        templates = {"": None}
    if not all(isinstance(text, str) for text in (*templates, *templates.values())):
        raise CheckpointError(
            f"{CONFIG} has a chat_template that is neither a text nor a list of named texts.",
            "Repair the key, or remove it.",
        )
    return templates
