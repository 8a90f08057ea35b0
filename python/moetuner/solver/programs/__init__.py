"""Integer programs, solved by CBC in child processes."""
