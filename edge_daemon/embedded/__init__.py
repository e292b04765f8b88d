"""A broker and an Ollama-compatible server with real small models, each run as a process of its own."""

from edge_daemon.embedded.errors import EmbeddedError, PortTaken
from edge_daemon.embedded.launch import BrokerChild, OllamaChild, start_broker, start_ollama

__all__ = ["BrokerChild", "EmbeddedError", "OllamaChild", "PortTaken", "start_broker", "start_ollama"]
