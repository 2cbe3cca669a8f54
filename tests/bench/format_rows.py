"""kafkasrcd's rows with formats: a handler that does nothing, with the payload as the peer's loop has it."""

from tests.bench.daemon_rows import throughput
from tests.bench.result import BenchResult, Workload
from tests.kafka_cluster import KafkaCluster


def run_json_typed(cluster: KafkaCluster, workload: Workload) -> BenchResult:
    """A dataclass of each record."""
    name = "kafkasrcd, typed JSON"
    return throughput(name, "take_order", cluster, workload, workload.messages, module="format_handlers")


def run_avro(cluster: KafkaCluster, workload: Workload) -> BenchResult:
    """Dicts, as AvroDeserializer gives."""
    return _run("kafkasrcd, Avro", "take_any", "avro", cluster, workload)


def run_protobuf(cluster: KafkaCluster, workload: Workload) -> BenchResult:
    """A generated class, as ProtobufDeserializer gives."""
    return _run("kafkasrcd, Protobuf", "take_protobuf", "protobuf", cluster, workload)


def run_protobuf_dict(cluster: KafkaCluster, workload: Workload) -> BenchResult:
    """Dicts, by the registry's schema."""
    return _run("kafkasrcd, Protobuf as dicts", "take_any", "protobuf", cluster, workload)


def run_json_schema(cluster: KafkaCluster, workload: Workload) -> BenchResult:
    """Dicts, as JSONDeserializer gives."""
    return _run("kafkasrcd, JSON Schema", "take_any", "json_schema", cluster, workload)


def _run(name: str, handler: str, value_format: str, cluster: KafkaCluster, workload: Workload) -> BenchResult:
    settings = {"value_format": value_format, "schema_registry.url": workload.registry_url}
    return throughput(name, handler, cluster, workload, workload.messages, settings, "format_handlers")
