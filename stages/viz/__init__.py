"""The dashboard: a server of the records and metrics of one root, and its pages."""
