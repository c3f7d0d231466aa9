"""The agent's version, where nothing else must be imported to know it."""

VERSION = "0.1.0"
