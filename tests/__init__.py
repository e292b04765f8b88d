"""The tests of edge-llm."""
