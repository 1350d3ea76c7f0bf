"""Saved, shared, chunked, ageing and paged contexts, measured."""
