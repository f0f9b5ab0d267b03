"""Running an engine: requests in, tokens out."""
