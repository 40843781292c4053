"""THE OPERATOR: job files, the session that does everything, and the command line over it."""
