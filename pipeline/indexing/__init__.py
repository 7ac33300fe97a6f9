"""Build an index: check passages, encode them, add them to shards, and measure the result.

An interrupted build resumes: its finished shards are kept.
"""
