"""The suite for one GPU: ``pytest -m gpu``, meant for five minutes, offline, with the embedded models.

``SELFRAG_GPU_REHEARSAL=1`` runs it without a GPU as far as that goes: Ray gets a declared one, and what only a card can
show is skipped.
"""
