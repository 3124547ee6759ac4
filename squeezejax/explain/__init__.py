"""What an answer kept, attended to and missed, as a page."""
