"""A broker and an Ollama-compatible server with real small models, each run as a process of its own."""
