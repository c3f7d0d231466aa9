"""The guest agent as the host sees it: addresses, transports and typed calls."""
