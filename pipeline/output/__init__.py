"""The files of an annotated set: unit files, manifest, success marker and dataset card.

The visible data files are the commit log.
"""
