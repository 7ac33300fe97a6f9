"""Opens and searches an index of FAISS shards, in one process or over shard servers.

The interface is one call that returns the best passages for a text.
"""
