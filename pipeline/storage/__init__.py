"""Storage: locations at any URI, Parquet files, and the lease that keeps a second run off an output.

Transient errors are retried, and files are written atomically.
"""
