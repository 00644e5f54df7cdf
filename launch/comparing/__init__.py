"""What a comparison shows: tables for a terminal, files and a page. Used by `launch.compare` and by a sweep."""
