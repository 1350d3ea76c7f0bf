"""Serving through vLLM with compression plugins, and measuring it: `__main__` and `measure`."""
