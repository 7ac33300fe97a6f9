"""What comes in: query sets, checked and cut into units, and what they are imported from.

A row becomes a query here.
"""
