"""What comes out: unit files, manifest, success marker and dataset card of an annotated set.

The visible data files are the commit log.
"""
