"""From questions to hits: what a passage is, which of them count, and how rankings are judged."""
