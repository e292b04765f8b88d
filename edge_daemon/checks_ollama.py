"""What ``edge-llm doctor`` looks at in Ollama: its version, who can reach it, and the models that are configured."""

import ipaddress
import re
import shutil
import sys
from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from edge_daemon.config import ModelSettings
from edge_daemon.errors import ModelError
from edge_daemon.estimates import Estimates
from edge_daemon.findings import Finding, Fix, Machine, fail, lines_of, megabytes, ok, warn
from edge_daemon.model_pool import Catalogue, ModelPolicy, memory_limits
from edge_daemon.ollama import Interrupt, ModelDetails, Ollama, normalise
from edge_daemon.systemd import printable
from edge_daemon.telemetry import memory_total

# The first version without a fault, and which one.
BAD_OLLAMAS = (
    ((0, 17, 1), "anyone who reaches it can read its memory (CVE-2026-7482)"),
    ((0, 13, 1), "some versions before 0.13.1 unload every other model on a board without a GPU"),
)
UPGRADE_OLLAMA = "curl -fsSL https://ollama.com/install.sh | sh"
# The name sorts behind override.conf, which `systemctl edit` writes, and the example's: the last setting wins.
ON_LOOPBACK = (
    r"printf '[Service]\nEnvironment=OLLAMA_HOST=127.0.0.1\n'"
    " | sudo install -D -m 644 /dev/stdin /etc/systemd/system/ollama.service.d/zz-loopback.conf"
    " && sudo systemctl daemon-reload && sudo systemctl restart ollama"
)


def check_ollama(machine: Machine) -> Iterator[Finding]:
    """It answers, is no version with a known fault, keeps to itself, and has the models that are configured."""
    config = machine.config.ollama
    ollama = Ollama(config.url, connect_timeout_s=config.connect_timeout_s)
    try:
        yield _version(ollama.version(), config.url)
        yield from _exposure(machine)
        yield from _models(machine, ollama)
    except ModelError as error:
        yield fail("ollama", str(error), _ollama_remedy(machine))


def _ollama_remedy(machine: Machine) -> str:
    if not machine.config.ollama_is_here:
        return f"{machine.edit}   # ollama.url"
    return "sudo systemctl enable --now ollama" if shutil.which("ollama") else UPGRADE_OLLAMA


def _version(version: str, url: str) -> Finding:
    found = re.match(r"v?(\d+)\.(\d+)\.(\d+)", version)
    number = tuple(map(int, found.groups())) if found else (0, 0, 0)
    faults = [fault for good, fault in BAD_OLLAMAS if (0, 0, 0) < number < good]
    if faults:
        return warn("ollama", f"version {version}: {'; '.join(faults)}", UPGRADE_OLLAMA)
    return ok("ollama", f"{url} answers, version {version}")


def _exposure(machine: Machine) -> Iterator[Finding]:
    """It asks nobody for a password, so nobody outside should reach it."""
    address = urlsplit(machine.config.ollama.url)
    if not machine.config.ollama_is_here:
        return
    port = address.port or (443 if address.scheme == "https" else 80)
    outside = [str(listener) for listener in _listeners(machine.root, port) if not listener.is_loopback]
    if outside:
        yield warn("ollama", f"it listens on {', '.join(outside)}: the whole network may use it", ON_LOOPBACK)


