"""Speed and memory, measured beside the alternatives. Not imported by the scripts."""
