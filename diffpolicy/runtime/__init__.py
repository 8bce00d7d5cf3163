"""Real-time execution and export."""
