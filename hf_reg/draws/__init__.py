"""What is drawn: units, heads and blocks that stay, and by what they are multiplied."""
