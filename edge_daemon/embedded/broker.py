"""The process of a broker on loopback: becomes mosquitto, or runs amqtt (MQTT 3.1.1 only).

    python -m edge_daemon.embedded.broker --port 1883 --data-dir DIR (--mosquitto PROGRAM | --amqtt)

Logs to standard output; a line that ends in "running" says that it accepts connections.
"""

import argparse
import asyncio
import os
import signal
import sys
from pathlib import Path

from edge_daemon.embedded.process import die_with_parent, on_stdin_end


def main() -> None:
    """Run the broker until told to stop, or until the parent ends."""
    parser = argparse.ArgumentParser(prog="edge_daemon.embedded.broker", description="A broker on loopback.")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--data-dir", type=Path, required=True)
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--mosquitto", metavar="PROGRAM")
    kind.add_argument("--amqtt", action="store_true")
    arguments = parser.parse_args()
    die_with_parent(signal.SIGTERM)  # mosquitto writes down what it holds before it ends
    if arguments.amqtt:
        asyncio.run(_serve_amqtt(arguments.port))
    else:
        _become_mosquitto(arguments.mosquitto, _mosquitto_config(arguments.port, arguments.data_dir))


def _become_mosquitto(program: str, config: Path) -> None:
    # On a pipe mosquitto holds back what it logs to standard output, but not what it logs to standard error.
    os.dup2(sys.stdout.fileno(), sys.stderr.fileno())
    os.execv(program, [program, "-c", str(config)])  # noqa: S606 - no shell is the point


def _mosquitto_config(port: int, data_dir: Path) -> Path:
    directory = data_dir.resolve() / "mosquitto"
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "mosquitto.conf"
    lines = [
        f"listener {port} 127.0.0.1",
        "allow_anonymous true",
        "persistence true",
        f"persistence_location {directory}/",
        "autosave_on_changes true",
        "autosave_interval 1",
        "max_queued_messages 0",
        "log_dest stderr",
        "log_type error",
        "log_type warning",
        "log_type notice",
        "log_type information",  # the line that says it is running
        "connection_messages false",
        "user root",  # started by root it would change its user, and with it lose this directory and its parent
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


async def _serve_amqtt(port: int) -> None:
    from edge_daemon.embedded.amqtt_broker import AmqttBroker  # noqa: PLC0415 - an optional extra

    plugins = {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}}
    listeners = {"default": {"type": "tcp", "bind": f"127.0.0.1:{port}"}}
    broker = AmqttBroker({"listeners": listeners, "plugins": plugins})
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    on_stdin_end(lambda: _set_from_thread(loop, stop))
    await broker.start()
    print("amqtt running", flush=True)
    await stop.wait()
    await broker.shutdown()


def _set_from_thread(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    loop.call_soon_threadsafe(event.set)


if __name__ == "__main__":
    main()
