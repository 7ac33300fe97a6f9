"""The engine's settings tried on the rows of a run: what each one gains, and which answers it changes."""
