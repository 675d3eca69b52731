"""Where a supervisor runs when not in a task of the caller's, and what signals do to it."""
