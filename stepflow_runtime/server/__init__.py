"""One server process and its care. Nothing in here knows workflows."""
