"""Relevance of components: composites as zennit hooks, the engine that applies them, and what it returns."""
