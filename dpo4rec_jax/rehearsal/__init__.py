"""What `rehearse` does: it compiles the loop for a machine that is not there, and reads it."""
