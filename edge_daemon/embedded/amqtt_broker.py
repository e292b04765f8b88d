"""amqtt 0.11 to 0.12, put right in two places that a first look at this project meets."""

import asyncio
from contextlib import suppress

from amqtt.broker import Broker
from amqtt.session import Session


class AmqttBroker(Broker):  # type: ignore[misc] # amqtt has no types
    """A session is sent what it subscribed to; a client that hangs up early leaves no traceback."""

    async def stream_connected(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, listener_name: str
    ) -> None:
        """Serve a client from its first packet to its last."""
        with suppress(OSError):  # closing the connection of a client that is refused and has gone by then
            await super().stream_connected(reader, writer, listener_name)

    async def _publish_retained_messages_for_subscription(
        self, subscription: tuple[str, int], session: Session
    ) -> None:
        # amqtt gives every new session the retained messages of everybody's subscriptions.
        topic_filter, _qos = subscription
        if any(holder is session for holder, _ in self._subscriptions.get(topic_filter, ())):
            await super()._publish_retained_messages_for_subscription(subscription, session)
