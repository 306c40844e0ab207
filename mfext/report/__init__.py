"""Results for people: terminal, JSON, Markdown and one HTML file. Only door to rich and jinja2."""
