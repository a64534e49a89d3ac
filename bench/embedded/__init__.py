"""Everything the embedded model is made from: texts, tasks, tokenizer, training rows, training loop."""
