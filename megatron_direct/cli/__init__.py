"""The command line: flags, environment variables and the registry of commands."""
