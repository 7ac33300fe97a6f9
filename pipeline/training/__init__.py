"""Trains a LoRA adapter with which a small model writes the reflection tokens.

Training examples are trees whose branches share their prompt.
"""
