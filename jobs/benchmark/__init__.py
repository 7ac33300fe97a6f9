"""Benchmarks of the jobs.

They compare the cost of a row with other implementations and the bare engine, and the index with bare FAISS; they
measure what each optimization saves, and how runs scale.
"""
