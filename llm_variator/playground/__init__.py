"""A page on one's own text: which tokens a compressed cache keeps, what it costs, what changes in the answer."""
