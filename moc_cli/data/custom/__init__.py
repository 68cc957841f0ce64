"""Custom datasets: files, columns, formats, and conversations by their chat templates."""
