"""The torture bench: the whole daemon under faults, and one oracle that judges what is left (docs/reliability.md)."""
