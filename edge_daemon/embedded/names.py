"""Ollama's model names: `[library/]name[:tag]`, compared without case, with the tag `latest` implied."""

import re

_NAME = re.compile(r"(?:[\w.-]+/)*[\w][\w.-]*:[\w][\w.-]*", re.ASCII)
_MAX_LENGTH = 350


def canonical_name(name: str) -> str:
    """The form under which equal names are equal: "SmolLM2" -> "smollm2:latest".

    Raises:
        ValueError: no model can have this name.
    """
    lowered = name.strip().lower().removeprefix("library/")
    if ":" not in lowered.rpartition("/")[2]:
        lowered += ":latest"
    if len(lowered) > _MAX_LENGTH or not _NAME.fullmatch(lowered):
        raise ValueError(f"invalid model name {name!r}")
    return lowered
