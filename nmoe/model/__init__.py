"""The decoder, its router, its initial weights, its HuggingFace names."""
