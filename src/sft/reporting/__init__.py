"""What people read: text and CSV tables, and one self-contained HTML page."""
