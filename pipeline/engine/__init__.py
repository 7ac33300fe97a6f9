"""The model process: vLLM started, watched, asked, and explained when it dies.

vLLM is imported here and nowhere else.
"""
