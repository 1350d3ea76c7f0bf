"""What a plugin costs and loses: operations, time, quality, and the files that keep the figures."""
