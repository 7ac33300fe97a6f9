"""Teaching a language model to write reflection tokens."""
