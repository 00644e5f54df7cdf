"""Report as text: tables for a terminal, in Markdown and on a page."""
