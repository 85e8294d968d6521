"""What is shown to people: the figure of the mathematics, and the report page. Rendering only."""
