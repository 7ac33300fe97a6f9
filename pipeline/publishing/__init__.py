"""Registers finished annotated sets in tables of a lakehouse, once each: Delta Lake and Apache Iceberg."""
