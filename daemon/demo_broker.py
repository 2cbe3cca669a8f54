"""The demo's broker: librdkafka's mock cluster, in memory, in a process of its own.

Run as ``python -m kafkasrcd.daemon.demo_broker TOPIC``. Prints ``host:port`` once the topic is there, with librdkafka's
4 partitions, and serves until it is killed. It keeps about 5 MiB of each partition; then the oldest records go.
"""

import signal
import sys

from confluent_kafka import Producer


def main() -> None:
    """Serve; never returns."""
    # Any client with this setting carries the cluster; asking for a topic there creates it.
    client = Producer({"test.mock.num.brokers": 1})
    metadata = client.list_topics(sys.argv[1], timeout=10)
    error = metadata.topics[sys.argv[1]].error
    if error is not None:
        sys.exit(f"kafkasrcd: the embedded broker has no topic {sys.argv[1]}: {error}")
    print(",".join(f"{broker.host}:{broker.port}" for broker in metadata.brokers.values()), flush=True)
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
