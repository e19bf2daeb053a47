"""What a request may ask, checked once: sampling, grammars, lengths."""
