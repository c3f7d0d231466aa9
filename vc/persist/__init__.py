"""The record that a sandbox leaves on disk, and where everything of it is."""
