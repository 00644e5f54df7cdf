"""The report as text: tables for a terminal, for Markdown and for a page."""
