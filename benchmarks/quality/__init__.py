"""What accuracy a budget of keys buys, and what other ways of choosing keys buy with the same budget."""
