"""Text around the tokens: chat templates, and answers that stream."""
