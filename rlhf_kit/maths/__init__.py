"""The formulas of RLHF as pure functions: tensors and floats in, tensors out.

Nothing here knows a model, a tokenizer, a recipe or a process. Functions return per-token values; `masking.masked_mean`
is the one place that reduces them, with an explicit count, so that a minibatch cut into microbatches or spread over
processes gives the same number.

Shapes, once for all: B completions, C completion length (right-padded), N tokens, H hidden size, V vocabulary.
Masks are true for real tokens. Log-probabilities and KL are in nats.
"""
