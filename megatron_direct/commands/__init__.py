"""One module per command: it reads its flags, calls steps, and writes."""
