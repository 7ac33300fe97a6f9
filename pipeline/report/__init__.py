"""After the run: one page that shows what came out and what it cost.

Reads the annotated set and writes one HTML file.
"""
