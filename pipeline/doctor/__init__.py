"""Checks machines, cluster and devices before the first run, and reports what would make a run fail.

Collects facts about each machine, tests search and engine on a run's device, and judges the results.
"""
