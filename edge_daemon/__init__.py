"""edge-llm: language models on small boards, driven by MQTT."""

__version__ = "0.1.0"
