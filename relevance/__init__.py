"""LLM relevance recipes on recis. This part holds no code yet: the issue that builds it comes after the engine."""
