"""Scores answers against gold answers, and chooses them again with other weights or thresholds.

Works on annotated sets; needs no model.
"""
