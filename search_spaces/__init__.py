"""Composites that can be searched: rules, spaces, heuristics and documents, without torch."""
