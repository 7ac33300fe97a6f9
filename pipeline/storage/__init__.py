"""Where bytes lie: locations at any URI, and the lease that keeps two runs off one output.

Retries transient errors; files appear whole or not at all.
"""
