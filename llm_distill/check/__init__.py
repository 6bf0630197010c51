"""What can be known of a run before its first step."""
