"""The configuration of a run: read, validated and documented.

Its models are frozen, and unknown keys fail before anything starts.
"""
