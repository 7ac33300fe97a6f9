"""Runs recorded in the services that data teams have: lineage as OpenLineage events, figures in MLflow."""
