"""The supervisor and the command line."""
