"""One module a command: it reads its flags, calls steps, and writes."""
