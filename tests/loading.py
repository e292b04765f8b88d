"""A model made resident as the worker does it, for tests that have nothing else to do meanwhile."""

from collections.abc import Iterable

from edge_daemon.model_pool import Ensured, ModelPool


def ensure(pool: ModelPool, model: str, *, evict: Iterable[str] = (), reason: str) -> Ensured:
    """Load `model` after unloading `evict`, unless a task can be given to it as it is; wait for the end of the load."""
    if pool.serves(model):
        return Ensured()
    pool.start_loading(model, evict=evict, reason=reason)
    ensured = pool.settle(wait=True)
    assert ensured is not None
    return ensured
