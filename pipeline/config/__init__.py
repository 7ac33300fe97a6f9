"""What the user sets: the configuration of a run, read, validated and described.

Frozen models; unknown keys fail before anything starts.
"""
