"""Making an index: passages read and checked, encoded, added to shards, measured.

Work that was finished before a crash is kept.
"""
