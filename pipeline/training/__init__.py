"""Before the model: an adapter that teaches a small model the reflection tokens.

Training rows are trees whose branches share their prompt.
"""
