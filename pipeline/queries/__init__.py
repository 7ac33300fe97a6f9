"""Query sets: import from other sources, validation, selection of new rows, and division into units."""
