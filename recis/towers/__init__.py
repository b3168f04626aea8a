"""Dense towers beside the tables of ids: language and vision models, precomputed vectors, layer-wise adapters."""
