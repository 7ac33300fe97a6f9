"""Search: an index of FAISS shards, opened, kept and asked, on one machine or over shard servers.

Offers one call, the top passages for a text.
"""
