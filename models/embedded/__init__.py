"""The small trained model that needs no download: its text, its tokenizer, its weights and its training."""
