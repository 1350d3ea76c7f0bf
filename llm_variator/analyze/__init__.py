"""What plugins do inside a model: activated neurons, merge weights, reconstruction, and the tokens that lose most."""
