"""Actor-critics: actors, critics and their one loss."""
