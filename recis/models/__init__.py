"""Models for clicks and retrieval on dynamic tables, and the small layers they are made of.

    layers, attention, experts     MLP, FM, CrossNet, DotInteraction; TargetAttention; StackedMLP, MixtureOfExperts, CgcLayer
    inputs                         Batch -> pooled embeddings and dense columns
    dlrm, deepfm, dcn, din         one logit per task
    multitask                      MMoE, PLE
    two_tower, sampling            retrieval: in-batch softmax, logQ, drawn negatives
    sequence_layers                attention, transformer block and positions on sequences of any length
    next_item, retrieval_head      sasrec, hstu: the next item after every prefix; whole and sampled softmax over a catalogue
    bst, seq2seq                   a transformer over behaviour and target; histories in, continuations out
    losses                         summed losses with weights and masks per task
    synthetic                      a click log in memory, with the best possible AUC; synthetic_sequences: sequences of items

A model is a frozen config whose `build()` gives an nn.Module with forward(batch) -> logits. Import from these modules.
"""
