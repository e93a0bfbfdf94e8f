"""From data files to fixed-shape batches, on the host, in NumPy and PIL: records -> index -> loader."""
