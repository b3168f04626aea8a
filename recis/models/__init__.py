"""Models for clicks and retrieval on dynamic tables, and the small layers they are made of.

    layers, attention, experts     MLP, FM, CrossNet, DotInteraction; TargetAttention; StackedMLP, MixtureOfExperts, CgcLayer
    inputs                         Batch -> pooled embeddings and dense columns
    dlrm, deepfm, dcn, din         one logit per task
    multitask                      MMoE, PLE
    two_tower, sampling            retrieval: in-batch softmax, logQ, drawn negatives
    losses                         summed losses with weights and masks per task
    synthetic                      a click log in memory, with the best possible AUC

A model is a frozen config whose `build()` gives an nn.Module with forward(batch) -> logits. Import from these modules.
"""
