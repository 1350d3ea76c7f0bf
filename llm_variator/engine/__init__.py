"""What happens to a prompt: its groups, the trained layers, hooks on the base's modules, the compressed cache."""
