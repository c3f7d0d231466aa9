"""The messages inside ttrpc frames."""
