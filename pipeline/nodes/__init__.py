"""The machines of a cluster: what each must be able to read and write, and the environment that the driver sends.

Machines share files only if somebody has arranged it: each is tried before any engine starts.
"""
