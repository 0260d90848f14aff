"""What an experiment shows: the findings, their figures, the page."""
