"""The Hub's check of a model card's front matter, for the fields that a card of ours can have."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

LICENSES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0
cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0
cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0
cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0
gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl
apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl
lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3
llama4 grok2-community gemma unknown other
"""

PIPELINES = """
text-classification token-classification table-question-answering question-answering zero-shot-classification
translation summarization feature-extraction text-generation text2text-generation fill-mask
sentence-similarity text-ranking text-to-speech text-to-audio automatic-speech-recognition audio-to-audio
audio-classification audio-text-to-text voice-activity-detection depth-estimation image-classification
object-detection image-segmentation text-to-image image-to-text image-to-image image-to-video
unconditional-image-generation video-classification reinforcement-learning robotics tabular-classification
tabular-regression tabular-to-text table-to-text multiple-choice text-to-video image-text-to-text
visual-question-answering document-question-answering zero-shot-image-classification graph-ml mask-generation
zero-shot-object-detection text-to-3d image-to-3d image-feature-extraction video-text-to-text
keypoint-detection visual-document-retrieval any-to-any video-to-video other
"""

FRONT_MATTER = re.compile(r"\A\s*---[^\S\n]*\n(.*?)^---[^\S\n]*$", re.DOTALL | re.MULTILINE)
REPO_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", re.ASCII)
LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual|other")


def check_front_matter(card: str) -> tuple[list[str], list[str]]:
    """Errors and warnings about the YAML front matter of a model card."""
    import yaml

    found = FRONT_MATTER.match(card)
    try:
        metadata = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError as error:
        return [f"YAML Metadata Error: {error}"], []
    if not metadata:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(metadata, dict):
        return ["YAML Metadata Error: must be a mapping"], []
    return list(_errors(metadata)), list(_warnings(metadata))


def _errors(metadata: dict[str, Any]) -> Iterator[str]:
    for name in filter(FIELDS.__contains__, metadata):
        accepts, complaint = FIELDS[name]
        value = metadata[name]
        values = value if isinstance(value, list) and name in LISTS else [value]
        yield from (f'"{name}" with value {item!r} {complaint}' for item in values if not accepts(item))
    if "tags" in metadata and not isinstance(metadata["tags"], list):
        yield '"tags" must be an array'


def _warnings(metadata: dict[str, Any]) -> Iterator[str]:
    pipeline = metadata.get("pipeline_tag")
    if isinstance(pipeline, str) and pipeline not in PIPELINES.split():
        yield f"The pipeline tag {pipeline!r} is not in the official list"


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_repo_id(value: object) -> bool:
    return isinstance(value, str) and REPO_ID.fullmatch(value) is not None


FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "license": (
        lambda value: isinstance(value, str) and value in LICENSES.split(),
        "must be a known license id, or other",
    ),
    "language": (lambda value: isinstance(value, str) and bool(LANGUAGE.fullmatch(value)), "must be an ISO 639 code"),
    "base_model": (_is_repo_id, "is not valid. Use a model id from the Hub"),
    "datasets": (_is_repo_id, "is not valid. Use a dataset id from the Hub"),
    "tags": (_is_text, "must be a string"),
    "pipeline_tag": (_is_text, "must be a string"),
    "library_name": (_is_text, "must be a string"),
    "license_name": (_is_text, "must be a string"),
    "license_link": (_is_text, "must be a string"),
}
"""What each field's value, or each item of its list, must be."""

LISTS = ("license", "language", "base_model", "datasets", "tags")
"""The fields that may be lists."""
