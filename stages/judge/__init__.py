"""A table of results becomes a verdict: paired and single statistics."""
