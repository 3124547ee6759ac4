"""How the embedded model was made: batches of its texts, its tokenizer, training, evaluation, and the checkpoint."""
