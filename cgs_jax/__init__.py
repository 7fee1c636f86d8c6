"""CGS in JAX: a generalist and its specialists teach each other to segment organs."""

__version__ = "0.1.0"
