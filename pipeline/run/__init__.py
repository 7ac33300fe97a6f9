"""Runs an annotation job: checks and plans it, annotates its units in Ray actors, verifies and finishes the output.

Sends progress to stderr, metrics to Prometheus, and notifications of failed runs.
"""
