"""One page of all stored results, each number with the file it came from."""
