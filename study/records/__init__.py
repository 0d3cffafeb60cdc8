"""What a run leaves, and finding it again. Everything here answers without torch."""
