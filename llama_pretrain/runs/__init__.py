"""Run directories: layout, metrics, provenance, drift, comparison and reports."""
