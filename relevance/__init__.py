"""Grade (query, item) pairs with language models: grammar, rewards, recipes on TRL, scoring. Parts are imported by module."""
