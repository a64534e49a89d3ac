"""From a ModelSpec to what planning needs of it."""

from hybridgen.engine.model_spec import ModelSpec
from hybridgen.scheduler.cost import ModelShape


def shape_of(spec: ModelSpec, name: str, *, weight_bytes: int = 2, kv_bytes: int = 2) -> ModelShape:
    """The model's shape. The table of token embeddings is read by rows and does not count as read; the matrix that
    gives the logits does, also where it is the same table."""
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    num_mlp = 3 if spec.gated_mlp else 2
    layer = spec.hidden_size * (2 * q + 2 * kv) + num_mlp * spec.hidden_size * spec.intermediate_size
    return ModelShape(
        name=name,
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        parameters=spec.num_parameters(),
        linear_parameters=spec.num_layers * layer,
        head_parameters=spec.vocab_size * spec.embed_size,
        weight_bytes=weight_bytes,
        kv_bytes=kv_bytes,
    )
