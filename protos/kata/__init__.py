"""The Kata agent API, which host and guest share."""
