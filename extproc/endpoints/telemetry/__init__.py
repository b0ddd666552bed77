"""What inference engines say about their load: scraped, read, and handed on as `Load`."""
