"""Whole tables of experiments from one recipe: which runs they need, running them, and showing them."""
