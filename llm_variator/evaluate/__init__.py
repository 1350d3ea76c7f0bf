"""Measure what compression costs in quality."""
