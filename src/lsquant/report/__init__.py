"""Rendering for people: the figure of the mathematics, and the report page."""
