"""The code inside worker and handler processes, and the rings between them."""