def _listeners(root: Path, port: int) -> Iterator[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """The addresses on which somebody listens on ``port``, from the kernel's tables."""
    for table in ("tcp", "tcp6"):
        with suppress(OSError):
            for line in lines_of(root / "proc/net" / table)[1:]:
                _, local, _, state, *_ = line.split()
                host, _, number = local.partition(":")
                if state == "0A" and int(number, 16) == port:
                    yield _address(host)


def _address(digits: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The kernel writes addresses as 32-bit words in the order of the machine."""
    words = [bytes.fromhex(digits[at : at + 8]) for at in range(0, len(digits), 8)]
    packed = b"".join(word[::-1] if sys.byteorder == "little" else word for word in words)
    address = ipaddress.ip_address(packed)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def _models(machine: Machine, ollama: Ollama) -> Iterator[Finding]:
    config = machine.config
    settings = {normalise(name): config.models.for_model(name) for name in config.models.settings}
    default = normalise(config.models.default)

    def settings_of(model: str) -> ModelSettings:
        return settings.get(model, config.models.defaults)

    def policy(model: str) -> ModelPolicy:
        return ModelPolicy(num_ctx=settings_of(model).num_ctx, pinned=settings_of(model).pinned)

    catalogue = Catalogue(
        ollama,
        clock=machine.clock,
        estimates=Estimates({}, lambda *_: None),
        policy=policy,
        written=config.models_named,
    )
    catalogue.refresh()
    budget = yield from _budget(machine)
    sizes: dict[str, int] = {}
    for model in dict.fromkeys(map(normalise, config.models_named)):
        if model not in catalogue.names():
            yield _missing(machine, ollama, catalogue.spelling(model), is_default=model == default)
            continue
        sizes[model] = catalogue.size_bytes(model)
        yield _usable(machine, catalogue, model, budget)
        yield from _context(machine, model, settings_of(model).num_ctx, catalogue.details(model))
    pinned = [model for model in sizes if settings_of(model).pinned]
    together = sum(sizes[model] for model in {*pinned, default} if model in sizes)
    if pinned and together > budget and all(sizes[model] <= budget for model in pinned):
        text = f"{', '.join(pinned)} pinned, the default {default} beside: {megabytes(together)}"
        yield warn("memory", f"{text}, but the budget is {megabytes(budget)}", f"{machine.edit}   # pin fewer")


def _budget(machine: Machine) -> Generator[Finding, None, int]:
    """What models may take, in bytes."""
    pool, total = machine.config.pool, memory_total() if machine.config.ollama_is_here else None
    limits = memory_limits(
        total_bytes=total, budget_bytes=pool.memory_budget_bytes, reserve_bytes=pool.memory_reserve_bytes
    )
    budget, reserve = limits["budget_bytes"], limits["reserve_bytes"]
    if total is None:
        yield ok("memory", f"{megabytes(budget)} for models on the machine of ollama.url")
        return budget
    text = f"{megabytes(budget)} of {megabytes(total)} for models, {megabytes(reserve)} kept free"
    if (pool.memory_budget_bytes or 0) > budget:
        asked = f"pool.memory_budget_bytes asks for {megabytes(pool.memory_budget_bytes or 0)}"
        yield warn("memory", f"{asked}, but there are {text}", f"{machine.edit}   # leave memory_budget_bytes out")
    else:
        yield ok("memory", text)
    return budget


def _missing(machine: Machine, ollama: Ollama, model: str, *, is_default: bool) -> Finding:
    pull = f"ollama pull {model}"
    if machine.config.ollama.allow_pull:
        return ok("model", f"{model} is not there yet: it is fetched when a task needs it")
    if not is_default:
        return warn("model", f"Ollama does not have {model}, which is configured", pull)
    fix = Fix(question=f"Download {model}?", act=lambda: _pull(ollama, model))
    return fail("model", f"Ollama does not have {model}, the default", pull, fix)


def _usable(machine: Machine, catalogue: Catalogue, model: str, budget: int) -> Finding:
    size, details = catalogue.size_bytes(model), catalogue.details(model)
    if details and details.capabilities and "completion" not in details.capabilities:
        return fail("model", f"{model} only makes embeddings: it cannot answer", f"{machine.edit}   # another model")
    if size > budget:
        text = f"{model} needs {megabytes(size)}, the budget is {megabytes(budget)}"
        return fail("model", text, f"{machine.edit}   # a smaller model, or a smaller num_ctx for it")
    return ok("model", f"{model} is there, about {megabytes(size)} when loaded")


def _context(machine: Machine, model: str, num_ctx: int, details: ModelDetails | None) -> Iterator[Finding]:
    longest = details.context_length if details else None
    if longest and num_ctx > longest:
        text = f"num_ctx of {model} is {num_ctx}, but it was made for {longest}"
        yield warn("model", text, f'{machine.edit}   # models.settings: {{"{model}": {{num_ctx: {longest}}}}}')


def _pull(ollama: Ollama, model: str) -> None:
    """Download it, the share that is there on a line that is written anew."""

    def tell(status: str, completed: int, total: int) -> None:
        share = f" {100 * completed // total} %" if total else ""
        print(f"\r\x1b[K{printable(status)[:60]}{share}", end="", flush=True)

    ollama.pull(model, on_progress=tell, interrupt=Interrupt())
    print()
