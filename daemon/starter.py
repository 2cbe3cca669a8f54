"""The files that ``kafkasrcd init`` writes: a configuration with comments, and a handler to go with it."""

from pathlib import Path

from kafkasrcd.errors import KafkasrcdError

CONFIGURATION = """\
# kafkasrcd: what to consume, and what to call with it.
#
# A line that begins with "# name =" shows a setting's default; take the "# " away to change it.
# Each setting can also be given as an environment variable, KAFKASRCD_BROKERS or KAFKASRCD_HANDLER__PROCESSES, or on
# the command line, as in -s handler.processes=4. The command line counts most, then the environment, then this file.
#
# `kafkasrcd config check` says whether it can work, `kafkasrcd config show` what is in effect.

# Where Kafka is: host:port, or several separated by commas.
brokers = "localhost:9092"

# The consumer group. Daemons with the same group share the topics' partitions, on one host or many.
group_id = "kafkasrcd"

# What to consume. A name that starts with ^ is a regular expression, as in "^orders-".
topics = ["orders"]

# Where a partition starts that has no committed offset: "earliest", "latest", or "error" to stop there.
# auto_offset_reset = "earliest"

# Processed records are committed this often. After a crash, what was processed since the last commit comes again.
# commit_interval_secs = 5.0

# What values are written in: "json", "string", "bytes", "msgpack", "avro", "protobuf", "json_schema", or a class of
# yours, as in "custom:module:Class". What differs for one topic goes into a section [formats.<topic>].
# value_format = "json"
# key_format = "bytes"

# A handler that raises is called again with the same record this many times, after about 100 ms, then 200, and so on.
# max_retries = 3
# retry_backoff_ms = 100
# retry_backoff_max_ms = 10000

[handler]
# The function to call, as module:function. Its module is looked for beside this file first.
target = "handlers:handle"

# Processes that run it. 0 is one for each core.
# processes = 0

# When the last attempt failed: "dead_letter" keeps the record whole in the store (kafkasrcd dead-letters list) and goes
# on, "stop" stops the partition until someone looks, "skip" skips the record and counts it.
# on_failure = "dead_letter"

# A topic for dead letters, besides the store, such as "{topic}.DLQ".
# dead_letter_topic = ""

# A partition of whose last records more than this share became dead letters, such as 0.5, is paused until someone says
# `kafkasrcd resume`. 1 is never.
# max_dead_letter_ratio = 1.0

# One call, of the handler or a deserializer, may take so long; then its process is killed, and its record counted as
# the cause.
# timeout_seconds = 300.0

[supervisor]
# What a stop, or giving up a partition, may take: handlers finish the records they hold.
# drain_timeout_seconds = 20.0

# Shared memory for each partition. The largest record is a little under half of it.
# ring_bytes = 4194304

# "consumer" is Kafka's newer group protocol, KIP-848; it needs Kafka 4.0.
# group_protocol = "classic"

# "debug", "info", "warning", "error" or "critical".
# log_level = "info"

[extra_config]
# Any setting of librdkafka's, such as those for encryption and passwords. A secret need not stand here:
# ${env:NAME} is replaced by an environment variable, ${file:/path} by a file's content, and ${credential:NAME} by
# what systemd's LoadCredential=NAME:/path provides.
#
# security.protocol = "sasl_ssl"
# sasl.mechanism = "SCRAM-SHA-512"
# sasl.username = "orders-service"
# sasl.password = "${credential:kafka-password}"
"""

HANDLERS = '''\
"""What kafkasrcd calls; `target` in kafkasrcd.toml names the function."""

from dataclasses import dataclass

from kafkasrcd import Message


@dataclass
class Order:
    """A record's value, as JSON: {"order_id": "A-1", "amount": 9.5}. Other fields in it are ignored."""

    order_id: str
    amount: float


def handle(message: Message[Order]) -> None:
    """Called with one record at a time, in order within a partition, on as many cores as there are.

    When it returns, the record counts as processed. When it raises, it is called again with the same record; see
    max_retries and on_failure in kafkasrcd.toml. After a crash a record may come twice, so it should do no harm then.
    """
    order = message.payload
    print(f"order {order.order_id}: {order.amount} ({message.topic}[{message.partition}]@{message.offset})")
'''

FILES = {"kafkasrcd.toml": CONFIGURATION, "handlers.py": HANDLERS}


def write_starter(directory: Path, *, force: bool = False) -> list[Path]:
    """Write the files into ``directory``, which is created where it is missing, and return their paths.

    Raises KafkasrcdError where one exists already, unless ``force``; then nothing is written. OSError where the system
    refuses.
    """
    directory.mkdir(parents=True, exist_ok=True)
    paths = {directory / name: content for name, content in FILES.items()}
    existing = [str(path) for path in paths if path.exists() or path.is_symlink()]
    if existing and not force:
        verb = "exists" if len(existing) == 1 else "exist"
        raise KafkasrcdError(f"{' and '.join(existing)} {verb} already; nothing was written; --force overwrites")
    for path, content in paths.items():
        # "x" where nothing is to be lost: between the look above and now a file may have come.
        with path.open("w" if force else "x", encoding="utf-8") as file:
            file.write(content)
    return list(paths)
