"""Benchmarks: what a row costs, beside other implementations and the bare engine; how runs and indexes grow."""
