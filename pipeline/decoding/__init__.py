"""The paper's algorithm: decide, retrieve, generate, critique, choose (Asai et al. 2023).

It knows engines, indexes and models only through ``protocols``, so that every equation is tested without them.
"""
