"""Reports on a finished run: reads the annotated set and writes one HTML page of its results, throughput and cost."""
