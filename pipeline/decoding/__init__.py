"""The paper's algorithm: decide, retrieve, generate, critique, choose (Asai et al. 2023).

Engines, indexes and models stand behind ``protocols``, so that every equation can be tested without them.
"""
