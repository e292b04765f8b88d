"""Measurements of edge-llm against its parts, its peers and physical bounds, as ratios taken inside one run."""
