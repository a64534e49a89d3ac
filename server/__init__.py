"""OpenAI-compatible HTTP front: protocol, routes, streaming, authentication, metrics, process supervision."""
