"""A run from top to bottom: planned, annotated by actors, counted, finished.

Ray is driven from here.
"""
