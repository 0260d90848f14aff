"""Stage 4: production launches that rest on evidence and survive weeks."""
