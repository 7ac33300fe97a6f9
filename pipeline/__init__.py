"""Self-RAG decoding for batches: reflection tokens, engine, index and the algorithm."""
