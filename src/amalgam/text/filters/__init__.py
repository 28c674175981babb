"""What may pass of a text, found as it comes: words, regular expressions, personal data."""
