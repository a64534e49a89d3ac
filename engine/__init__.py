"""The engine: requests, KV storage, model runner, models, sampler, tokenizer, weights."""
