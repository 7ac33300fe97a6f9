"""After the run: answers scored against gold, and chosen again with other weights.

Needs no model.
"""
