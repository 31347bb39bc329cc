"""Agents and models that learn from real environments with these losses."""
