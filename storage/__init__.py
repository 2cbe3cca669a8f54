"""The state backend: who owns a partition, and how far it has been processed."""
