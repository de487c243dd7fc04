"""Text -> tokens on disk -> the batch at a global position."""
