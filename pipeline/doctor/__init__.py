"""Before the first run: what this machine and cluster can do, tried and told in plain lines.

Finds what a run would stumble over.
"""
