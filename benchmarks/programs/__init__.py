"""The norms of all libraries, the cases that are measured, and whole training steps."""
