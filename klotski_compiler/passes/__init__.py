"""Named pure functions from program to plan: slots, depend, waits, and the critical path."""
