"""Once per question: select what matters, attend to it, generate."""
