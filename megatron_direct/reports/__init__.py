"""What a reader sees: pages, figures, tables and their wording."""
